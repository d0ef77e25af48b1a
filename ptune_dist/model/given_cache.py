"""Keys/values of contexts handed to a base that computes attention in a way of its own (BLOOM's ALiBi, say).

Floor 2. A transformers `Cache` whose `update` returns [context, new] and stores nothing is safe where a layer's forward
is run again in backward. Shapes: B rows, C context positions, T new positions, G key/value heads, D width of a head.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from ptune_dist.model.attention import KeysValues


class GivenCache(Cache):
    """Keys/values [B, G, C, D] of every layer before whatever is computed; `record` keeps what is computed instead."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], record: bool = False):
        super().__init__(layers=[])
        self._given, self.recorded = layers, [] if record else None

    def update(self, key_states, value_states, layer_idx: int, *_: Any, **__: Any):
        """[B, G, C + T, D] twice."""
        if self.recorded is not None:
            self.recorded.append((key_states, value_states))
        if not self._given:
            return key_states, value_states
        keys, values = self._given[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

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


def pad_contexts(held: list[KeysValues]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's keys/values [B, G, C, D] of B contexts, padded on the left: some bases count from the right."""
    width = max(context.length for context in held)
    padded = [[pad(part, (0, 0, 0, 0, width - part.shape[1], 0)).transpose(1, 2) for part in parts] for parts in held]
    keys, values = (torch.stack(tensors, dim=1) for tensors in zip(*padded, strict=True))
    return list(zip(keys, values, strict=True))
