"""A `scheduler` section that is taken trains at the rates of DeepSpeed's own scheduler, whatever it leaves out.

DeepSpeed's first steps have a rate of zero. We leave them out: linear warm-up is at iteration `step`, logarithmic
warm-up and the line after it at `step - 1`, and the cosine, which is a step ahead of the line, at `step - 2`.
"""

import itertools
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

from ptune_dist.optim.optimizer import learning_rate_at
from tests.config.test_deepspeed_json import build, error_of, fill

PEAK = 0.3
TOTAL = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
SHIFT_OF_DECAY = {"WarmupLR": 1, "WarmupDecayLR": 1, "WarmupCosineLR": 2}
LEFT_OUT = object()
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "WarmupLR": {"warmup_max_lr": [LEFT_OUT, PEAK, None], "warmup_min_lr": [LEFT_OUT, 0]},
    "WarmupDecayLR": {"warmup_max_lr": [LEFT_OUT, PEAK, None], "warmup_min_lr": [LEFT_OUT, 0.0]},
    "WarmupCosineLR": {"cos_min_ratio": [LEFT_OUT, 0, 0.25], "warmup_min_ratio": [LEFT_OUT, 0]},
}
SHARED = {"warmup_num_steps": [LEFT_OUT, 2, 7], "warmup_type": [LEFT_OUT, "linear", "log"]}


def sections(kind: str) -> list[dict[str, Any]]:
    """The params of a section in every combination of options given and left out."""
    options = OPTIONS[kind] | SHARED
    made = []
    for values in itertools.product(*options.values()):
        params = {name: value for name, value in zip(options, values, strict=True) if value is not LEFT_OUT}
        made.append(params)
    return made


def same_settings(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """The config's keys for what DeepSpeed makes of these params."""
    warmup = params.get("warmup_num_steps", 1000)
    settings = {"schedule": TOTAL[kind], "warmup_steps": warmup, "max_steps": warmup + 12, "learning_rate": PEAK}
    settings["warmup_type"] = params.get("warmup_type", "log")
    if kind == "WarmupDecayLR" and "warmup_max_lr" not in params:
        settings["learning_rate"] = 0.001
    if kind == "WarmupCosineLR":
        settings["min_lr_ratio"] = params.get("cos_min_ratio", 0.0001)
    return settings


def theirs(kind: str, params: dict[str, Any], steps: int) -> list[float]:
    """DeepSpeed's learning rates at iterations 0, 1, ..."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    rates = []
    for _ in range(steps):
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_section_that_is_taken_has_deepspeeds_learning_rate_at_every_step(kind):
    for params in sections(kind):
        settings = same_settings(kind, params)
        total = settings["max_steps"]
        given = params if kind == "WarmupLR" else {"total_num_steps": total} | params
        assert fill({"scheduler": {"type": kind, "params": given}}, **settings)
        train = build(None, **settings).train
        ours = [learning_rate_at(step, train) for step in range(1, total + 1)]
        iterations = theirs(kind, given, total + 1)
        warmup = settings["warmup_steps"]
        shift = 0 if settings["warmup_type"] == "linear" else 1
        assert ours[: warmup - 1] == pytest.approx(iterations[1 - shift : warmup - shift], rel=1e-12)
        assert ours[warmup - 1] == pytest.approx(settings["learning_rate"])
        shift = SHIFT_OF_DECAY[kind]
        first = warmup + shift  # the first step whose iteration is past the warm-up
        assert ours[first - 1 :] == pytest.approx(iterations[first - shift : total + 1 - shift], rel=1e-12)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_section_that_would_train_at_other_rates_is_refused_by_name(kind):
    others = {
        "warmup_num_steps": {"warmup_steps": 5},
        "warmup_type": {},
        "warmup_max_lr": {"learning_rate": 0.2},
        "cos_min_ratio": {"min_lr_ratio": 0.125},
    }
    for params in sections(kind):
        settings = same_settings(kind, params)
        for name in others.keys() & {*OPTIONS[kind], *SHARED}:
            if name == "warmup_max_lr" and params.get(name, LEFT_OUT if kind == "WarmupDecayLR" else None) is None:
                continue  # the optimizer's own
            changed = others[name] or {"warmup_type": "log" if settings["warmup_type"] == "linear" else "linear"}
            message = error_of({"scheduler": {"type": kind, "params": dict(params)}}, **{**settings, **changed})
            assert f"scheduler.params.{name} is " in message and f"train.{next(iter(changed))}" in message


def test_without_warm_up_its_type_makes_no_difference():
    assert fill({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, schedule="constant")


def test_a_warm_up_of_one_step_has_two_in_deepspeed():
    section = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}}
    assert "is 1, and DeepSpeed takes 2" in error_of(section, schedule="constant", warmup_steps=1)


@pytest.mark.parametrize("name", ["warmup_max_lr", "total_num_steps", "cos_min_ratio", "warmup_min_ratio"])
def test_an_option_of_another_scheduler_is_refused_as_deepspeed_refuses_it(name):
    kind = "WarmupCosineLR" if name == "warmup_max_lr" else "WarmupLR"
    params = {"warmup_num_steps": "auto", name: "auto"}
    assert f"scheduler.params.{name} is not an option here" in error_of(
        {"scheduler": {"type": kind, "params": params}}, schedule=TOTAL[kind]
    )


def test_only_a_cosine_ends_above_zero():
    with pytest.raises(ValueError, match="train.min_lr_ratio is for schedule cosine"):
        build(None, schedule="linear", min_lr_ratio=0.1)
