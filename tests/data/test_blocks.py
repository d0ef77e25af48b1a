"""Blocks and their tree: the same sum, bit for bit, however the blocks are shared and whoever adds them."""

import itertools

import numpy as np
import pytest

from ptune_dist.data.blocks import RunningSums, add_up, cut_into_blocks, divide
from ptune_dist.nodes.blocks import Range, subtrees

NUM_BLOCKS = 16
DRAW = np.random.default_rng(0)
LENGTHS = DRAW.integers(1, 60, 500).tolist()
VALUES = (DRAW.standard_normal((NUM_BLOCKS, 50)) * 10.0 ** DRAW.integers(-6, 6, (NUM_BLOCKS, 50))).astype(np.float32)


def cost(units) -> int:
    return sum(LENGTHS[example] * len(members) for example, members in units)


def units_of(num_rows: int, num_members: int = 1) -> list:
    return [(example, tuple(range(num_members))) for example in range(num_rows)]


@pytest.mark.parametrize("num_rows", [1, 16, 17, 100])
@pytest.mark.parametrize("with_owners", [False, True])
def test_every_row_is_in_one_block_and_blocks_are_alike(num_rows, with_owners):
    units = units_of(num_rows)
    blocks = cut_into_blocks(units, cost, NUM_BLOCKS, work=cost if with_owners else None)
    assert len(blocks) == NUM_BLOCKS
    assert sorted(unit for block in blocks for unit in block) == units
    largest = max(LENGTHS[:num_rows])
    assert max(map(cost, blocks)) <= cost(units) / NUM_BLOCKS + largest


def test_rows_of_a_block_have_similar_lengths():
    blocks = cut_into_blocks(units_of(200), cost, NUM_BLOCKS)
    ends = [[LENGTHS[example] for example, _ in block] for block in blocks]
    assert all(min(longer) >= max(shorter) for longer, shorter in itertools.pairwise(ends))


def test_most_examples_keep_their_block_where_contexts_are_held():
    found = [
        {example: number for number, block in enumerate(blocks) for example, _ in block}
        for blocks in (
            cut_into_blocks([(e, (0,)) for e in order], cost, NUM_BLOCKS, work=cost)
            for order in (range(400), range(100, 500))
        )
    ]
    shared = set(found[0]) & set(found[1])
    assert np.mean([found[0][e] == found[1][e] for e in shared]) > 0.7


def test_few_rows_with_many_members_are_split_by_members_unless_these_share_work():
    split = cut_into_blocks(units_of(2, 32), cost, NUM_BLOCKS, members_share=False)
    assert all(split)
    assert sorted((e, m) for block in split for e, members in block for m in members) == [
        (e, m) for e in range(2) for m in range(32)
    ]
    assert len([block for block in cut_into_blocks(units_of(2, 32), cost, NUM_BLOCKS) if block]) == 2


def blocks_of(ranges: list[Range]) -> list[int]:
    return [block for own in ranges for block in range(own.lo, own.hi)]


def sum_of_node(ranges: list[Range], num_ranks: int) -> dict[Range, np.ndarray]:
    """What a node with so many ranks finds of its subtrees."""
    parts: dict[Range, np.ndarray] = {}
    for own in divide(ranges, num_ranks):
        sums: RunningSums[np.ndarray] = RunningSums(own)
        for block in blocks_of(own):
            sums.add(block, VALUES[block])
        assert set(sums.found) == set(own)
        parts |= sums.found
    return {one: add_up(one, parts) for one in ranges}


@pytest.mark.parametrize("cuts", [[], [8], [3, 7, 8, 15], [1, 2, 3, 4], list(range(1, 16)), [5]])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_sum_is_the_same_bit_for_bit_however_blocks_are_shared(cuts, num_ranks):
    found = {}
    for low, high in itertools.pairwise([0, *cuts, NUM_BLOCKS]):
        found |= sum_of_node(subtrees(low, high), num_ranks)
    whole = Range(0, NUM_BLOCKS)
    alone = add_up(whole, {Range(b, b + 1): VALUES[b] for b in range(NUM_BLOCKS)})
    np.testing.assert_array_equal(add_up(whole, found).view(np.int32), alone.view(np.int32))
    assert not np.array_equal(alone, VALUES[::-1].cumsum(axis=0)[-1])  # another order has other bits


def test_ranks_share_what_a_node_computes_again_evenly():
    of_ranks = divide([Range(0, 4), Range(12, 16)], 3)
    assert [blocks_of(own) for own in of_ranks] == [[0, 1], [2, 3, 12], [13, 14, 15]]


def test_what_is_missing_is_no_sum():
    with pytest.raises(KeyError):
        add_up(Range(0, 4), {Range(0, 2): 1, Range(2, 3): 1})
