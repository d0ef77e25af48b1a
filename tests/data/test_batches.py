"""Which examples a step reads, how they are split over ranks, and what a micro-batch contains."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from ptune_dist.data.batches import Unit, collate, join_readers, pad_rows, plan_micro_batches, step_examples
from ptune_dist.data.examples import Examples

LENGTHS = np.random.default_rng(0).integers(1, 60, 64)
WIDTHS = np.random.default_rng(1).integers(1, 60, (64, 2))  # of inputs and targets


def padded(units: list[Unit]) -> int:
    """Positions of inputs and targets, each padded to the longest, with a row for each reader."""
    if not units:
        return 0
    return sum(len(members) for _, members in units) * int(WIDTHS[[i for i, _ in units]].max(axis=0).sum())


def shared(units: list[Unit]) -> int:
    """Positions without padding, plus 20 virtual tokens for each member."""
    read = sum(int(LENGTHS[i]) * len(members) for i, members in units)
    return read + 20 * len({member for _, members in units for member in members})


COSTS = {"padded": padded, "shared": shared}


def alone(examples) -> list[Unit]:
    return [(int(i), (0,)) for i in examples]


def flatten(plan) -> list[Unit]:
    return [unit for shares in plan for share in shares for unit in share]


def readers_of(units: list[Unit]) -> Counter:
    return Counter((example, member) for example, members in units for member in members)


def random_units(num_examples: int, num_members: int) -> list[Unit]:
    """Examples with one to all of the members."""
    chosen = np.random.default_rng(num_examples)
    members = [tuple(range(int(chosen.integers(1, num_members + 1)))) for _ in range(num_examples)]
    return list(zip(chosen.permutation(len(LENGTHS))[:num_examples].tolist(), members, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batch_tokens", [1, 70, 300, 100_000])
@pytest.mark.parametrize("num_examples", [1, 2, 5, 32])
@pytest.mark.parametrize("num_members", [1, 5])
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("work", [None, shared], ids=["any rank", "owners"])
def test_a_plan_holds_every_reader_once_within_the_budget_and_as_many_micro_batches_for_every_rank(
    world_size, micro_batch_tokens, num_examples, num_members, cost, work
):
    units = random_units(num_examples, num_members)
    plan = plan_micro_batches(units, cost, world_size=world_size, micro_batch_tokens=micro_batch_tokens, work=work)
    assert readers_of(flatten(plan)) == readers_of(units)
    assert {len(shares) for shares in plan} == {world_size}
    for share in (share for shares in plan for share in shares if readers_of(share).total() > 1):
        assert cost(share) <= micro_batch_tokens  # one reader's row alone may be longer


def test_an_example_that_a_step_takes_twice_is_planned_twice():
    plan = plan_micro_batches(alone([3, 3, 5]), padded, world_size=2, micro_batch_tokens=10_000)
    assert Counter(flatten(plan)) == Counter(alone([3, 3, 5]))


def ten_each(units: list[Unit]) -> int:
    return 10 * sum(len(members) for _, members in units)


def test_a_plan_is_no_longer_than_the_budget_makes_it():
    plan = plan_micro_batches(alone(range(32)), ten_each, world_size=2, micro_batch_tokens=80)
    assert [[len(share) for share in shares] for shares in plan] == [[8, 8], [8, 8]]


def test_what_the_rows_of_a_micro_batch_share_makes_room_for_more_of_them():
    def cost(units):  # 100 virtual tokens that occur once
        return 100 * bool(units) + ten_each(units)

    plan = plan_micro_batches(alone(range(32)), cost, world_size=1, micro_batch_tokens=260)
    assert [[len(share) for share in shares] for shares in plan] == [[16], [16]]


def test_no_rank_idles_while_another_has_rows_to_spare():
    plan = plan_micro_batches(alone(range(8)), ten_each, world_size=4, micro_batch_tokens=100_000)
    assert [sorted(len(share) for share in shares) for shares in plan] == [[2, 2, 2, 2]]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_have_similar_work_to_one_row_in_every_micro_batch_and_to_a_third_where_examples_have_owners(world_size):
    for work in (None, shared):
        plan = plan_micro_batches(alone(range(64)), shared, world_size=world_size, micro_batch_tokens=500, work=work)
        assert len(plan) > 1
        for shares in plan:
            loads = [sum(shared([unit]) for unit in share) for share in shares]
            largest = max(shared([unit]) for share in shares for unit in share)
            even = sum(loads) / world_size
            assert max(loads) <= max(min(loads) + largest, 1.3 * even if work else 0)


def test_with_fewer_rows_than_ranks_some_ranks_idle():
    plan = plan_micro_batches(alone([4, 9]), padded, world_size=4, micro_batch_tokens=1000)
    assert [sorted(len(share) for share in shares) for shares in plan] == [[0, 0, 1, 1]]


def test_no_examples_are_no_micro_batches():
    assert plan_micro_batches([], padded, world_size=2, micro_batch_tokens=10) == []


def test_an_example_goes_to_its_owner_unless_that_rank_has_much_more_work():
    owned = plan_micro_batches(alone(range(8)), ten_each, world_size=4, micro_batch_tokens=100_000, work=ten_each)
    assert [[sorted(i for i, _ in share) for share in shares] for shares in owned] == [[[0, 4], [1, 5], [2, 6], [3, 7]]]
    evens = plan_micro_batches(  # all of rank 0
        alone(range(0, 40, 2)), ten_each, world_size=2, micro_batch_tokens=100_000, work=ten_each
    )
    assert [[len(share) for share in shares] for shares in evens] == [[13, 7]]


def test_an_owner_keeps_its_examples_except_the_same_few():
    num_all = 0
    moved = Counter()
    for seed in range(100):
        chosen = np.random.default_rng(seed).permutation(64)[:32]
        plan = plan_micro_batches(alone(chosen), shared, world_size=2, micro_batch_tokens=1000, work=shared)
        for shares in plan:
            moved.update(i for rank, share in enumerate(shares) for i, _ in share if i % 2 != rank)
            num_all += sum(map(len, shares))
    assert 0 < moved.total() < 0.1 * num_all
    assert sum(n for _, n in moved.most_common(16)) > 0.9 * moved.total()  # a quarter of the 64


def test_a_unit_is_split_only_where_its_members_are_too_many_and_then_into_as_few_parts_as_fit():
    units = [(0, (0, 1, 2, 3, 4)), (1, (0, 1)), (2, (3,))]
    whole = plan_micro_batches(units, ten_each, world_size=1, micro_batch_tokens=50)
    assert Counter(flatten(whole)) == Counter(units)
    split = plan_micro_batches(units, ten_each, world_size=1, micro_batch_tokens=30)
    assert Counter(flatten(split)) == Counter([(0, (0, 1, 2)), (0, (3, 4)), *units[1:]])
    apart = plan_micro_batches(units, ten_each, world_size=1, micro_batch_tokens=1)
    assert all(len(members) == 1 for _, members in flatten(apart))


def test_ranks_have_even_work_though_a_unit_of_many_members_is_large():
    members = tuple(range(8))
    units = [(example, members) for example in range(7)]
    plan = plan_micro_batches(  # two units in each
        units, ten_each, world_size=2, micro_batch_tokens=170, members_share=False
    )
    loads = [[ten_each(share) for share in shares] for shares in plan]
    assert sum(max(each) for each in loads) <= 1.1 * 560 / 2
    assert readers_of(flatten(plan)) == readers_of(units)
    sharing = plan_micro_batches(units, ten_each, world_size=2, micro_batch_tokens=170)
    assert set(flatten(sharing)) == set(units)


def test_members_that_read_one_example_read_it_together_and_one_that_meets_it_twice_reads_it_twice():
    readers = [(7, 0), (3, 0), (7, 1), (3, 0), (7, 0), (5, 1)]
    units = join_readers(readers)
    assert sorted(units) == [(3, (0,)), (3, (0,)), (5, (1,)), (7, (0,)), (7, (0, 1))]
    assert join_readers([]) == []


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
    assert [take(9), take(2)] == later_first  # a resumed run only asks for its own step
    assert take(2, seed=1) != take(2)
    # The examples of a step do not depend on the ranks, which only distribute them.
    dealt = [
        flatten(plan_micro_batches(alone(take(2)), ten_each, world_size=n, micro_batch_tokens=200)) for n in (1, 2, 4)
    ]
    assert sorted(dealt[0]) == sorted(dealt[1]) == sorted(dealt[2]) == alone(sorted(take(2)))


@pytest.fixture
def examples() -> Examples:
    """Four examples: input [1 2 3] target [4 5], input [6] target [7], no input and target [8 9 10], and input
    [11 12 13] target [14] of which [11 12] is context."""
    return Examples(
        np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], np.int32),
        np.array([0, 5, 7, 10, 14]),
        np.array([2, 1, 3, 1], np.int32),
        0,
        str,
        np.array([0, 0, 0, 2], np.int32),
    )


def lists(rows) -> list[list[int]]:
    return [row.tolist() for row in rows]


def test_a_micro_batch_holds_the_three_parts_of_each_row_in_the_order_of_its_units(examples):
    batch = collate(examples, [alone([1, 0, 3, 2])], 0, pad_id=99)
    assert lists(batch.contexts) == [[], [], [11, 12], []]
    assert lists(batch.rests) == [[6], [1, 2, 3], [13], []]
    assert lists(batch.targets) == [[7], [4, 5], [14], [8, 9, 10]]
    assert (batch.pad_id, batch.held) == (99, None)


def test_a_row_is_there_once_however_many_members_read_it(examples):
    batch = collate(examples, [[(1, (0, 2)), (0, (1,)), (1, (0,))]], 0, pad_id=99)
    assert lists(batch.rests) == [[6], [1, 2, 3], [6]]
    assert batch.readers == [(0, 0), (0, 2), (1, 1), (2, 0)]


def test_an_idle_rank_reads_one_padding_token_and_has_nothing_to_predict(examples):
    idle = collate(examples, [[]], 0, pad_id=99)  # a context, so that it reads contexts with the other ranks
    # A text's last token is not read.
    assert (lists(idle.contexts), lists(idle.rests), lists(idle.targets)) == ([[99]], [[99, 99]], [[]])
    without_contexts = dataclasses.replace(examples, num_context=np.zeros(4, np.int32))
    idle = collate(without_contexts, [[]], 0, pad_id=99)
    assert (lists(idle.contexts), lists(idle.rests), lists(idle.targets)) == ([[]], [[99, 99]], [[]])
    assert idle.readers == [(0, 0)]


def test_rows_are_padded_on_the_right_to_the_longest_and_to_one_position_at_least():
    ids, mask = pad_rows([np.array([6]), np.array([1, 2, 3]), np.array([], int)], 99)
    assert ids.tolist() == [[6, 99, 99], [1, 2, 3], [99, 99, 99]]
    assert mask.tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    assert (ids.dtype, mask.dtype) == (np.int64, bool)
    ids, mask = pad_rows([np.array([], int)], 99)
    assert (ids.tolist(), mask.tolist()) == ([[99]], [[False]])
