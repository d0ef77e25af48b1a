"""Make the shipped tiny base and the quickstart's data: `python -m ptune_dist.tiny.make` (about 20 minutes on 2 cores).

A byte-level Llama shape with 1.5M parameters is trained on the skills of `text.py` and on some prose of the standard
library, and stored in float16 (under 3 MB). Nothing is downloaded.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptune_dist.tiny.text import (
    SKILLS,
    collect_words,
    is_held_out,
    read_docstrings,
    render_line,
    render_unnamed_line,
    skill_rows,
)

EOS_ID = 0
PAD_ID = 1
MAX_BYTES = 48
NUM_CHUNKS = 3  # per training step, each padded by itself


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus <eos> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": EOS_ID, "<pad>": PAD_ID} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def build_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama model with random weights and 1.5M parameters: under 3 MB in float16."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=160,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )


def draw_lines(rng: random.Random, words: list[str], docstrings: list[str], num_lines: int) -> list[str]:
    """Random lines: 3/4 ask for a skill by name, 1/8 ask without a name, 1/8 are prose."""
    lines = []
    for _ in range(num_lines):
        kind = rng.random()
        if kind < 0.75:
            lines.append(render_line(rng, rng.choice(words), rng.choice(sorted(SKILLS))))
        elif kind < 0.875:
            lines.append(render_unnamed_line(rng, rng.choice(words)))
        else:
            text = " ".join(rng.choice(docstrings).split())
            start = rng.randrange(max(1, len(text) - MAX_BYTES))
            lines.append(text[start : start + MAX_BYTES])
    return lines


def encode_lines(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and labels [B, T] (-100 at padding); every line ends with <eos>."""
    rows = [tokenizer.encode(line)[:MAX_BYTES] + [EOS_ID] for line in lines]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    return ids, labels


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    words: list[str],
    docstrings: list[str],
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train with AdamW, warm-up, and a cosine schedule to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(seed)
    began = time.time()
    chunk_size = batch_size // NUM_CHUNKS
    model.train()
    for step in range(num_steps):
        progress = step / num_steps
        scale = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * scale
        lines = sorted(draw_lines(rng, words, docstrings, batch_size), key=len)  # so that chunks need little padding
        for first in range(0, batch_size, chunk_size):
            ids, labels = encode_lines(tokenizer, lines[first : first + chunk_size])
            loss = model(input_ids=ids, attention_mask=labels.ne(-100).long(), labels=labels).loss
            (loss / NUM_CHUNKS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}/{num_steps} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def score_skills(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> dict[str, float]:
    """Exact match of every skill on held-out words, asked for by name."""
    rng = random.Random(1)
    scores = {}
    tokenizer.padding_side = "left"
    for name in SKILLS:
        lines = [render_line(rng, word, name) for word in words]
        asks, answers = zip(*(line.rsplit("= ", 1) for line in lines), strict=True)
        batch = tokenizer([ask + "=" for ask in asks], return_tensors="pt", padding=True)
        # `generate` is declared for a protocol that no transformers model satisfies.
        out = model.generate(**batch, max_new_tokens=22, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        scores[name] = sum(text.strip() == answer for text, answer in zip(texts, answers, strict=True)) / len(words)
    tokenizer.padding_side = "right"
    return scores


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("configs/tiny"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument(
        "--skill", default="upper", choices=sorted(SKILLS), help="the skill that the quickstart's data teaches"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    docstrings = read_docstrings()
    words = collect_words(docstrings)
    held_out = [word for word in words if is_held_out(word)]
    rows = skill_rows(held_out, args.skill, args.seed)
    write_rows(args.out / "data" / "train.jsonl", rows[:512])
    write_rows(args.out / "data" / "validation.jsonl", rows[512:640])

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    train_base(
        model,
        tokenizer,
        [word for word in words if not is_held_out(word)],
        docstrings,
        num_steps=args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    model.half().save_pretrained(args.out / "causal")
    tokenizer.save_pretrained(args.out / "causal")
    print(json.dumps(score_skills(model.float(), tokenizer, held_out[:100]), indent=1))


if __name__ == "__main__":
    main()
