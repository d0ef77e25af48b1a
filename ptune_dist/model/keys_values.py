"""Keys and values of all layers, which later positions read.

Shapes: L layers, C positions, G key/value heads, D width of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ptune_dist.prompts.layer_tensors import (
    Layers,
    cat_positions,
    count_positions,
    cut_positions,
    join_layers,
    to_dtype,
)


class KeysValues(NamedTuple):
    """What later positions need of C earlier ones: keys and values of every layer, [L, C, G, D] each.

    Where layers differ in their heads, each is a tuple of [C, G, D].
    """

    keys: Layers
    values: Layers

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> "KeysValues":
        """From `tensors`."""
        half = len(tensors) // 2
        if half == 1:
            return cls(tensors[0], tensors[1])
        return cls(tuple(tensors[:half]), tuple(tensors[half:]))

    @classmethod
    def of_layers(cls, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "KeysValues":
        """From the keys and values [C, G, D] of each layer."""
        keys, values = zip(*layers, strict=True)
        return cls(join_layers(keys), join_layers(values))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Two, or the keys and then the values of each layer."""
        if isinstance(self.keys, torch.Tensor) and isinstance(self.values, torch.Tensor):
            return self.keys, self.values
        return (*self.keys, *self.values)

    @property
    def length(self) -> int:
        return count_positions(self.keys)

    def to(self, dtype: torch.dtype) -> "KeysValues":
        return KeysValues(to_dtype(self.keys, dtype), to_dtype(self.values, dtype))

    def cut(self, run: slice) -> "KeysValues":
        """Those of a run of positions."""
        return KeysValues(cut_positions(self.keys, run), cut_positions(self.values, run))


def join_parts(parts: Sequence[KeysValues]) -> KeysValues | None:
    """Parts one after another as one; None for no parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return KeysValues(cat_positions([part.keys for part in parts]), cat_positions([part.values for part in parts]))
