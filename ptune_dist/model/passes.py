"""What a pass of the base is asked for.

Shapes: T tokens, U supervised positions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ptune_dist.model.attention import KeysValues

LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # an objective's losses or validation_losses


@dataclass(frozen=True)
class Contexts:
    """Contexts to compute, all of which begin with the tokens of `lead`, whose keys/values are known.

    With a `start_layer` they are whole rows, of which only the layers below it read more than the first `lengths`; then
    `lead` are keys/values that those layers read before each row.
    """

    tokens: list[np.ndarray]
    pad_id: int
    lead: KeysValues | None = None
    start_layer: int = 0
    lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Supervised:
    """The supervised positions of a pass and the base's inputs for it.

    rows, places [U]: where the outputs are wanted. targets [U]: token ids. reader [U]: whose each one is. layers:
    within what the base runs, where only some of its layers compute.
    """

    rows: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    reader: np.ndarray
    inputs: dict[str, Any]
    layers: Callable[[], AbstractContextManager[Any]] = nullcontext
