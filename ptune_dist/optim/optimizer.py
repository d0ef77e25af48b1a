"""The torch optimizers and the learning-rate schedules that a config can name."""

import math

import torch
from torch import nn

from ptune_dist.config.schema import TrainConfig


def build_torch_optimizer(train: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that config section `train` names."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=train.learning_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    return torch.optim.SGD(parameters, lr=train.learning_rate, momentum=train.momentum, weight_decay=train.weight_decay)


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of optimizer step `step` (the first is 1).

    Linear and cosine reach zero one step after the last; warm-up rises linearly and reaches `peak` at its last step.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / (max_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak
