"""The interface of an objective. It knows nothing of engines, ranks or prompts.

Shapes: U supervised positions, V vocabulary or labels.
"""

from typing import ClassVar

import numpy as np
import torch

from ptune_dist.config.schema import TrainConfig


class Objective:
    """Losses from the outputs at supervised positions.

    An objective is one file: this class with the attributes below, and a line in `objectives.OBJECTIVES`.
    """

    # "text": targets are tokens or labels, outputs are logits. "number": both are real numbers.
    target: ClassVar[str] = "text"
    has_falling_loss: ClassVar[bool] = True  # False: the loss says nothing about what has been learned

    @classmethod
    def build(cls, train: TrainConfig) -> "Objective":
        """The objective with the options of config section `train`. Raises ValueError that begins with the key."""
        raise NotImplementedError

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Training losses [U] in float32. Outputs are logits [U, V] with targets [U] of ids, or numbers [U] and [U]."""
        raise NotImplementedError

    def validation_losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The losses that are reported on held-out rows: without what only helps training."""
        return self.losses(outputs, targets)

    def divisor(self, num_targets: np.ndarray) -> float:
        """What the summed losses of a global batch are divided by; `num_targets` are those of its examples."""
        return float(num_targets.sum())
