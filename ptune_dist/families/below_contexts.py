"""What rows read first in the layers below a late prompt: their contexts, and then keys/values of the prompt's start.

Shapes: L layers, C positions of a context, G key/value heads, Dh width of a head, H hidden size, T tokens of a row.
"""

import numpy as np
import torch

from ptune_dist.model.keys_values import KeysValues
from ptune_dist.model.layout import Before
from ptune_dist.model.passes import Contexts


def own_texts(work: Contexts) -> list[np.ndarray]:
    """The tokens of each row after its context."""
    lengths = work.lengths or [0] * len(work.tokens)
    return [tokens[count:] for tokens, count in zip(work.tokens, lengths, strict=True)]


def below_contexts(held: list[KeysValues], work: Contexts) -> tuple[list[Before], list[KeysValues]]:
    """What each row reads first, and the keys/values themselves, in the layers below `work.start_layer`.

    `held`: those of the rows' contexts in all layers; empty where rows have none.
    """
    end = work.start_layer
    outside = [KeysValues(context.keys[:end], context.values[:end]) for context in held if context.length]
    lead = () if work.lead is None else (len(outside),)
    num_lead = 0 if work.lead is None else work.lead.length
    lengths = [context.length for context in held] or [0] * len(work.tokens)
    places = np.cumsum([length > 0 for length in lengths]) - 1
    before = [
        Before((*((int(place),) if length else ()), *lead), length + num_lead, len(lead))
        for place, length in zip(places, lengths, strict=True)
    ]
    return before, outside if work.lead is None else [*outside, work.lead]


def fill_empty(parts: list[KeysValues | None]) -> list[KeysValues]:
    """Parts of which those that are missing are empty; there is one at least."""
    like = next(part for part in parts if part is not None)
    nothing = like.cut(slice(0))
    return [nothing if part is None else part for part in parts]


def with_contexts(hidden: list[torch.Tensor], held: list[KeysValues], start: int) -> list[tuple[torch.Tensor, ...]]:
    """What `model.entry.Below` is made of: [T - C, H] of each row, and its context in the layers from `start` on."""
    if not held:
        return [(own,) for own in hidden]
    return [
        (own, *KeysValues(context.keys[start:], context.values[start:]).tensors) if context.length else (own,)
        for own, context in zip(hidden, held, strict=True)
    ]
