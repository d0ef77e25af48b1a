"""Our schedules are DeepSpeed's with linear warm-up: warm-up is one step ahead of it, and decay is the same curve."""

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR

from ptune_dist.optim.optimizer import learning_rate_at

PEAK = 0.3
WARMUP = 4
STEPS = 20


def theirs(kind, **params) -> list[float]:
    """DeepSpeed's learning rates at iterations 0, 1, ..."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = kind(optimizer, warmup_num_steps=WARMUP, warmup_type="linear", **params)
    rates = []
    for _ in range(STEPS):
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize(
    "schedule, kind, params, shift",
    [
        ("constant", WarmupLR, {"warmup_max_lr": PEAK}, 1),
        ("linear", WarmupDecayLR, {"warmup_max_lr": PEAK, "total_num_steps": STEPS}, 1),
        # Its cosine is a step ahead of its line.
        ("cosine", WarmupCosineLR, {"total_num_steps": STEPS, "cos_min_ratio": 0}, 2),
    ],
)
def test_each_step_has_deepspeeds_learning_rate(schedule, kind, params, shift):
    iterations = theirs(kind, **params)
    ours = [
        learning_rate_at(step, peak=PEAK, schedule=schedule, warmup_steps=WARMUP, max_steps=STEPS)
        for step in range(1, STEPS + 1)
    ]
    assert ours[:WARMUP] == pytest.approx(iterations[1:WARMUP] + [PEAK])
    first = WARMUP + shift  # the first step whose iteration is past the warm-up
    assert ours[first - 1 :] == pytest.approx(iterations[first - shift : STEPS - shift + 1])
