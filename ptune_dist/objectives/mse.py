"""Mean squared error, for regression: targets and outputs are numbers, standardized over the training set."""

import torch

from ptune_dist.config.schema import TrainConfig
from ptune_dist.objectives.objective import Objective


class MeanSquaredError(Objective):
    """The squared difference of each output and its target."""

    target = "number"

    @classmethod
    def build(cls, train: TrainConfig) -> "MeanSquaredError":
        if train.label_smoothing:
            raise ValueError("train.label_smoothing is for cross_entropy, this is mse")
        return cls()

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.float() - targets.float()).square()
