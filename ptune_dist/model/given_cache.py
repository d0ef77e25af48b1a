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

from ptune_dist.base.layers import heads_by_layer
from ptune_dist.model.keys_values import KeysValues
from ptune_dist.prompts.layer_tensors import Layers

# Kinds of layers that keep something else than keys and values, or something beside them.
STATES = {"conv", "indexed_attention", "linear_attention", "mamba", "recurrent"}
WITHOUT_KEYS = {"conv", "linear_attention", "mamba", "mlp", "moe", "recurrent"}
# MiniMax takes no cache but its own kind, and RecurrentGemma's states begin anew at position 0 only.
OWN_STATES = ("minimax", "recurrent_gemma")
# Their attention reads something else than keys and values too.
UNKNOWN = {"compressed_sparse_attention", "heavily_compressed_attention", "indexed_attention"}


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

    def cut(self, row: int, length: int) -> KeysValues:
        """The first recorded keys and values [L, length, G, D] of a row that is padded on the right."""
        return cut_layers(self.recorded, row, length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return next((keys.shape[2] for keys, _ in self._given if keys.shape[1]), 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return self.get_seq_length()

    # Layers with states begin anew with every row.

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        return None

    def update_conv_state(
        self, conv_states: torch.Tensor, *_: Any, conv_kernel_size: int | None = None, **__: Any
    ) -> torch.Tensor:
        """The new inputs of a convolution, after zeros where they are fewer than it reads."""
        return pad(conv_states, (max(0, (conv_kernel_size or 0) - conv_states.shape[-1]), 0))

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return recurrent_states

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        return False

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


def layer_heads(base: PreTrainedModel) -> tuple[tuple[int, int, int], ...] | None:
    """Of each layer, how many heads its keys and values have of a position, and the widths of a key and of a value.

    No heads where a layer has no attention. None for a base that cannot be given keys and values.
    """
    text = base.config.get_text_config(decoder=True)
    found = heads_by_layer(base.config)
    kinds = list(getattr(text, "layer_types", None) or [])
    shares_keys = bool(getattr(text, "num_kv_shared_layers", 0))
    if text.model_type in OWN_STATES or set(kinds) & UNKNOWN or shares_keys or (keeps_more(base) and not kinds):
        return None
    if not set(kinds) & WITHOUT_KEYS:
        kinds = [""] * len(found)
    if len(kinds) != len(found):
        return None
    if not any(kind not in WITHOUT_KEYS and heads[0] and heads[1] for kind, heads in zip(kinds, found, strict=True)):
        return None
    pairs = zip(kinds, found, strict=True)
    return tuple((0, 0, 0) if kind in WITHOUT_KEYS else (n or 0, k or 0, v or 0) for kind, (n, k, v) in pairs)


def pad_contexts(held: list[KeysValues]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's keys/values [B, G, C, D] of B contexts, padded on the left: some bases count from the right."""
    width = max(context.length for context in held)
    keys = pad_layers([context.keys for context in held], width)
    values = pad_layers([context.values for context in held], width)
    return list(zip(keys, values, strict=True))


def pad_layers(held: list[Layers], width: int) -> Layers:
    """Every layer of B contexts, [B, G, width, D]."""
    whole = [layers for layers in held if isinstance(layers, torch.Tensor)]
    if len(whole) == len(held):
        return torch.stack([pad_left(layers, width) for layers in whole], dim=1)
    return tuple(torch.stack([pad_left(layer, width) for layer in some]) for some in zip(*held, strict=True))


def pad_left(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """[..., C, G, D] -> [..., G, width, D]."""
    return pad(tensor, (0, 0, 0, 0, width - tensor.shape[-3], 0)).transpose(-3, -2)


def cut_layers(layers: list[tuple[torch.Tensor, torch.Tensor]], row: int, length: int) -> KeysValues:
    """The first keys and values [L, length, G, D] of a row, from those [B, G, T, D] of each layer."""
    own = [(keys[row, :, :length].transpose(0, 1), values[row, :, :length].transpose(0, 1)) for keys, values in layers]
    return KeysValues.of_layers(own)
