"""Benchmark rows: docstrings with the lengths that their names promise, and the same every time."""

import json

import numpy as np
import pytest

from ptune_dist.base.source import load_shape, load_tokenizer
from ptune_dist.bench.data import LENGTHS, SHAPE, build_tokenizer, count_tokens, split_docstring, write_rows
from tests.processes import ROOT


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / SHAPE), load_shape(str(ROOT / SHAPE)))


def read_rows(path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """The folder of the rows, and what was found in them."""
    folder = tmp_path_factory.mktemp("rows")
    return folder, write_rows(folder, tokenizer, seed=3)


@pytest.mark.extended
def test_rows_have_the_median_lengths_of_their_names_and_no_row_is_repeated(written, tokenizer):
    folder, found = written
    for name, median in (("long", 230), ("short", 45), ("brief", 30)):
        rows = read_rows(folder / f"{name}.jsonl")
        counts = count_tokens(rows, tokenizer)
        assert abs(np.median(counts) - median) <= 0.1 * median
        assert LENGTHS[name][0] <= min(counts) and max(counts) <= LENGTHS[name][1]
        assert len({row["text"] for row in rows}) == len(rows) == found[f"{name}.jsonl"]["rows"]
        assert read_rows(folder / f"{name}_check.jsonl") == rows[:8]


def test_terse_rows_are_the_long_ones_with_a_tenth_of_the_input_as_target_at_most(written, tokenizer):
    folder, _ = written
    terse = read_rows(folder / "terse.jsonl")
    ratios = {}
    for row in read_rows(folder / "long.jsonl"):
        read = len(tokenizer(f"{row['text']}\nSummary:")["input_ids"])
        ratios[row["text"]] = read / (len(tokenizer(f" {row['summary']}")["input_ids"]) + 1)
    assert [row["text"] for row in terse] == [text for text, ratio in ratios.items() if ratio >= 10]
    assert 0 < len(terse) < len(ratios)


@pytest.mark.extended
def test_rows_are_the_same_every_time(tmp_path, written, tokenizer):
    write_rows(tmp_path, tokenizer, seed=3)
    assert len(list(tmp_path.iterdir())) >= 4
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (written[0] / path.name).read_bytes()


def test_a_docstring_is_split_into_its_body_and_its_first_paragraph():
    assert split_docstring("Do it\nnow.\n\nHow it is done.\n\nMore.") == {
        "text": "How it is done.\n\nMore.",
        "summary": "Do it now.",
    }
    assert split_docstring("One paragraph.") is None


@pytest.mark.extended
def test_the_tokenizer_command_makes_about_as_many_tokens_as_the_shipped_tokenizer(tokenizer):
    # Not the same merges: the docstrings change with the Python version.
    text = split_docstring(json.loads.__doc__)["text"]
    made = build_tokenizer(len(tokenizer))
    assert len(made) == len(tokenizer)
    assert abs(len(made.encode(text)) - len(tokenizer.encode(text))) <= 0.1 * len(tokenizer.encode(text))
