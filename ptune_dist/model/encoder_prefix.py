"""Keys and values that all positions of an encoder's rows attend to, in front of their own.

Bases of BERT's kind take them as `past_key_values`, which is what PEFT gives them. The others (DistilBERT, ModernBERT)
take none, so an attention function of ours puts them before the row's own.

Shapes: B rows, T positions, P positions of a prefix, L layers, G key/value heads, D width of a head.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptune_dist.base.layers import first_position, layer_stacks, num_first_layers
from ptune_dist.errors import UserError
from ptune_dist.model.attention_calls import hands_options_on
from ptune_dist.model.given_cache import GivenCache, cut_layers, pad_contexts
from ptune_dist.model.keys_values import KeysValues

NAME = "ptune_prefix"
CACHE = "past_key_values"
POSITIONS = "position_ids"


def attend_after_prefix(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix: Any = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query, key and value [B, G, T, D] -> ([B, T, G, D], None).

    `prefix` is a `LayerPrefix` or None. The signature is transformers'.
    """
    if prefix is not None:
        key, value, attention_mask = prefix.put_before(module, key, value, attention_mask, sliding_window)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **others)


class LayerPrefix:
    """The prefix of a pass for `attend_after_prefix`; without one, the keys and values of each layer are kept.

    numbers: the layer of each module, by its id. first: the layer that the prefix begins with.
    """

    def __init__(self, numbers: dict[int, int], prefix: KeysValues | None, first: int = 0):
        self._numbers = numbers
        self._prefix = prefix
        self._first = first
        self.recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer

    def put_before(
        self,
        module: nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values [B, G, P + T, D], and what queries [T] read of them [B, 1, T, P + T]."""
        layer = self._numbers[id(module)]
        if self._prefix is None:
            self.recorded[layer] = (key, value)
            return key, value, mask
        own = [part[layer - self._first].transpose(0, 1).expand(len(key), -1, -1, -1) for part in self._prefix]
        count = self._prefix.length
        keys = torch.cat([own[0], key], dim=2)
        values = torch.cat([own[1], value], dim=2)
        if window is None:
            return keys, values, mask if mask is None else pad(mask, (count, 0), value=True)
        length = key.shape[2]
        places = torch.arange(length, device=key.device)
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=key.device)
        # transformers calls the window one more than the distance that is read on either side.
        is_near = count + places[:, None] - torch.arange(count, device=key.device) < window
        return keys, values, torch.cat([is_near.expand(*mask.shape[:3], -1), mask], dim=3)


class EncoderPrefixes:
    """Gives an encoder's layers keys and values, and reads those that its layers compute."""

    def __init__(self, base: PreTrainedModel):
        """Raises UserError for a base that takes no keys and values from outside."""
        inner = base.base_model
        hands_on = hands_options_on(type(base))
        self._takes_cache = hands_on and CACHE in inspect.signature(inner.forward).parameters
        self._takes_positions = POSITIONS in inspect.signature(base.forward).parameters
        self._first_position = first_position(base)
        self._numbers: dict[int, int] = {}
        if self._takes_cache:
            return
        kind = base.config.model_type
        stack = layer_stacks(base)[0]
        above = [type(module) for module in (inner, *stack)]
        can_give = hands_on and base._supports_attention_backend and all(map(hands_options_on, above))
        if not can_give or not self._takes_positions or num_first_layers(base) is None:
            raise UserError(
                f"prompt.method: prefix_tuning gives every layer keys and values, and {kind} models compute attention "
                "in a way of their own: choose another method"
            )
        self._numbers = {id(module): number for number, layer in enumerate(stack) for module in layer.modules()}
        AttentionInterface.register(NAME, attend_after_prefix)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        base.set_attn_implementation(NAME)

    def inputs(self, prefix: KeysValues, mask: torch.Tensor, first_layer: int = 0) -> dict[str, Any]:
        """Inputs of rows whose mask is [B, T], after a prefix of the layers from `first_layer` on.

        Positions are counted from the prefix on, as PEFT's adapters do.
        """
        found: dict[str, Any] = {"attention_mask": mask}
        if self._takes_positions:
            places = self._first_position + prefix.length + torch.arange(mask.shape[1], device=mask.device)
            found[POSITIONS] = places.expand_as(mask)
        if not self._takes_cache:
            return found | {"prefix": LayerPrefix(self._numbers, prefix, first_layer)}
        ones = mask.new_ones(len(mask), prefix.length)
        found["attention_mask"] = torch.cat([ones, mask], dim=1)
        return found | {CACHE: GivenCache(pad_contexts([prefix] * len(mask)), first_layer=first_layer)}

    def recorder(self) -> "CacheRecorder | LayerRecorder":
        return CacheRecorder() if self._takes_cache else LayerRecorder(self._numbers)


class CacheRecorder:
    """Keeps the keys and values that a base of BERT's kind computes in a pass with these `inputs`."""

    def __init__(self) -> None:
        self._cache = GivenCache([], record=True)
        self.inputs: dict[str, Any] = {CACHE: self._cache}

    def cut(self, row: int, length: int) -> KeysValues:
        """Those of the first positions of a row, [L, length, G, D]."""
        return self._cache.cut(row, length)


class LayerRecorder:
    """As `CacheRecorder`, of a base that computes with `attend_after_prefix`."""

    def __init__(self, numbers: dict[int, int]):
        self._prefix = LayerPrefix(numbers, None)
        self.inputs: dict[str, Any] = {"prefix": self._prefix}

    def cut(self, row: int, length: int) -> KeysValues:
        recorded = self._prefix.recorded
        return cut_layers([recorded[number] for number in sorted(recorded)], row, length)
