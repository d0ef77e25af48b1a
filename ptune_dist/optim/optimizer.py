"""The torch optimizers and the learning-rate schedules that a config can name."""

import math

import torch
from torch import nn

from ptune_dist.config.schema import OWN_SCHEDULES, TrainConfig
from ptune_dist.optim.schedules import build_curve


def build_torch_optimizer(train: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that config section `train` names."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=train.peak_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=train.peak_rate, weight_decay=train.weight_decay)
    return torch.optim.SGD(parameters, lr=train.peak_rate, momentum=train.momentum, weight_decay=train.weight_decay)


def learning_rate_at(step: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (the first is 1).

    Linear ends at zero and cosine at `min_lr_ratio`, one step after the last. Warm-up ends at the peak. The curves are
    those of DeepSpeed's WarmupLR, WarmupDecayLR and WarmupCosineLR without its first steps, which have a rate of zero.
    Other names are transformers' schedules, whose curves follow the warm-up.
    """
    peak = train.peak_rate
    if step <= train.num_warmup_steps:
        return peak * warmup_share(step, train)
    if train.schedule not in OWN_SCHEDULES:
        return peak * build_curve(train)(step - 1)
    progress = (step - 1 - train.num_warmup_steps) / (train.max_steps - train.num_warmup_steps)
    if train.schedule == "linear":
        return peak * (1 - progress)
    if train.schedule == "cosine":
        return peak * (train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak


def warmup_share(step: int, train: TrainConfig) -> float:
    """The share of the peak at a step of the warm-up."""
    if train.warmup_type == "log":
        return math.log(step) / math.log(max(2, train.num_warmup_steps))
    return step / train.num_warmup_steps
