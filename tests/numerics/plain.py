"""What the trainer is held against: a plain PyTorch loop that shares nothing with it, and that loop through PEFT.

Shapes: B rows, T input tokens, U target tokens, P virtual tokens, D width.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from tests.conftest import LABELS

NUM_STEPS, BATCH, PEAK, NUM_VIRTUAL = 20, 8, 0.05, 4
ROWS = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "data" / "train.jsonl"
PEFT_TASK = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}


def initial_vectors(width: int) -> torch.Tensor:
    """The same starting prompt for every side."""
    return torch.randn(NUM_VIRTUAL, width, generator=torch.Generator().manual_seed(7)) * 0.5


def write_initial_prompt(width: int, path: Path) -> Path:
    save_file({"virtual_tokens": initial_vectors(width)}, path)
    return path


def read_rows(path: Path = ROWS) -> list[dict[str, str]]:
    """Rows with the class of their word's length as `label`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row | {"label": LABELS[(len(row["word"]) > 5) + (len(row["word"]) > 8)]} for row in rows]


def encode_row(tokenizer, row: dict[str, str], family: str) -> tuple[list[int], list[int]]:
    """Ids of the input and of the target: texts as the tokenizer starts and ends them, or the number of a label."""
    before = tokenizer.encode(row["word"] + " =")
    if family == "encoder":
        return before, [LABELS.index(row["label"])]
    after = tokenizer.encode(" " + row["answer"])
    return before, after if after[-1] == tokenizer.eos_token_id else [*after, tokenizer.eos_token_id]


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def padded_batches(tokenizer, family: str = "causal", seed: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
    """Ids [B, T], mask [B, T] and labels of each step's rows, in the documented order: a permutation of [seed, epoch].

    Labels are [B, T] for a causal base, -100 on the input; [B, U] for seq2seq; [B] for an encoder.
    """
    rows = read_rows()
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    for step in range(NUM_STEPS):
        coded = [encode_row(tokenizer, rows[i], family) for i in order[step * BATCH : (step + 1) * BATCH]]
        texts = [a + b if family == "causal" else a for a, b in coded]
        labels = pad([[-100] * len(a) + b if family == "causal" else b for a, b in coded], -100)
        mask = pad([[1] * len(text) for text in texts], 0)
        yield pad(texts, 1), mask, labels[:, 0] if family == "encoder" else labels


def run_loop(parameters, loss_of, batches, optimizer=None, num_steps: int = NUM_STEPS) -> list[float]:
    """AdamW, clipping at 1, linear to zero."""
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=PEAK, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    losses = []
    for ids, mask, labels in islice(batches, num_steps):
        loss = loss_of(ids, mask, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def load_plain(base_dir: Path, family: str = "causal", head: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """transformers' own model of a family, in eval mode, an encoder's with this head."""
    auto = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
    if family in auto:
        return auto[family].from_pretrained(base_dir, dtype=torch.float32).eval().requires_grad_(False)
    base = AutoModelForSequenceClassification.from_pretrained(base_dir, dtype=torch.float32, num_labels=len(LABELS))
    assert not base.load_state_dict(head, strict=False).unexpected_keys
    return base.eval().requires_grad_(False)


def with_prompt(base, prompt: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A base's inputs with the virtual tokens before every row: vectors [B, P + T, D], mask [B, P + T]."""
    vectors = torch.cat([prompt.expand(len(ids), -1, -1), base.get_input_embeddings()(ids)], dim=1)
    ones = torch.ones(len(ids), len(prompt), dtype=mask.dtype)
    return {"inputs_embeds": vectors, "attention_mask": torch.cat([ones, mask], dim=1)}


def plain_curve(base_dir: Path, build_optimizer=None, family: str = "causal", head=None) -> list[float]:
    """Losses of the plain loop: virtual tokens before the embeddings, all logits, cross entropy on the targets.

    `head` is an encoder's starting head, by name, which is trained with the prompt.
    """
    base = load_plain(base_dir, family, head)
    prompt = torch.nn.Parameter(initial_vectors(base.get_input_embeddings().embedding_dim))
    trained = [prompt] + [base.get_parameter(name).requires_grad_() for name in head or {}]

    def loss_of(ids, mask, labels):
        inputs = with_prompt(base, prompt, ids, mask)
        if family != "causal":
            return base(**inputs, labels=labels).loss
        logits = base(**inputs).logits[:, NUM_VIRTUAL - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    batches = padded_batches(AutoTokenizer.from_pretrained(base_dir), family)
    return run_loop(trained, loss_of, batches, build_optimizer(trained) if build_optimizer else None)


def peft_curve(base_dir: Path, family: str = "causal", head=None) -> list[float]:
    """Losses of PEFT's prompt tuning from the same prompt and head."""
    from peft import PromptTuningConfig, get_peft_model

    base = load_plain(base_dir, family, head)
    # PEFT trains "classifier" and "score" unasked, and a pooler that starts anew only where it is named.
    more = ["pooler"] if family == "encoder" else None
    settings = PromptTuningConfig(task_type=PEFT_TASK[family], num_virtual_tokens=NUM_VIRTUAL, modules_to_save=more)
    # PEFT takes the width from the hidden size; OPT's embeddings are narrower.
    settings.token_dim = base.get_input_embeddings().embedding_dim
    model = get_peft_model(base, settings).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():  # for seq2seq it has as many rows again that nothing reads
        weight[:NUM_VIRTUAL] = initial_vectors(weight.shape[1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) == weight.numel() + sum(t.numel() for t in (head or {}).values())

    def loss_of(ids, mask, labels):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return run_loop(trained, loss_of, padded_batches(AutoTokenizer.from_pretrained(base_dir), family))


def peft_method_curve(
    base_dir: Path, settings, start: dict[str, torch.Tensor], family: str = "causal", head=None, **loop
) -> list[float]:
    """Losses of any of PEFT's prompt methods: `settings` is its config, `start` its prompt encoder's parameters."""
    from peft import get_peft_model

    settings.task_type = PEFT_TASK[family]
    base = load_plain(base_dir, family, head)
    model = get_peft_model(base, settings).eval()
    encoder = model.prompt_encoder["default"]
    wanted = encoder.state_dict()
    with torch.no_grad():
        for name, tensor in start.items():  # for seq2seq PEFT has as many rows again that nothing reads
            wanted[name][: len(tensor)] = tensor
    encoder.load_state_dict(wanted)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_of(ids, mask, labels):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return run_loop(trained, loss_of, padded_batches(AutoTokenizer.from_pretrained(base_dir), family), **loop)
