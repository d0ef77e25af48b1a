"""Schedules, and the optimizers that a config names."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ptune_dist.config.schema import TrainConfig
from ptune_dist.optim.optimizer import build_torch_optimizer, learning_rate_at


def rates(schedule: str, warmup_steps: int, max_steps: int) -> list[float]:
    train = TrainConfig.model_validate(
        {"learning_rate": 2.0, "schedule": schedule, "warmup_steps": warmup_steps, "max_steps": max_steps}
    )
    return [learning_rate_at(step, train) for step in range(1, max_steps + 1)]


def test_constant_stays_at_the_peak():
    assert rates("constant", 0, 4) == [2.0] * 4


def test_linear_falls_evenly_and_would_reach_zero_one_step_after_the_last():
    assert rates("linear", 0, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_falls_along_half_a_wave():
    assert rates("cosine", 0, 4) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_evenly_from_above_zero_to_the_peak_at_its_last_step(schedule):
    found = rates(schedule, 4, 12)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4] == pytest.approx(2.0)  # the schedule proper begins at the peak
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[4:] == pytest.approx(rates(schedule, 0, 8))


def settings(optimizer: str, **more) -> SimpleNamespace:
    return SimpleNamespace(
        optimizer=optimizer, peak_rate=0.1, betas=(0.8, 0.95), eps=1e-6, momentum=0.9, weight_decay=0.01, **more
    )


def test_each_name_builds_its_optimizer_with_the_configs_numbers():
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    found = {name: build_torch_optimizer(settings(name), parameters) for name in ("adamw", "adafactor", "sgd")}
    assert type(found["adamw"]) is torch.optim.AdamW and type(found["adafactor"]) is torch.optim.Adafactor
    assert type(found["sgd"]) is torch.optim.SGD
    group = found["adamw"].param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.95), 1e-6, 0.01)
    assert found["sgd"].param_groups[0]["momentum"] == 0.9
    assert all(o.param_groups[0]["lr"] == 0.1 and o.param_groups[0]["weight_decay"] == 0.01 for o in found.values())
