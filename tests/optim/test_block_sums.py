"""Sums of blocks: what nodes send adds up to what one process sums and moves the prompts alike, overflow included."""

import pytest
import torch

from ptune_dist.nodes.blocks import Range
from ptune_dist.optim.block_sums import add_pieces, gather_blocks, to_pieces
from ptune_dist.optim.loss_scale import LossScale
from tests.optim.states import ALONE, are_equal, build_state, give_gradients, tensors_of

NUM_BLOCKS = 4
LOSSES = torch.tensor([2.0])


def sum_blocks(state, values: list[float]) -> torch.Tensor:
    """Two nodes with two blocks each, whose gradients are these values."""
    pieces = {}
    for low in (0, 2):
        own = {}
        for block in (low, low + 1):
            give_gradients(state, one=values[block])
            sums = torch.cat([state.take_sums(["one"]), LOSSES / NUM_BLOCKS])
            own[Range(block, block + 1)] = sums
        ranges = [Range(low, low + 2)]
        pieces |= to_pieces(ranges, gather_blocks(own, [list(own)], len(sums), ALONE))
    return add_pieces(NUM_BLOCKS, pieces)


@pytest.mark.parametrize("with_scale", [False, True])
def test_sums_of_blocks_move_the_prompts_as_one_sum_does(with_scale):
    scale = {"enabled": True, "initial_scale_power": 4}
    one, other = (build_state(loss_scale=LossScale(scale) if with_scale else None) for _ in range(2))
    sums = sum_blocks(one, [1.0, 2.0, 4.0, -0.5])
    found = one.measure_sums(["one"], sums)
    give_gradients(other, one=6.5)
    expected = other.measure(["one"], LOSSES)
    assert found == expected
    for state, measured in ((one, found), (other, expected)):
        assert state.move({"one": 0.1}, measured.norms) == {}
    assert are_equal(tensors_of(one)["one"], tensors_of(other)["one"])


def test_an_overflow_of_one_block_skips_the_step_on_all_nodes():
    state = build_state(loss_scale=LossScale({"enabled": True, "hysteresis": 1}))
    before, scale = tensors_of(state), state.loss_scale.cur_scale
    measured = state.measure_sums(["one"], sum_blocks(state, [1.0, float("inf"), 1.0, 1.0]))
    assert state.move({"one": 0.1}, measured.norms) == {}
    assert state.skipped_steps == 1 and state.loss_scale.cur_scale == scale / 2
    assert are_equal(before["one"], tensors_of(state)["one"])
