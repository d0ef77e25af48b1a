"""What `validate` says of placements: arithmetic on token counts that can be checked by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from ptune_dist.config import load_config
from ptune_dist.data.encode import Examples
from ptune_dist.placements import (
    context_bytes_per_token,
    count_context_tokens,
    describe_cache,
    describe_choice,
    placement_costs,
)
from tests.conftest import tiny_shape, write_config


def examples_of(*rows: tuple[list[int], list[int]], all_context: bool = True) -> Examples:
    """Examples of (input, target) token ids."""
    ids = [np.array([*before, *after], np.int32) for before, after in rows]
    return Examples(
        np.concatenate(ids), np.concatenate([[0], np.cumsum([len(row) for row in ids])]),
        np.array([len(after) for _, after in rows], np.int32), False, str,
        np.array([len(before) if all_context else 0 for before, _ in rows], np.int32),
    )  # fmt: skip


ROWS = [([5] * 100, [6] * 11), ([7] * 60, [6] * 5), ([5] * 100, [8] * 11)]


def test_costs_are_passes_over_tokens_forward_and_back():
    costs = placement_costs(examples_of(*ROWS), num_virtual=10)
    inputs, targets = 260 / 3, 27 / 3
    assert costs["prefix"] == pytest.approx(2 * (inputs + targets - 1))
    assert costs["infix"] == pytest.approx(inputs + 2 * (10 + targets - 1))
    assert costs["infix, contexts cached"] == pytest.approx(2 * (10 + targets - 1))


def test_a_context_that_several_rows_have_is_counted_once():
    assert count_context_tokens(examples_of(*ROWS), all_of_input=False) == 160
    assert count_context_tokens(examples_of(*ROWS, all_context=False), all_of_input=False) == 0
    assert count_context_tokens(examples_of(*ROWS, all_context=False), all_of_input=True) == 160


@pytest.mark.parametrize(
    ("kind", "family", "dtype", "expected"),
    [
        ("llama", "causal", torch.float32, 2 * 2 * 2 * 8 * 4),  # 2 layers, 2 of 4 heads for keys, 8 wide
        ("gpt2", "causal", torch.bfloat16, 2 * 2 * 4 * 8 * 2),
        ("t5", "seq2seq", torch.float32, 32 * 4),
    ],
)
def test_a_context_token_takes_the_bytes_of_its_keys_and_values(kind, family, dtype, expected):
    assert context_bytes_per_token(AutoConfig.for_model(kind, **tiny_shape(kind)), family, dtype) == expected


def test_the_cache_is_described_by_what_fits(tmp_path):
    file = write_config(
        tmp_path / "config.json", prompt={"placement": "infix"}, train={"context_cache_gib": 160 * 256 / 2 / 2**30}
    )
    shape = AutoConfig.for_model("llama", **tiny_shape("llama"))
    text = describe_cache(examples_of(*ROWS), load_config(file), shape, "causal")
    assert "160 distinct tokens" in text and "50% fit" in text and f"{20 * 8 / 3:.1f} times" in text


def test_the_cost_in_quality_is_told_for_either_choice():
    assert "quality" in describe_choice("prefix") and "quality" in describe_choice("infix")
