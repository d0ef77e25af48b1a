"""What the layers below late prompts leave of the rows of a micro-batch: from the cache, or computed now.

As for contexts, every rank makes the same number of passes over a base that is sharded, and with a cache each row is
computed by itself, so that its last bits do not depend on what else was missing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ptune_dist.data.batches import Batch
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.model.entry import Below, Lower
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel

NO_TOKEN = -1  # stands between a row's tokens and what else its key in the cache has


class Row(NamedTuple):
    """A row as the layers below read it: its tokens, and how many of them are its context."""

    tokens: bytes
    num_context: int

    @classmethod
    def of(cls, tokens: np.ndarray, num_context: int) -> "Row":
        return cls(tokens.astype(np.int64).tobytes(), num_context)

    @property
    def ids(self) -> np.ndarray:
        return np.frombuffer(self.tokens, np.int64)


class BelowReader:
    """Gives batches what the layers below leave of their rows. `read` runs the base."""

    def __init__(
        self,
        read: Callable[[Contexts], list[tuple[torch.Tensor, ...]]],
        agree: Callable[[list[int]], list[int]],
        model: PromptedModel,
        cache: ContextCache | None,
    ):
        """`agree`: the most of each number that any rank has; collective where the base is sharded."""
        self._read = read
        self._agree = agree
        self._model = model
        self._cache = cache

    def hold(self, batch: Batch) -> Batch:
        """Collective where the base is sharded: every rank must call."""
        lowers = self._model.distinct_lowers
        is_read_with_labels = batch.trees is not None and self._model.scores_trees and self._model.has_language_head
        if not lowers or is_read_with_labels:
            return batch
        rows = [Row.of(*self._model.row_below(batch, row)) for row in range(len(batch.rests))]
        held: dict[tuple[int, str], dict[Row, Below]] = {}
        missing: dict[tuple[int, str], list[Row]] = {}
        for lower in lowers:
            read = {row for row, member in batch.readers if self._model.lower_of(member).key == lower.key}
            wanted = dict.fromkeys(rows[row] for row in sorted(read))
            found = {row: self._recall(row, lower) for row in wanted}
            held[lower.key] = {row: below for row, below in found.items() if below is not None}
            missing[lower.key] = [row for row, below in found.items() if below is None]
        counts = [len(some) if self._cache else min(1, len(some)) for some in missing.values()]
        for lower, num_passes in zip(lowers, self._agree(counts), strict=True):
            held[lower.key] |= self._compute(missing[lower.key], lower, num_passes, batch.pad_id)
        return replace(batch, below={key: [found.get(row) for row in rows] for key, found in held.items()})

    def _recall(self, row: Row, lower: Lower) -> Below | None:
        found = self._cache.get(key_of(row, lower)) if self._cache else None
        return None if found is None else Below.of(tuple(found[str(i)] for i in range(len(found))))

    def _compute(self, rows: list[Row], lower: Lower, num_passes: int, pad_id: int) -> dict[Row, Below]:
        """In so many passes, some of them idle."""
        groups = [[row] for row in rows] if self._cache else [rows] if rows else []
        idle = [Row.of(np.array([pad_id]), 0)]
        found: dict[Row, Below] = {}
        for number in range(num_passes):
            some = groups[number] if number < len(groups) else idle
            lengths = [row.num_context for row in some]
            texts = [row.ids for row in some]
            passed = self._read(Contexts(texts, pad_id, lower.before, start_layer=lower.start, lengths=lengths))
            if number >= len(groups):
                continue
            for row, tensors in zip(some, passed, strict=True):
                if self._cache:
                    self._cache.put(key_of(row, lower), {str(i): tensor for i, tensor in enumerate(tensors)})
                found[row] = Below.of(tensors)
        return found


def key_of(row: Row, lower: Lower) -> np.ndarray:
    """What the cache knows a row by; no context's key has a number below 0 in it."""
    digest = np.frombuffer(bytes.fromhex(lower.digest), np.uint8)
    return np.concatenate([row.ids, [NO_TOKEN, lower.start, row.num_context], digest]).astype(np.int64)
