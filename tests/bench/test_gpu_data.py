"""Rows of the GPU benchmarks: mixed lengths, and rows that fill 4,096 tokens."""

from ptune_dist.base.source import load_shape, load_tokenizer
from ptune_dist.bench.data import count_tokens
from ptune_dist.bench.gpu_data import NUM_FULL_ROWS, build_full_rows
from ptune_dist.bench.shapes import TOKENIZER
from tests.processes import ROOT


def test_full_rows_have_nearly_4096_tokens_with_room_for_a_prompt():
    tokenizer = load_tokenizer(str(ROOT / TOKENIZER), load_shape(str(ROOT / TOKENIZER)))
    rows = [{"text": f"word {i} " * (50 + i % 40), "summary": f"summary {i}"} for i in range(80)]
    full = build_full_rows(rows, count_tokens(rows, tokenizer), seed=0)
    counts = count_tokens(full, tokenizer)
    assert len(full) == NUM_FULL_ROWS and min(counts) > 3800 and max(counts) <= 4096 - 20
    assert len({row["text"] for row in full}) == NUM_FULL_ROWS
    assert all(row["text"].startswith(f"word {row['summary'].split()[1]} ") for row in full)
