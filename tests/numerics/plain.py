"""What the trainer is held against: a plain PyTorch loop that shares nothing with it, and that loop through PEFT."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_STEPS, BATCH, PEAK, NUM_VIRTUAL = 20, 8, 0.05, 4
ROWS = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "data" / "train.jsonl"


def initial_vectors(width: int) -> torch.Tensor:
    """The same starting prompt for every side."""
    return torch.randn(NUM_VIRTUAL, width, generator=torch.Generator().manual_seed(7)) * 0.5


def write_initial_prompt(width: int, path: Path) -> Path:
    save_file({"virtual_tokens": initial_vectors(width)}, path)
    return path


def padded_batches(tokenizer, seed: int = 0):
    """Ids, mask and labels of each step's rows, in the documented order: a permutation of [seed, epoch]."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    for step in range(NUM_STEPS):
        pairs = [(rows[i]["word"] + " =", " " + rows[i]["answer"]) for i in order[step * BATCH : (step + 1) * BATCH]]
        coded = [(tokenizer.encode(a), tokenizer.encode(b) + [tokenizer.eos_token_id]) for a, b in pairs]
        width = max(len(a) + len(b) for a, b in coded)
        ids = torch.tensor([a + b + [1] * (width - len(a + b)) for a, b in coded])
        mask = torch.tensor([[1] * len(a + b) + [0] * (width - len(a + b)) for a, b in coded])
        labels = torch.tensor([[-100] * len(a) + b + [-100] * (width - len(a + b)) for a, b in coded])
        yield ids, mask, labels


def run_loop(parameters, loss_of, tokenizer, optimizer=None) -> list[float]:
    """AdamW, clipping at 1, linear to zero."""
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=PEAK, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / NUM_STEPS)
    losses = []
    for ids, mask, labels in padded_batches(tokenizer):
        loss = loss_of(ids, mask, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_curve(base_dir: Path, build_optimizer=None) -> list[float]:
    """Losses of the plain loop: virtual tokens before the embeddings, all logits, cross entropy on the targets."""
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    prompt = torch.nn.Parameter(initial_vectors(base.get_input_embeddings().embedding_dim))

    def loss_of(ids, mask, labels):
        vectors = torch.cat([prompt.expand(len(ids), -1, -1), base.get_input_embeddings()(ids)], dim=1)
        ones = torch.ones(len(ids), NUM_VIRTUAL, dtype=torch.long)
        logits = base(inputs_embeds=vectors, attention_mask=torch.cat([ones, mask], dim=1)).logits
        return torch.nn.functional.cross_entropy(
            logits[:, NUM_VIRTUAL - 1 : -1].flatten(0, 1), labels.flatten(), ignore_index=-100
        )

    return run_loop([prompt], loss_of, tokenizer, build_optimizer([prompt]) if build_optimizer else None)


def peft_curve(base_dir: Path) -> list[float]:
    """Losses of PEFT's prompt tuning from the same prompt."""
    from peft import PromptTuningConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL)
    # PEFT takes the width from the hidden size; OPT's embeddings are narrower.
    settings.token_dim = base.get_input_embeddings().embedding_dim
    model = get_peft_model(base, settings).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(initial_vectors(weight.shape[1]))

    def loss_of(ids, mask, labels):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return run_loop([weight], loss_of, tokenizer)
