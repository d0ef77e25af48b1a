"""Pass keys/values of contexts to a base that computes attention in its own way (BLOOM's ALiBi, for example).

`GivenCache` is a transformers `Cache` whose `update` returns [context, new] and stores nothing, so a layer's forward
can be run again in backward.

Shapes: B rows, C context positions, T new positions, G key/value heads, D width of a head.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ptune_dist.model.attention import KeysValues

# Kinds of layers that keep something else than keys and values, or something beside them.
STATES = {"conv", "indexed_attention", "linear_attention", "mamba", "recurrent"}


class GivenCache(Cache):
    """Prepends given keys/values [B, G, C, D] to those of every layer; `record` collects the computed ones instead.

    `first_layer`: the layer that the first of them are for, where only it and those above compute.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], record: bool = False, first_layer: int = 0):
        super().__init__(layers=[])
        self._first_layer = first_layer
        self._given = layers
        self._is_recording = record
        self.recorded: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [B, G, C + T, D] each, from new ones, [B, G, T, D] each."""
        if self._is_recording:
            self.recorded.append((key_states, value_states))
        if not self._given:
            return key_states, value_states
        keys, values = self._given[layer_idx - self._first_layer]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def cut(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first recorded keys and values [L, length, G, D] of a row that is padded on the right."""
        keys, values = (
            torch.stack([part[row, :, :length].transpose(0, 1) for part in parts])
            for parts in zip(*self.recorded, strict=True)
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._given[0][0].shape[2] if self._given else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return self.get_seq_length()

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * max(1, len(self._given))


def keeps_more(base: PreTrainedModel) -> bool:
    """Whether a base keeps states beside keys and values, which cannot be given back."""
    kinds = getattr(base.config.get_text_config(decoder=True), "layer_types", None) or ()
    return base._is_stateful or bool(STATES & set(kinds))


def pad_contexts(held: list[KeysValues]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's keys/values [B, G, C, D] of B contexts, padded on the left: some bases count from the right."""
    width = max(context.length for context in held)
    keys = torch.stack([pad_left(context.keys, width) for context in held], dim=1)
    values = torch.stack([pad_left(context.values, width) for context in held], dim=1)
    return list(zip(keys, values, strict=True))


def pad_left(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """[L, C, G, D] -> [L, G, width, D]."""
    return pad(tensor, (0, 0, 0, 0, width - tensor.shape[1], 0)).transpose(1, 2)
