"""fp16's loss scale: DeepSpeed's own rule step for step, and what an overflow does to a step."""

import math
import random

import pytest
import torch

from ptune_dist.optim.loss_scale import LossScale, build_loss_scale
from tests.optim.states import are_equal, build_state, give_gradients, take_step, tensors_of

SECTIONS = {
    "defaults": {"loss_scale_window": 5},
    "tolerant": {"loss_scale_window": 3, "hysteresis": 4, "initial_scale_power": 20},
    "refilled": {"loss_scale_window": 4, "hysteresis": 3, "consecutive_hysteresis": True},
    "at once": {"loss_scale_window": 7, "hysteresis": 1},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_dynamic_scale_follows_deepspeeds_rule(name, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it asks before it logs; there is no process group

    fp16 = {"enabled": True} | SECTIONS[name]
    taken = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "fp16": fp16}).float16_config
    theirs = loss_scaler.CreateLossScaler(torch.half, taken.loss_scale, True, taken.dynamic_loss_scale_args())
    ours, draw = LossScale(fp16), random.Random(3)
    for _ in range(400):
        assert ours.state() == {key: getattr(theirs, key) for key in ours.state()}
        has_overflow = draw.random() < 0.1 and not ours.is_exhausted
        ours.count_step(has_overflow)
        theirs.update_scale(has_overflow)


def test_a_state_that_is_loaded_continues_as_it_would_have():
    ours, resumed = LossScale({"loss_scale_window": 3}), LossScale({"loss_scale_window": 3})
    for has_overflow in (False, True, True, False, False):
        ours.count_step(has_overflow)
    resumed.load_state(ours.state())
    for has_overflow in (False, False, True, False):
        ours.count_step(has_overflow)
        resumed.count_step(has_overflow)
        assert ours.state() == resumed.state()


def test_a_checkpoint_without_hysteresis_loads_too():  # DeepSpeed's stage 0 stored none
    ours = LossScale({})
    ours.load_state({"cur_scale": 64.0, "cur_iter": 12, "last_overflow_iter": 3})
    assert ours.state() == {"cur_scale": 64.0, "cur_iter": 12, "last_overflow_iter": 3, "cur_hysteresis": 2}


def test_a_static_scale_stays_what_the_json_says():
    ours = LossScale({"loss_scale": 128})
    ours.count_step(True)
    ours.load_state({"cur_scale": 7.0})
    assert ours.state() == {"cur_scale": 128.0} and not ours.is_exhausted


def test_only_fp16_has_a_scale():
    assert build_loss_scale({}) is None and build_loss_scale({"fp16": {"enabled": False}}) is None
    assert build_loss_scale({"fp16": {"enabled": True}}).cur_scale == 2**16


def test_steps_under_a_scale_are_those_without_one():
    plain, scaled = build_state("one", "two"), build_state("one", "two", loss_scale=LossScale({}))
    for step in range(3):
        for state in (plain, scaled):
            give_gradients(state, seed=step)
        for parameter in (p for member in scaled.members.values() for p in member.parameters):
            parameter.grad *= scaled.scale(torch.ones(()))
        for state in (plain, scaled):
            assert take_step(state, {"one": 0.1, "two": 0.1}) == {}
    assert all(are_equal(tensors_of(plain)[name], tensors_of(scaled)[name]) for name in ("one", "two"))
    assert plain.members["one"].grad_norm == scaled.members["one"].grad_norm
    assert scaled.loss_scale.cur_iter == 3 and scaled.skipped_steps == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_overflow_skips_the_step_of_all_and_lowers_the_scale(bad):
    state = build_state("one", "two", loss_scale=LossScale({"hysteresis": 1}))
    before = tensors_of(state)
    give_gradients(state, one=bad)
    assert take_step(state, {"one": 0.1, "two": 0.1}) == {}
    assert state.skipped_steps == 1 and state.loss_scale.cur_scale == 2**15
    assert all(are_equal(before[name], tensors_of(state)[name]) for name in ("one", "two"))
    assert not state.members["two"].optimizer.state
    give_gradients(state)
    assert take_step(state, {"one": 0.1, "two": 0.1}) == {}
    assert state.skipped_steps == 1 and not are_equal(before["two"], tensors_of(state)["two"])


def test_where_no_smaller_scale_is_left_a_gradient_that_is_not_finite_is_its_members_fault():
    state = build_state("one", "two", loss_scale=LossScale({"initial_scale_power": 0, "hysteresis": 1}))
    before = tensors_of(state)
    give_gradients(state, one=math.inf)
    assert list(take_step(state, {"one": 0.1, "two": 0.1})) == ["one"]
    assert state.skipped_steps == 0
    assert are_equal(before["one"], tensors_of(state)["one"]) and not are_equal(before["two"], tensors_of(state)["two"])


def test_a_member_that_has_ended_causes_no_overflow():
    state = build_state("one", "two", loss_scale=LossScale({}))
    give_gradients(state, one=math.nan)
    take_step(state, {"two": 0.1})
    assert state.skipped_steps == 0 and state.loss_scale.cur_iter == 1
