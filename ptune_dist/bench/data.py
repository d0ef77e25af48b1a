"""Benchmark rows and a tokenizer, made from the docstrings of the standard library without a download.

Rows: `python -m ptune_dist.bench.data rows --out DIR`. The task is realistic: read a docstring's body and write its
first paragraph. The median is about 230 tokens for long rows, 45 for short and 30 for brief ones. The spread of
lengths, on which padding and grouping by length depend, is that of the docstrings.

Tokenizer: `python -m ptune_dist.bench.data tokenizer --out configs/shapes/llama_40m` made the committed one.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ptune_dist.tiny.text import read_docstrings

SHAPE = Path("configs/shapes/llama_40m")
# Minimum and maximum tokens of input and target, chosen so that the medians are about 230, 45 and 30.
LENGTHS = {"long": (160, 480), "short": (25, 76), "brief": (16, 42)}
TERSE = "terse"  # the long rows whose input has at least so many times the tokens of the target
TERSE_RATIO = 10
NUM_ROWS = 160
NUM_CHECK_ROWS = 8
VOCABULARY_SIZE = 4096


def split_docstring(text: str) -> dict[str, str] | None:
    """{text: all but the first paragraph, summary: the first paragraph}, or None if there is only one."""
    summary, _, body = text.partition("\n\n")
    row = {"text": body.strip(), "summary": " ".join(summary.split())}
    return row if row["text"] and row["summary"] else None


def select_rows(
    rows: list[dict[str, str]], lengths: list[int], bounds: tuple[int, int], num: int, seed: int
) -> list[dict[str, str]]:
    """A random `num` rows with lengths within `bounds` and no text twice."""
    fitting = {row["text"]: row for row, length in zip(rows, lengths, strict=True) if bounds[0] <= length <= bounds[1]}
    return random.Random(seed).sample(list(fitting.values()), num)


def count_tokens(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens of each row's input and target, with the target's end token."""
    texts = [f"{row['text']}\nSummary: {row['summary']}" for row in rows]
    return [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def select_terse(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The rows whose input has at least TERSE_RATIO times the tokens of the target, its end token included."""
    inputs = tokenizer([f"{row['text']}\nSummary:" for row in rows], add_special_tokens=False)["input_ids"]
    targets = tokenizer([f" {row['summary']}" for row in rows], add_special_tokens=False)["input_ids"]
    pairs = zip(rows, inputs, targets, strict=True)
    return [row for row, read, written in pairs if len(read) >= TERSE_RATIO * (len(written) + 1)]


def write_rows(out: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, dict[str, int]]:
    """Write {long,short,brief,terse}.jsonl, and the first rows of each as {...}_check.jsonl; returns counts by file."""
    rows = [row for row in map(split_docstring, read_docstrings()) if row]
    lengths = count_tokens(rows, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    by_name = {name: select_rows(rows, lengths, bounds, NUM_ROWS, seed) for name, bounds in LENGTHS.items()}
    by_name[TERSE] = select_terse(by_name["long"], tokenizer)
    for name, chosen in by_name.items():
        for file, part in ((f"{name}.jsonl", chosen), (f"{name}_check.jsonl", chosen[:NUM_CHECK_ROWS])):
            (out / file).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            counts = count_tokens(part, tokenizer)
            found[file] = {"rows": len(part), "median": int(np.median(counts)), "max": max(counts)}
    return found


def build_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the docstrings: about 3.6 characters per token, like real tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_docstrings(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "tokenizer"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", default=SHAPE, help="folder of the tokenizer that counts tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "tokenizer":
        build_tokenizer(VOCABULARY_SIZE).save_pretrained(args.out)
        return
    found = write_rows(args.out, AutoTokenizer.from_pretrained(args.tokenizer), args.seed)
    for file, counts in found.items():
        print(f"{args.out / file}: {counts['rows']} rows, tokens median {counts['median']}, most {counts['max']}")


if __name__ == "__main__":
    main()
