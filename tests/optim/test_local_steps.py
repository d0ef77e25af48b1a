"""Where workers begin and end a period: nothing changes before the first step, and the outer step is torch's."""

import pytest
import torch

from ptune_dist.optim.local_steps import begin_state, move_to_mean, read_moves, read_state, state_of, write_state
from tests.optim.states import are_equal, build_state, give_gradients, take_step, tensors_of


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_an_optimizer_whose_state_is_made_early_steps_as_ever(optimizer):
    early, late = (build_state(optimizer=optimizer) for _ in range(2))
    begin_state(early.members["one"])
    assert not any(tensor.any() for tensor in state_of(early.members["one"]))
    for seed in range(3):
        for state in (early, late):
            give_gradients(state, seed)
            take_step(state, {"one": 0.1})
        begin_state(early.members["one"])  # it is there already
    assert are_equal(tensors_of(early)["one"], tensors_of(late)["one"])


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.0), (0.7, 0.9)])
def test_the_outer_step_is_that_of_torch_and_states_become_the_mean(rate, momentum):
    state = build_state()
    (member,) = state.members.values()
    plain = [torch.nn.Parameter(tensor) for tensor in tensors_of(state)["one"]]
    outer = torch.optim.SGD(plain, lr=rate, momentum=momentum, nesterov=momentum > 0)
    begin_state(member)
    for period in range(3):
        start = read_state(member)
        ends = []
        for worker in range(2):
            write_state(member, start)
            give_gradients(state, 10 * period + worker)
            take_step(state, {"one": 0.1})
            ends.append((read_moves(member, start), tensors_of(state)["one"], [t.clone() for t in state_of(member)]))
        move_to_mean(member, start, (ends[0][0] + ends[1][0]) / 2, rate, momentum)
        for parameter, one, other in zip(plain, ends[0][1], ends[1][1], strict=True):
            parameter.grad = parameter.detach() - (one + other) / 2
        outer.step()
        for found, expected in zip(member.parameters, plain, strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
        for found, one, other in zip(state_of(member), ends[0][2], ends[1][2], strict=True):
            assert torch.equal(found, (one + other) / 2)


def test_what_is_kept_of_the_outer_step_is_saved_and_restored_with_the_optimizer():
    state, other = build_state(), build_state()
    for one in (state, other):
        begin_state(one.members["one"])
    (member,) = state.members.values()
    start = read_state(member)
    moved = torch.full_like(start, 0.5)
    move_to_mean(member, start, moved, 0.7, 0.9)
    other.members["one"].load_tensors(member.tensors())
    other.load_optimizer_state(state.optimizer_state())
    for one in (state, other):
        (own,) = one.members.values()
        move_to_mean(own, read_state(own), moved, 0.7, 0.9)
    assert are_equal(tensors_of(state)["one"], tensors_of(other)["one"])
