"""Plain text in blocks, and token statistics."""

import pytest

from ptune_dist.data import encode
from ptune_dist.data.encode import encode_text_blocks
from ptune_dist.data.examples import token_statistics
from ptune_dist.data.sources import Rows, load_rows
from tests.data.texts import compile_pair, encode_rows, texts_of, tokenizer_with


def load_text(tmp_path, text: str) -> Rows:
    path = tmp_path / "a.txt"
    path.write_text(text)
    return load_rows(str(path), key="data.train", default_split="train")


@pytest.mark.parametrize("chunk_characters", [1 << 20, 1])
def test_text_is_cut_into_blocks_of_which_the_last_may_be_short(tmp_path, monkeypatch, chunk_characters):
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", chunk_characters)
    monkeypatch.setattr(encode, "BATCH_ROWS", 2)
    text = "one\n\ntwo three\nfour\nfive"
    tokenizer = tokenizer_with("<bos> $A <sep>")
    examples = encode_text_blocks(load_text(tmp_path, text), tokenizer, max_length=7)
    assert examples.lengths.tolist() == [7, 7, 7, 3]
    assert examples.num_targets.tolist() == [7, 7, 7, 3]
    assert "".join(target for _, target in texts_of(tokenizer, examples)) == text
    assert all(len(examples.input_ids(i)) == 0 for i in range(4))
    assert examples.num_truncated == 0
    assert examples.where(3) == f"{tmp_path}/a.txt block 4 (the first is block 1)"


def test_text_of_a_whole_number_of_blocks_has_no_empty_one(tmp_path):
    examples = encode_text_blocks(load_text(tmp_path, "abcdef"), tokenizer_with(), max_length=3)
    assert examples.lengths.tolist() == [3, 3]


def test_statistics_of_tokens(write):
    rows = write(*[("x" * i, "y" * (i % 3 + 1)) for i in range(10)])
    examples = encode_rows(rows, tokenizer_with(), **compile_pair(), max_length=10, append_eos=False)
    statistics = token_statistics(examples)
    assert statistics == {
        "num_examples": 10,
        "input_tokens": {"p50": 4, "p90": 7, "max": 9, "total": 44},
        "target_tokens": {"p50": 2, "p90": 3, "max": 3, "total": 19},
        "num_truncated": 1,
        "truncated_share": 0.1,
        "context_tokens": {"p50": 0, "p90": 0, "max": 0, "total": 0},
        "num_distinct_contexts": 0,
        "shared_context_tokens": 0,
    }
