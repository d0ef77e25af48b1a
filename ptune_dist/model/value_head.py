"""Numbers as answers: a linear head over one hidden state of a language model, and the scale of the targets.

Shapes: U supervised positions, H hidden size, K members.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TargetScale:
    """Mean and standard deviation of a training set's targets: the model learns (target - mean) / std."""

    mean: float = 0.0
    std: float = 1.0

    def standardize(self, number: float) -> float:
        return (number - self.mean) / self.std

    def restore(self, number: float) -> float:
        return number * self.std + self.mean


def measure_scale(numbers: np.ndarray) -> TargetScale:
    """The scale of a training set; targets that are all equal keep their unit."""
    mean = float(numbers.mean(dtype=np.float64))
    is_constant = numbers.min() == numbers.max()  # the deviation of equal numbers is rounding noise, not zero
    return TargetScale(mean, 1.0 if is_constant else float(numbers.std(dtype=np.float64)))


class ValueHeads(nn.ModuleList):
    """One linear head for each member, in float32; it starts as transformers starts a new head."""

    def __init__(self, base: PreTrainedModel, num_members: int):
        std = getattr(base.config.get_text_config(decoder=True), "initializer_range", None) or 0.02
        # The head over the vocabulary is a linear layer, in int8 too.
        width = cast(nn.Linear, base.get_output_embeddings()).in_features
        draw = torch.Generator().manual_seed(0)
        super().__init__()
        start = torch.randn(1, width, generator=draw) * std  # as if it were alone
        for _ in range(num_members):
            head = nn.Linear(width, 1)
            head.weight = nn.Parameter(start.clone())
            nn.init.zeros_(head.bias)
            self.append(head)

    def predict(self, hidden: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """Numbers [U] from hidden states [U, H], each by the head of its member [U]."""
        heads = [cast(nn.Linear, head) for head in self]  # torch's ModuleList has no type for its items
        weight = torch.cat([head.weight for head in heads])
        bias = torch.cat([head.bias for head in heads])
        return (hidden.float() * weight[members]).sum(dim=1) + bias[members]
