"""The costs of placements that `validate` prints: arithmetic on token counts that can be checked by hand."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from ptune_dist.config.load import load_config
from ptune_dist.data.examples import Examples
from ptune_dist.evaluation.placement_costs import (
    count_context_tokens,
    describe_cache,
    describe_choice,
    placement_costs,
)
from ptune_dist.families import FAMILIES
from tests.conftest import tiny_shape, write_config
from tests.numerics.passes import LATENT, WIDE


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
    for has_lead in (True, False):
        count = functools.partial(count_context_tokens, has_lead=has_lead)
        assert count(examples_of(*ROWS), all_of_input=False) == 160
        assert count(examples_of(*ROWS, all_context=False), all_of_input=False) == 0
        assert count(examples_of(*ROWS, all_context=False), all_of_input=True) == 160


def test_what_all_contexts_begin_with_is_held_once_per_job_and_not_in_the_cache():
    rows = examples_of(([9] * 30 + [5] * 10, [6]), ([9] * 30 + [7] * 20, [6]))
    assert count_context_tokens(rows, all_of_input=False, has_lead=True) == 30
    assert count_context_tokens(rows, all_of_input=False, has_lead=False) == 90
    costs = placement_costs(rows, 4, with_template=True)
    assert costs["infix"] == costs["template"] == 15 + 2 * 4  # 30 shared, 10 and 20 of their own


def test_members_share_a_context_and_a_shared_instruction_shares_virtual_tokens():
    costs = {k: placement_costs(examples_of(*ROWS), 10, num_members=k) for k in (1, 8)}
    contexts = {k: found["infix"] - found["infix, contexts cached"] for k, found in costs.items()}
    assert contexts[8] == pytest.approx(contexts[1] / 8)
    instruction = examples_of(([9] * 30 + [5] * 10, [6]), ([9] * 30 + [7] * 20, [6]))
    split = dataclasses.replace(instruction, num_context=np.array([30, 30], np.int32))
    assert placement_costs(split, 4, with_template=True)["template"] == 2 * 15


@pytest.mark.parametrize(
    ("kind", "family", "dtype", "expected"),
    [
        ("llama", "causal", torch.float32, 2 * 2 * 2 * 8 * 4),  # 2 layers, 2 of 4 heads for keys, 8 wide
        ("gpt2", "causal", torch.bfloat16, 2 * 2 * 4 * 8 * 2),
        ("t5", "seq2seq", torch.float32, 32 * 4),
    ],
)
def test_a_context_token_takes_the_bytes_of_its_keys_and_values(kind, family, dtype, expected):
    shape = AutoConfig.for_model(kind, **tiny_shape(kind))
    assert FAMILIES[family].context_bytes_per_token(shape, dtype) == expected


def test_keys_and_values_made_of_one_latent_have_widths_of_their_own():
    shape = AutoConfig.for_model("deepseek_v3", **(WIDE | LATENT))
    assert FAMILIES["causal"].context_bytes_per_token(shape, torch.float32) == 2 * 6 * (12 + 10) * 4


def test_the_cache_is_described_by_what_fits(tmp_path):
    file = write_config(
        tmp_path / "config.json", prompt={"placement": "infix"}, train={"context_cache_gib": 160 * 256 / 2 / 2**30}
    )
    shape = AutoConfig.for_model("llama", **tiny_shape("llama"))
    text = describe_cache(examples_of(*ROWS), load_config(file), shape, FAMILIES["causal"])
    assert "160 distinct tokens" in text and "50% fit in" in text and f"{20 * 8 / 3:.1f} times" in text


def test_of_a_late_prompt_the_cache_holds_a_vector_of_each_token(tmp_path):
    examples = examples_of(*ROWS)
    num_tokens = sum(int(length) for length in examples.lengths_of(range(len(examples)))) - len(examples)
    gib = num_tokens * 32 * 4 / 2 / 2**30
    file = write_config(tmp_path / "c.json", prompt={"method": "late_prompt"}, train={"context_cache_gib": gib})
    shape = AutoConfig.for_model("llama", **tiny_shape("llama"))
    text = describe_cache(examples, load_config(file), shape, FAMILIES["causal"])
    assert f"the layers below the prompt leave them, have {num_tokens} distinct tokens" in text and "50% fit in" in text


def test_the_cost_in_quality_is_told_for_either_choice():
    assert "quality" in describe_choice("prefix") and "quality" in describe_choice("infix")
