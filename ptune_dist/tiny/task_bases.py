"""Make the tiny bases of the recipes: `python -m ptune_dist.tiny.task_bases` (5 to 15 minutes for each on one core).

GPT-2, Llama, T5 and BERT shapes with under a million parameters share a tokenizer of 2,048 byte-level BPE tokens. As
the real T5 was, all but BERT are trained on several tasks that are asked for by name, here on examples of `material.py`
that no recipe uses. Without a name, any of an input's tasks may be wanted: a soft prompt has something to select. BERT
is trained on masked tokens, on which sentences belong together, and then on the sentiment of reviews. Nothing is
downloaded. The same command continues a training that was stopped.
"""

import argparse
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ptune_dist.tiny.material import Material
from ptune_dist.tiny.stages import Stage, train_stages
from ptune_dist.tiny.text import read_docstrings

VOCAB_SIZE = 2048
SPECIAL = ["<eos>", "<pad>", "[CLS]", "[SEP]", "[MASK]"]
EOS_ID, PAD_ID, CLS_ID, SEP_ID, MASK_ID = range(len(SPECIAL))
MAX_TOKENS = 96
NUM_CHUNKS = 3  # per training step, each padded by itself


def build_tokenizer(texts: list[str], *, adds_cls: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE; an encoder's puts [CLS] before a text and [SEP] after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if not adds_cls:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
    )


def build_gpt2() -> GPT2LMHeadModel:
    """Positions start as small sinusoids: random ones hide the words at first, and learning takes longer."""
    sizes = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256, "activation_function": "gelu_pytorch_tanh"}
    config = GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    config.update(sizes | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model = GPT2LMHeadModel(config)
    positions = model.transformer.wpe.weight.data
    num_positions, width = positions.shape
    angles = torch.arange(num_positions)[:, None] * 1000.0 ** -(torch.arange(0, width, 2) / width)
    positions[:, 0::2] = 0.01 * angles.sin()
    positions[:, 1::2] = 0.01 * angles.cos()
    return model


def build_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=320, num_hidden_layers=3)
    config.update({"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256})
    config.update({"tie_word_embeddings": True, "head_dim": 32})
    config.update({"bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    return LlamaForCausalLM(config)


def build_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    config.update({"num_decoder_layers": 2, "decoder_start_token_id": PAD_ID})
    config.update({"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    return T5ForConditionalGeneration(config)


def build_bert() -> BertForPreTraining:
    config = BertConfig(vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    config.update({"intermediate_size": 384, "max_position_embeddings": 160, "pad_token_id": PAD_ID})
    config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    return BertForPreTraining(config)


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """[B, T]."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def chunks_of(rows: list, lengths: list[int]) -> list[list]:
    """Rows in NUM_CHUNKS groups of similar lengths."""
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    size = -(-len(rows) // NUM_CHUNKS)
    return [[rows[i] for i in order[first : first + size]] for first in range(0, len(rows), size)]


def causal_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    material: Material,
    rng: random.Random,
    *,
    batch_size: int,
    kinds: tuple[str, ...] = ("review", "review", "question", "record"),
) -> list[torch.Tensor]:
    """Of answers to inputs of these kinds, and of free text."""
    rows = []
    for _ in range(batch_size):
        if rng.random() < 0.12:
            ids = tokenizer.encode(rng.choice(material.prose))[:MAX_TOKENS] + [EOS_ID]
            rows.append((ids, ids))
            continue
        text, answer = material.draw_pair(rng, kinds)
        asked = tokenizer.encode(f"{text}\nAnswer:")
        target = tokenizer.encode(f" {answer}") + [EOS_ID]
        rows.append((asked + target, [-100] * len(asked) + target))
    return answer_losses(model, rows)


def answer_losses(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """A causal model's loss of each chunk of rows: input ids, and labels with -100 where nothing is learned.

    Logits exist for supervised positions alone, which saves time.
    """
    losses = []
    for chunk in chunks_of(rows, [len(row[0]) for row in rows]):
        ids = pad([row[0] for row in chunk], PAD_ID)
        labels = pad([row[1] for row in chunk], -100)[:, 1:]
        hidden = model.base_model(input_ids=ids, attention_mask=ids.ne(PAD_ID).long()).last_hidden_state[:, :-1]
        is_supervised = labels.ne(-100)
        logits = model.get_output_embeddings()(hidden[is_supervised])
        losses.append(torch.nn.functional.cross_entropy(logits, labels[is_supervised]))
    return losses


def t5_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    material: Material,
    rng: random.Random,
    *,
    batch_size: int,
) -> list[torch.Tensor]:
    rows = []
    for _ in range(batch_size):
        text, answer = material.draw_pair(rng, ("date", "question", "summary"))
        rows.append((tokenizer.encode(text) + [EOS_ID], tokenizer.encode(answer) + [EOS_ID]))
    losses = []
    for chunk in chunks_of(rows, [len(row[0]) for row in rows]):
        ids = pad([row[0] for row in chunk], PAD_ID)
        labels = pad([row[1] for row in chunk], -100)
        losses.append(model(input_ids=ids, attention_mask=ids.ne(PAD_ID).long(), labels=labels).loss)
    return losses


def bert_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    material: Material,
    rng: random.Random,
    *,
    batch_size: int,
) -> list[torch.Tensor]:
    """Masked tokens (15%), and whether the second half of a text belongs to the first."""
    rows = []
    for _ in range(batch_size):
        first, second = rng.choice(material.texts).split(), rng.choice(material.texts).split()
        half = len(first) // 2
        belongs = rng.random() < 0.5
        rest = first[half:] if belongs else second[len(second) // 2 :]
        encoded = tokenizer(
            " ".join(first[:half]), " ".join(rest), truncation=True, max_length=64, return_token_type_ids=True
        )
        ids = list(encoded["input_ids"])
        labels = [-100] * len(ids)
        for i, token in enumerate(ids):
            if token not in (CLS_ID, SEP_ID) and rng.random() < 0.15:
                labels[i], ids[i] = token, MASK_ID
        rows.append((ids, labels, encoded["token_type_ids"], int(not belongs)))
    losses = []
    for chunk in chunks_of(rows, [len(row[0]) for row in rows]):
        ids = pad([row[0] for row in chunk], PAD_ID)
        losses.append(
            model(
                input_ids=ids,
                attention_mask=ids.ne(PAD_ID).long(),
                token_type_ids=pad([row[2] for row in chunk], 0),
                labels=pad([row[1] for row in chunk], -100),
                next_sentence_label=torch.tensor([row[3] for row in chunk]),
            ).loss
        )
    return losses


def bert_review_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    material: Material,
    rng: random.Random,
    *,
    batch_size: int,
) -> list[torch.Tensor]:
    """Whether a review is positive, told by the pooled output, which a prompt's new head reads."""
    rows = [material.draw_review(rng) for _ in range(batch_size)]
    encoded = [tokenizer.encode(row["text"], truncation=True, max_length=64) for row in rows]
    losses = []
    for chunk in chunks_of(list(zip(encoded, rows, strict=True)), [len(ids) for ids in encoded]):
        ids = pad([ids for ids, _ in chunk], PAD_ID)
        outputs = model(input_ids=ids, attention_mask=ids.ne(PAD_ID).long())
        labels = torch.tensor([int(row["label"] == "positive") for _, row in chunk])
        losses.append(torch.nn.functional.cross_entropy(outputs.seq_relationship_logits, labels))
    return losses


Losses = Callable[..., list[torch.Tensor]]
# A stage that is mostly about reviews: the one token of their answers tells little beside the many of other tasks.
review_losses = functools.partial(causal_losses, kinds=("review",) * 8 + ("question", "record"))
# Name -> how it is built, and its stages, each with its losses, batch size, learning rate and number of steps.
BASES: dict[str, tuple[Callable[[], PreTrainedModel], list[tuple[Losses, int, float, int]]]] = {
    "gpt2": (build_gpt2, [(causal_losses, 16, 2e-3, 4000), (review_losses, 32, 1e-3, 800)]),
    "llama": (build_llama, [(causal_losses, 16, 2e-3, 2000), (review_losses, 32, 1e-3, 800)]),
    "t5": (build_t5, [(t5_losses, 16, 3e-3, 4000)]),
    "bert": (build_bert, [(bert_losses, 32, 3e-3, 600), (bert_review_losses, 32, 1e-3, 300)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="*", default=list(BASES), help=f"of {', '.join(BASES)}; all where left out")
    parser.add_argument("--data", type=Path, default=Path("configs/recipes/data"))
    parser.add_argument("--out", type=Path, default=Path("configs/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = set(args.bases) - set(BASES)
    if unknown:
        parser.error(f"unknown base {unknown.pop()}")

    material = Material(args.data, read_docstrings())
    for name in args.bases:
        build, stages = BASES[name]
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer(material.texts + material.labels, adds_cls=name == "bert")
        model = build()
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        planned = [
            Stage(functools.partial(losses_of, model, tokenizer, material, batch_size=batch_size), rate, num_steps)
            for losses_of, batch_size, rate, num_steps in stages
        ]
        train_stages(model, planned, seed=args.seed, part=args.out / f"{name}.part")
        model.half().save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)


if __name__ == "__main__":
    main()
