"""Prompts that enter the base at a later layer: the passes that a batch needs, and what the layers below leave of rows.

The layers below a prompt read a row without it. They need no gradient, members whose prompts enter at one layer share
what they leave, and the context cache keeps it. Members are grouped by the layer where their prompts enter, layer 0
included: each group is a pass of its own.

Shapes: T tokens, C positions of a context, H hidden size, S readers.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ptune_dist.data.batches import Batch, HeldPart, idle_batch
from ptune_dist.data.label_tree import build_label_tree
from ptune_dist.distributed.world import to_device
from ptune_dist.model.attention import KeysValues
from ptune_dist.prompts.method import Contribution

T = TypeVar("T")


class Below(NamedTuple):
    """What the layers below leave of a row, [T - C, H] of what stands after its context.

    Its context's keys/values, which no prompt precedes either, are those of the layers above.
    """

    hidden: torch.Tensor
    context: KeysValues | None = None

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor, ...]) -> "Below":
        """From what is kept: hidden states, perhaps keys and values."""
        hidden, *context = tensors
        return cls(hidden, KeysValues.of(context) if context else None)


class Lower(NamedTuple):
    """How the layers below a prompt, which enters at layer `start`, read a row: after these keys/values, or alone.

    Members of one `start` and `digest` share what those layers leave.
    """

    start: int
    digest: str = ""
    before: KeysValues | None = None

    @property
    def key(self) -> tuple[int, str]:
        return (self.start, self.digest)

    @classmethod
    def of(cls, contribution: Contribution, dtype: torch.dtype) -> "Lower":
        keys, values = contribution.lower_keys, contribution.lower_values
        if keys is None or values is None:
            return cls(contribution.start_layer)
        before = KeysValues(keys, values).to(dtype)
        numbers = torch.cat([part.detach().float().cpu().flatten() for part in before.tensors])
        shape = str(tuple(before.tensors[0].shape)).encode()
        return cls(contribution.start_layer, hashlib.sha256(shape + numbers.numpy().tobytes()).hexdigest(), before)


@dataclass(frozen=True)
class Part:
    """The readers of a batch whose prompts enter at one layer, and their numbers in the batch; none where it idles."""

    batch: Batch
    numbers: np.ndarray


class FromLayer:
    """Attention of the layers from `first` on, whose keys/values from outside count from there."""

    def __init__(self, attention: Any, first: int):
        self._attention = attention
        self._first = first

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, **settings: Any) -> torch.Tensor:
        return self._attention.attend(q, k, v, layer=layer - self._first, **settings)


def split_by_start(
    batch: Batch, start_layers: Sequence[int], idle_below: Callable[[int], Any], *, with_contexts: bool
) -> list[Part]:
    """A part for each layer at which a member's prompt enters, the same layers on every rank.

    `idle_below`: what stands for an idle row of a member. `with_contexts`: virtual tokens stand after contexts.
    """
    found = []
    for number, start in enumerate(sorted(set(start_layers))):
        prepared = None if batch.prepared is None else batch.prepared[number]
        own = [i for i, (_, member) in enumerate(batch.readers) if start_layers[member] == start]
        if own:
            part = replace(pick_readers(batch, own), prepared=prepared)
            if start and with_contexts:
                part = hold_above(part, start)
        else:
            member = start_layers.index(start)
            part = replace(idle_batch(batch.pad_id, has_contexts=False), readers=[(0, member)])
            trees = None if batch.trees is None else [build_label_tree([])]
            below = idle_below(member) if start and batch.below is not None else None
            tasks = None if batch.tasks is None else [0]
            part = replace(part, prepared=prepared, held_parts=[()], trees=trees, tasks=tasks, below=below)
        found.append(Part(part, np.array(own, np.int64)))
    return found


def pick_readers(batch: Batch, numbers: list[int]) -> Batch:
    """The batch with some of its readers, and with the rows that they read."""
    if len(numbers) == len(batch.readers):
        return batch
    rows = sorted({batch.readers[number][0] for number in numbers})

    def pick(values: list[Any] | None) -> Any:
        return None if values is None else [values[row] for row in rows]

    return replace(
        batch,
        contexts=pick(batch.contexts),
        rests=pick(batch.rests),
        targets=pick(batch.targets),
        readers=[(rows.index(batch.readers[number][0]), batch.readers[number][1]) for number in numbers],
        held=pick(batch.held),
        numbers=pick(batch.numbers),
        held_parts=pick(batch.held_parts),
        trees=pick(batch.trees),
        tasks=pick(batch.tasks),
        below=None if batch.below is None else {key: pick(found) for key, found in batch.below.items()},
    )


def hold_above(batch: Batch, start: int) -> Batch:
    """The batch with its contexts as the layers from `start` on read them, or with what is known of them before."""
    parts = [(HeldPart(("above", start, c.tobytes()), len(c)),) if len(c) else () for c in batch.contexts]
    if batch.below is None:
        return replace(batch, held=None, held_parts=parts)
    # However the layers below read the rows, their contexts are the same.
    found = zip(*(rows for (layer, _), rows in batch.below.items() if layer == start), strict=True)
    contexts = [next((row.context for row in rows if row is not None and row.context), None) for rows in found]
    held = [() if context is None else (context,) for context in contexts]
    return replace(batch, held=held, held_parts=parts)


def join_tensors(found: list[torch.Tensor], parts: list[Part]) -> torch.Tensor:
    """What was found for the readers of each part [n], for those of the whole batch [S]."""
    if len(parts) == 1:
        return found[0]
    # An idle part's number is left out, but its pass belongs to the graph of all.
    shown = [values[: len(part.numbers)] for values, part in zip(found, parts, strict=True)]
    order = np.argsort(np.concatenate([part.numbers for part in parts]), kind="stable")
    joined = torch.cat(shown)
    unread = sum(values[:0].sum() for values in found)
    return joined[to_device(torch.from_numpy(order), joined.device)] + unread


def join_lists(found: list[list[T]], parts: list[Part]) -> list[T]:
    """As `join_tensors`, of lists."""
    pairs = [
        pair for values, part in zip(found, parts, strict=True) for pair in zip(part.numbers, values, strict=False)
    ]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
