"""A step of the prompts: torch's own with clip_grad_norm_, one member's faults are its own, and state that resumes."""

import math

import pytest
import torch
from torch import nn

from ptune_dist.optim.optimizer import build_torch_optimizer
from tests.optim.states import are_equal, build_state, give_gradients, settings, take_step, tensors_of

OPTIMIZERS = ["adamw", "adafactor", "sgd"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 100.0])  # none, one that clips, one that never does
def test_a_member_moves_as_torch_does_with_clip_grad_norm(optimizer, max_grad_norm):
    state = build_state(optimizer=optimizer, max_grad_norm=max_grad_norm)
    member = state.members["one"]
    plain = [nn.Parameter(p.detach().clone()) for p in member.parameters]
    reference = build_torch_optimizer(settings(optimizer), plain)
    for step in range(5):
        gradients = give_gradients(state, seed=step)["one"]
        rate = 0.1 / (1 + step)
        assert take_step(state, {"one": rate}) == {}
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(plain, max_grad_norm or math.inf)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert member.grad_norm == pytest.approx(norm.item(), rel=1e-6)  # before clipping
        for ours, theirs in zip(member.parameters, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_each_member_is_clipped_by_its_own_norm():
    state = build_state("one", "two", optimizer="sgd", max_grad_norm=1.0)
    give_gradients(state, one=1000.0, two=0.01)
    before = tensors_of(state)
    take_step(state, {"one": 0.1, "two": 0.1})
    moved = {
        name: torch.stack([(a - b).norm() for a, b in zip(before[name], after, strict=True)]).norm().item()
        for name, after in tensors_of(state).items()
    }
    decay = 0.1 * 0.01 * torch.stack([p.norm() for p in before["one"]]).norm().item()
    assert moved["one"] == pytest.approx(0.1, abs=decay)  # a norm of 1 at a rate of 0.1
    assert moved["two"] == pytest.approx(0.1 * 0.01 * math.sqrt(12), abs=decay)


def test_members_that_are_not_named_stay_as_they_are_and_lose_their_gradients():
    state = build_state("one", "two")
    give_gradients(state)
    before = tensors_of(state)
    take_step(state, {"two": 0.1})
    after = tensors_of(state)
    assert are_equal(before["one"], after["one"]) and not are_equal(before["two"], after["two"])
    assert not state.members["one"].optimizer.state
    assert all(p.grad is None for member in state.members.values() for p in member.parameters)


def test_a_step_of_nobody_changes_nothing():
    state = build_state()
    give_gradients(state)
    before = tensors_of(state)
    assert take_step(state, {}) == {} and are_equal(before["one"], tensors_of(state)["one"])


def test_a_member_without_a_gradient_steps_as_with_zeros():
    state, zeros = build_state(), build_state()
    give_gradients(state)
    give_gradients(zeros)
    take_step(state, {"one": 0.1})
    take_step(zeros, {"one": 0.1})
    give_gradients(zeros, one=0.0)
    take_step(state, {"one": 0.1})
    take_step(zeros, {"one": 0.1})
    assert are_equal(tensors_of(state)["one"], tensors_of(zeros)["one"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_its_member_alone_not_at_all(bad):
    state, undisturbed = build_state("one", "two"), build_state("one", "two")
    give_gradients(state, one=bad)
    give_gradients(undisturbed)
    before = tensors_of(state)
    undisturbed.members["two"].parameters[0].grad = state.members["two"].parameters[0].grad.clone()
    undisturbed.members["two"].parameters[1].grad = state.members["two"].parameters[1].grad.clone()
    faults = take_step(state, {"one": 0.1, "two": 0.1})
    take_step(undisturbed, {"one": 0.1, "two": 0.1})
    assert faults == {"one": f"the gradient's norm is {bad}"}
    assert are_equal(before["one"], tensors_of(state)["one"]) and not state.members["one"].optimizer.state
    assert are_equal(tensors_of(state)["two"], tensors_of(undisturbed)["two"])


def test_a_step_that_leaves_the_finite_is_taken_back():
    state = build_state("one", "two", optimizer="sgd", max_grad_norm=0.0)
    give_gradients(state, one=100.0, two=1.0)
    before = tensors_of(state)
    faults = take_step(state, {"one": 1e38, "two": 0.1})
    assert list(faults) == ["one"] and "prompt" in faults["one"]
    after = tensors_of(state)
    assert are_equal(before["one"], after["one"]) and not are_equal(before["two"], after["two"])


def test_a_fault_is_that_of_the_last_step_alone():
    state = build_state()
    give_gradients(state, one=math.nan)
    assert take_step(state, {"one": 0.1})
    give_gradients(state)
    assert take_step(state, {"one": 0.1}) == {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_that_is_loaded_continues_bitwise(optimizer):
    state, resumed = (build_state("one", "two", optimizer=optimizer) for _ in range(2))
    for step in range(3):
        give_gradients(state, seed=step)
        take_step(state, {"one": 0.1, "two": 0.2})
    resumed.load_optimizer_state(state.optimizer_state())
    for name, member in resumed.members.items():
        member.load_tensors(state.members[name].tensors())
    for one in (state, resumed):
        give_gradients(one, seed=9)
        take_step(one, {"one": 0.1, "two": 0.2})
    assert all(are_equal(tensors_of(state)[name], tensors_of(resumed)[name]) for name in state.members)
    saved, again = state.optimizer_state(), resumed.optimizer_state()
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)


def test_the_names_in_a_checkpoint_are_those_that_runs_have_always_had():
    state = build_state("one", "two")
    give_gradients(state)
    take_step(state, {"one": 0.1})
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(state.optimizer_state()) == {f"one/{name}.{key}" for name in ("a", "b.c") for key in keys}


def test_state_of_no_step_loads_as_that():
    state = build_state()
    state.load_optimizer_state({})
    give_gradients(state)
    assert take_step(state, {"one": 0.1}) == {} and state.optimizer_state()
