"""Cross entropy over tokens, or over an encoder's labels, with optional label smoothing (Szegedy et al. 2016)."""

import torch
from torch.nn import functional

from ptune_dist.config.schema import TrainConfig
from ptune_dist.objectives.objective import Objective


class CrossEntropy(Objective):
    """The negative log-likelihood of each target; `label_smoothing` as in torch, in training only."""

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    @classmethod
    def build(cls, train: TrainConfig) -> "CrossEntropy":
        return cls(train.label_smoothing)

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        smoothing = self.label_smoothing
        return functional.cross_entropy(outputs.float(), targets, reduction="none", label_smoothing=smoothing)

    def validation_losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs.float(), targets, reduction="none")
