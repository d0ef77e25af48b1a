"""The learning-rate schedules of transformers, by its names, as pure functions of the step."""

import functools
import json
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR

from ptune_dist.config.schema import TrainConfig

Curve = Callable[[int], float]  # how many steps are done -> the share of the peak


def build_curve(train: TrainConfig) -> Curve:
    """The curve that config section `train` names. Raises TypeError or ValueError for options that it cannot have."""
    options = json.dumps(train.schedule_options, sort_keys=True)
    return cached_curve(train.schedule, train.peak_rate, train.num_warmup_steps, train.max_steps, options)


@functools.lru_cache(maxsize=256)
def cached_curve(name: str, learning_rate: float, warmup_steps: int, max_steps: int, options: str) -> Curve:
    from transformers import get_scheduler

    given: dict[str, Any] = json.loads(options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = cast(LambdaLR, get_scheduler(name, optimizer, warmup_steps, max_steps, given))
    return scheduler.lr_lambdas[0]
