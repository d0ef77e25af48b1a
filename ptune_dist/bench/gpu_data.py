"""The rows of the GPU benchmarks: those of `data`, and two more kinds of them.

    python -m ptune_dist.bench.gpu_data --out DIR

Mixed rows are the long and the short ones together. Full rows have nearly 4,096 tokens, the length at which trainers
are often compared: the bodies of many docstrings, and the first paragraph of one.
"""

import argparse
import json
import random
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptune_dist.bench.data import count_tokens, write_rows
from ptune_dist.bench.shapes import TOKENIZER

NUM_FULL_ROWS = 24
FULL_TOKENS = 4096 - 40  # leaves room for virtual tokens and for tokens that joining makes


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_full_rows(rows: list[dict[str, str]], lengths: list[int], seed: int) -> list[dict[str, str]]:
    """Rows of nearly FULL_TOKENS tokens: bodies of rows in a random order, as many as fit, to summarize the first."""
    chooser = random.Random(seed)
    full = []
    for _ in range(NUM_FULL_ROWS):
        bodies: list[str] = []
        used = 0
        order = chooser.sample(range(len(rows)), len(rows))
        for i in order:
            if used + lengths[i] <= FULL_TOKENS:
                bodies.append(rows[i]["text"])
                used += lengths[i]
        full.append({"text": "\n\n".join(bodies), "summary": rows[order[0]]["summary"]})
    return full


def write_gpu_rows(out: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Write the files of `data.write_rows`, mixed.jsonl and full.jsonl."""
    write_rows(out, tokenizer, seed)
    mixed = read_rows(out / "long.jsonl") + read_rows(out / "short.jsonl")
    full = build_full_rows(mixed, count_tokens(mixed, tokenizer), seed)
    for name, rows in (("mixed", mixed), ("full", full)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_gpu_rows(args.out, AutoTokenizer.from_pretrained(TOKENIZER), seed=0)


if __name__ == "__main__":
    main()
