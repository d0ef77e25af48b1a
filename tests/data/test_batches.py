"""Which examples a step takes, how they are shared among ranks, and how a micro-batch is laid out."""

from collections import Counter

import numpy as np
import pytest
import torch

from ptune_dist.data.batches import collate, plan_micro_batches, step_examples
from ptune_dist.data.encode import Examples

LENGTHS = np.random.default_rng(0).integers(1, 60, 64)
WIDTHS = np.random.default_rng(1).integers(1, 60, (64, 2))  # of inputs and targets


def flatten(plan) -> list[int]:
    return [i for groups in plan for group in groups for i in group]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batch_tokens", [1, 70, 300, 100_000])
@pytest.mark.parametrize("num_examples", [1, 2, 5, 32])
@pytest.mark.parametrize("extra_tokens", [0, 10])
@pytest.mark.parametrize("widths", [LENGTHS, WIDTHS], ids=["one text", "apart"])
def test_a_plan_holds_every_example_once_within_the_budget_and_as_many_micro_batches_for_every_rank(
    world_size, micro_batch_tokens, num_examples, extra_tokens, widths
):
    examples = [int(i) for i in np.random.default_rng(num_examples).permutation(len(LENGTHS))[:num_examples]]
    plan = plan_micro_batches(
        examples, widths, world_size=world_size, micro_batch_tokens=micro_batch_tokens, extra_tokens=extra_tokens
    )
    assert sorted(flatten(plan)) == sorted(examples)
    assert {len(groups) for groups in plan} == {world_size}
    for group in (group for groups in plan for group in groups if len(group) > 1):  # one row alone may be longer
        padded = widths[group].max(axis=0).sum()  # inputs to the longest input, targets to the longest target
        assert len(group) * (padded + extra_tokens) <= micro_batch_tokens


def test_an_example_that_a_step_takes_twice_is_planned_twice():
    plan = plan_micro_batches([3, 3, 5], LENGTHS, world_size=2, micro_batch_tokens=10_000)
    assert Counter(flatten(plan)) == Counter([3, 3, 5])


def test_a_plan_is_no_longer_than_the_budget_makes_it():
    lengths = np.full(32, 10)
    plan = plan_micro_batches(range(32), lengths, world_size=2, micro_batch_tokens=80)
    assert [[len(group) for group in groups] for groups in plan] == [[8, 8], [8, 8]]


def test_no_rank_idles_while_another_has_rows_to_spare():
    plan = plan_micro_batches(range(8), np.full(8, 10), world_size=4, micro_batch_tokens=100_000)
    assert [sorted(len(group) for group in groups) for groups in plan] == [[2, 2, 2, 2]]


def test_with_fewer_rows_than_ranks_some_ranks_idle():
    plan = plan_micro_batches([4, 9], LENGTHS, world_size=4, micro_batch_tokens=1000)
    assert [sorted(len(group) for group in groups) for groups in plan] == [[0, 0, 1, 1]]


def test_no_examples_are_no_micro_batches():
    assert plan_micro_batches([], LENGTHS, world_size=2, micro_batch_tokens=10) == []


@pytest.mark.parametrize("batch_size, num_examples", [(8, 24), (8, 20), (7, 30), (32, 10), (1, 3)])
def test_epochs_follow_one_another_without_a_gap_or_a_repeat(batch_size, num_examples):
    num_epochs = 5
    stream = []
    for step in range(1, num_epochs * num_examples // batch_size + 2):
        taken = step_examples(step, batch_size=batch_size, num_examples=num_examples, seed=3)
        assert len(taken) == batch_size
        stream += taken
    epochs = [stream[e * num_examples : (e + 1) * num_examples] for e in range(num_epochs)]
    assert all(sorted(epoch) == list(range(num_examples)) for epoch in epochs)
    if num_examples >= 10:
        assert len({tuple(epoch) for epoch in epochs}) == num_epochs  # each epoch has an order of its own


def test_the_order_depends_on_the_seed_and_the_step_alone():
    def take(step, seed=0):
        return step_examples(step, batch_size=16, num_examples=100, seed=seed)

    later_first = [take(9), take(2)]
    assert [take(9), take(2)] == later_first  # a resumed run asks for its step only
    assert take(2, seed=1) != take(2)
    # The examples of a step are chosen before any rank is known; ranks only share them out.
    shared = [
        flatten(plan_micro_batches(take(2), LENGTHS.repeat(2), world_size=n, micro_batch_tokens=200)) for n in (1, 2, 4)
    ]
    assert sorted(shared[0]) == sorted(shared[1]) == sorted(shared[2]) == sorted(take(2))


@pytest.fixture
def examples() -> Examples:
    """Three examples: input [1 2 3] target [4 5], input [6] target [7], no input and target [8 9 10]."""
    return Examples(
        np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], np.int32),
        np.array([0, 5, 7, 10]),
        np.array([2, 1, 3], np.int32),
        0,
        str,
    )


def test_a_micro_batch_is_padded_on_the_right_and_asks_for_the_targets_only(examples):
    batch = collate(examples, [1, 0, 2], pad_id=99)
    assert batch.input_ids.tolist() == [[6, 7, 99, 99, 99], [1, 2, 3, 4, 5], [8, 9, 10, 99, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.target_mask.long().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.target_ids[batch.target_mask].tolist() == [7, 4, 5, 8, 9, 10]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.int64)
    assert batch.target_mask.dtype == torch.bool


def test_a_micro_batch_is_as_wide_as_its_longest_row(examples):
    assert collate(examples, [1], pad_id=99).input_ids.tolist() == [[6, 7]]


def test_inputs_and_targets_that_are_read_apart_are_padded_apart(examples):
    batch = collate(examples, [1, 0], pad_id=99, apart=True)
    assert batch.input_ids.tolist() == [[6, 99, 99], [1, 2, 3]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.target_ids.tolist() == [[7, 99], [4, 5]]
    assert batch.target_mask.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("apart", [False, True])
def test_an_idle_rank_gets_one_padding_token_and_nothing_to_predict(examples, apart):
    batch = collate(examples, [], pad_id=99, apart=apart)
    assert (batch.input_ids.tolist(), batch.attention_mask.tolist()) == ([[99]], [[0]])
    assert not batch.target_mask.any()
