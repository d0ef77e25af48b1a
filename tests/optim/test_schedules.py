"""The schedules of transformers, by its names."""

import pytest
import torch
from transformers import get_scheduler

from ptune_dist.config.schema import TrainConfig
from ptune_dist.optim.optimizer import learning_rate_at
from ptune_dist.run.resolve import check_schedule

STEPS = 20
CASES = [
    ("constant_with_warmup", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"power": 2.0, "lr_end": 0.001}),
    ("inverse_sqrt", {"timescale": 7}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
]


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name, options", CASES)
def test_a_named_schedule_has_the_curve_of_transformers_after_the_warm_up(name, options, warmup):
    given = {} if name == "constant_with_warmup" else {"schedule_options": options}
    train = TrainConfig(schedule=name, learning_rate=0.3, warmup_steps=warmup, max_steps=STEPS, **given)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, options)
    wanted = []
    for _ in range(STEPS):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [learning_rate_at(step, train) for step in range(1, STEPS + 1)]
    assert found[warmup:] == pytest.approx(wanted[warmup:], rel=1e-9)
    assert found[:warmup] == pytest.approx([0.3 * (i + 1) / 4 for i in range(warmup)])


@pytest.mark.parametrize(
    "name, options",
    [
        ("polynomial", {"powr": 2}),
        ("polynomial", {"lr_end": 5.0}),
        ("cosine_with_min_lr", {}),
        ("warmup_stable_decay", {}),
    ],
)
def test_options_that_a_schedule_cannot_have_are_one_line(name, options):
    train = TrainConfig(schedule=name, schedule_options=options, max_steps=STEPS)
    with pytest.raises(ValueError, match=rf"^train.schedule_options: {name}: \S[^\n]*$"):
        check_schedule(train)
