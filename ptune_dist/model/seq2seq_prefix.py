"""Keys and values that are read before an encoder's rows, and before what a decoder writes and reads of the encoder.

A decoder takes them as what it has read before, in a cache. An encoder takes no cache, so a hook gives each of its
attentions one. It comes with the arguments of the layers: one that is computed again in backward has it too.
In both, positions are counted as if the prefix stood before the row: T5's relative biases are those of tokens there.

Shapes: B rows, W prefix positions with padding, T positions, L layers, G key/value heads, D width of a head.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache

from ptune_dist.base.layers import layer_stacks
from ptune_dist.errors import UserError
from ptune_dist.model.attention_calls import hands_options_on
from ptune_dist.model.given_cache import GivenCache, pad_contexts
from ptune_dist.model.keys_values import KeysValues
from ptune_dist.prompts.method import Contribution
from ptune_dist.prompts.stacks import ALL, FIELDS

PREFIX = "encoder_prefix"  # how it is named among the arguments of an encoder's layers
CACHE = "past_key_values"


class Prefixes:
    """Prefixes of rows, padded on the left to W: what a layer reads first, and which of it is there [B, W]."""

    def __init__(self, parts: Sequence[KeysValues], device: torch.device):
        """`parts`: each row's; all may be empty."""
        longest = max(part.length for part in parts)
        lengths = torch.tensor([part.length for part in parts])
        self.layers = pad_contexts(list(parts)) if longest else []
        self.present = (torch.arange(longest) >= longest - lengths[:, None]).long().to(device)

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask [B, W + T] of rows whose own is [B, T]."""
        return torch.cat([self.present.to(mask), mask], dim=1)

    def cache(self) -> DynamicCache:
        """As a decoder continues from it."""
        return DynamicCache(self.layers) if self.layers else DynamicCache()


def prefixes_of(
    stack: str, members: Sequence[int], contributions: Sequence[Contribution], like: torch.Tensor
) -> Prefixes | None:
    """What each row reads first in the layers of a stack, in the dtype of `like`; None where no contribution has it.

    `members`: the number of each row's contribution.
    """
    found = [keys_values_of(contribution, stack) for contribution in contributions]
    some = next((part for part in found if part is not None), None)
    if some is None:
        return None
    empty = some.cut(slice(0))
    return Prefixes([(found[member] or empty).to(like.dtype) for member in members], like.device)


def keys_values_of(contribution: Contribution, stack: str) -> KeysValues | None:
    """A contribution's keys and values of a stack, [L, P, G, D] each."""
    keys, values = (getattr(contribution, FIELDS[stack] + name) for name in ("keys", "values"))
    return None if keys is None else KeysValues(keys, values)


def unread(contributions: Sequence[Contribution]) -> torch.Tensor | int:
    """Zero: under ZeRO-3 every rank needs the same backward pass, whichever members its rows are for."""
    found = [keys_values_of(contribution, stack) for contribution in contributions for stack in ALL]
    return sum(layer[:0].sum() for some in found if some is not None for part in some for layer in part)


class NeverUpdated(dict):
    """What a decoder notes of a layer, that its keys and values of the encoder's output are there, is forgotten."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class GivenPair(EncoderDecoderCache):
    """Prefixes of a decoder's own positions and of the encoder's output; stores nothing, as `GivenCache`."""

    def __init__(self, own: Cache, crossed: Cache):
        super().__init__(own, crossed)
        self.is_updated = NeverUpdated()


def open_cache(own: DynamicCache, crossed: DynamicCache) -> EncoderDecoderCache:
    """A cache to continue from prefixes: the encoder's output is still to be read behind that of `crossed`."""
    cache = EncoderDecoderCache(own, crossed)
    cache.is_updated = {}
    return cache


class OfLayer(Cache):
    """`GivenCache` of one layer: an encoder's attention need not know its own number."""

    def __init__(self, whole: GivenCache, number: int):
        super().__init__(layers=[])
        self._whole = whole
        self._number = number

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._whole.update(key_states, value_states, self._number)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._whole.get_seq_length()


def check_lengths(base: PreTrainedModel, lengths: Sequence[int]) -> None:
    """Raise UserError for members with prefixes of several lengths where a decoder counts positions from the longest.

    Relative positions are the same wherever a row begins.
    """
    if len(set(lengths)) > 1 and not any(hasattr(m, "relative_attention_bias") for m in base.get_decoder().modules()):
        raise UserError(
            f"sweep: the decoder of {base.config.model_type} models counts positions after the longest of all members' "
            f"prefixes, and theirs have {' and '.join(map(str, sorted(set(lengths))))} positions: train those of one "
            "length together"
        )


def open_encoder(base: PreTrainedModel) -> None:
    """Have the attentions of an encoder's layers read the prefix that its pass is given by the name `PREFIX`.

    Raises UserError for an encoder that computes attention in a way of its own.
    """
    encoder = base.get_encoder()
    if getattr(encoder, "reads_prefix", False):
        return
    stack = layer_stacks(base)[0]
    attentions = [find_attention(layer) for layer in stack]
    kinds = {type(encoder)} | {type(layer) for layer in stack} | {type(m) for layer in stack for m in above(layer)}
    if not all(attentions) or not all(map(hands_options_on, kinds)):
        raise UserError(
            f"prompt.placement: the encoder of {base.config.model_type} models computes attention in a way of its own, "
            "without keys and values that are given: use decoder"
        )
    for number, attention in enumerate(attentions):
        assert attention is not None
        attention.register_forward_pre_hook(give_to_layer(number), with_kwargs=True)
    encoder.reads_prefix = True


def find_attention(layer: nn.Module) -> nn.Module | None:
    """The only module of an encoder's layer whose forward takes a cache and is no layer around another one."""
    found = [m for m in layer.modules() if m is not layer and takes_cache(m)]
    inner = [m for m in found if not any(other is not m and other in list(m.modules()) for other in found)]
    return inner[0] if len(inner) == 1 else None


def above(layer: nn.Module) -> list[nn.Module]:
    """The modules between a layer and its attention."""
    attention = find_attention(layer)
    inside = [m for m in layer.modules() if m is not layer and m is not attention]
    return [m for m in inside if not isinstance(m, nn.ModuleList) and attention in list(m.modules())]


def takes_cache(module: nn.Module) -> bool:
    return CACHE in inspect.signature(type(module).forward).parameters


def give_to_layer(number: int) -> Any:
    """A hook that gives an attention what layer `number` reads first."""

    def give(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = kwargs.pop(PREFIX, None)
        if given is None:
            return None
        return args, kwargs | {CACHE: OfLayer(given, number)}

    return give
