"""Members of a unit move to another rank where that evens out the ranks' work by more than it costs."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ptune_dist.data.batches import plan_micro_batches
from ptune_dist.data.dealing import EVEN_ENOUGH, Unit, even_out
from tests.data.test_batches import flatten, readers_of

MEMBERS = tuple(range(8))


def flops_of(once: dict[int, int], each: dict[int, int]):
    """What a unit costs a rank: once for all of its members, and for each of them."""
    return lambda unit: once[unit[0]] + each[unit[0]] * len(unit[1])


@st.composite
def steps(draw) -> tuple[list[Unit], dict[int, int], dict[int, int]]:
    """Units of a step, a few of them of one example, and what their examples cost."""
    chosen = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 6)), max_size=10))
    units = [(example, tuple(range(num_members))) for example, num_members in chosen]
    sizes = st.lists(st.integers(1, 50), min_size=8, max_size=8)
    return units, dict(enumerate(draw(sizes))), dict(enumerate(draw(sizes)))


@given(steps(), st.integers(1, 4), st.data())
def test_a_move_never_makes_the_busiest_rank_busier_and_loses_no_reader(step, world_size, data):
    units, once, each = step
    flops = flops_of(once, each)
    shares: list[list[Unit]] = [[] for _ in range(world_size)]
    for unit in units:
        shares[data.draw(st.integers(0, world_size - 1))].append(unit)
    before = max(sum(map(flops, share)) for share in shares)
    even_out(shares, flops)
    loads = [sum(map(flops, share)) for share in shares]
    assert max(loads) <= before
    assert readers_of([unit for share in shares for unit in share]) == readers_of(units)
    busiest, idlest = loads.index(max(loads)), loads.index(min(loads))
    if loads[busiest] * world_size > EVEN_ENOUGH * sum(loads):  # then a whole unit would have moved if it could
        assert all(loads[idlest] + flops(unit) >= loads[busiest] for unit in shares[busiest])


@given(steps(), st.integers(1, 4), st.integers(1, 300))
def test_a_plan_holds_every_reader_once_within_the_budget(step, world_size, micro_batch_tokens):
    units, once, each = step

    def cost(some: list[Unit]) -> int:
        return sum(each[example] * len(members) for example, members in some) + 3 * len({m for _, s in some for m in s})

    plan = plan_micro_batches(
        units, cost, world_size=world_size, micro_batch_tokens=micro_batch_tokens, flops=flops_of(once, each)
    )
    assert readers_of(flatten(plan)) == readers_of(units)
    assert {len(shares) for shares in plan} <= {world_size}
    assert all(any(shares) for shares in plan)
    for share in (share for shares in plan for share in shares if len(share) > 1):
        assert cost(share) <= micro_batch_tokens


def test_ranks_that_share_rows_of_many_members_have_even_work():
    lengths = [160, 180, 190, 210, 230, 260, 300, 410]
    units = [(example, MEMBERS) for example in range(8)]
    once = {example: 6 * length for example, length in enumerate(lengths)}
    each = {example: 5 * length for example, length in enumerate(lengths)}
    flops = flops_of(once, each)

    def cost(some: list[Unit]) -> int:
        return sum(lengths[example] * len(members) for example, members in some)

    least = sum(map(flops, units))
    for budget in (8192, 4096):
        plan = plan_micro_batches(units, cost, world_size=2, micro_batch_tokens=budget, flops=flops)
        busiest = sum(max(sum(map(flops, share)) for share in shares) for shares in plan)
        assert busiest <= 1.05 * least / 2
        assert len(flatten(plan)) <= 8 + len(plan)  # few rows are read by two ranks


def test_a_row_stays_on_one_rank_where_its_shared_part_is_most_of_it():
    shares = [[(0, MEMBERS), (1, MEMBERS)], [(2, MEMBERS)]]
    even_out(shares, lambda unit: 1000 + len(unit[1]))
    assert Counter(len(share) for share in shares) == {2: 1, 1: 1}
    assert sorted(unit for share in shares for unit in share) == [(example, MEMBERS) for example in range(3)]


def test_members_move_to_the_rank_that_reads_their_row_already():
    shares = [[(0, (2, 3, 4, 5, 6, 7)), (1, (0,))], [(0, (0, 1))]]
    even_out(shares, lambda unit: 10 + 10 * len(unit[1]))
    examples = [[example for example, _ in share] for share in shares]
    assert all(len(set(some)) == len(some) for some in examples)
    assert readers_of([unit for share in shares for unit in share]) == readers_of([(0, MEMBERS), (1, (0,))])
    assert max(sum(10 + 10 * len(members) for _, members in share) for share in shares) <= 60
