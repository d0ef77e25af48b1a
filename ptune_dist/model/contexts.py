"""Contexts of a micro-batch: from the lead, from the cache, or computed now; the same number of passes on every rank.

The lead is what the contexts of all training rows begin with: its keys/values are computed once per job, and every
context that begins with it continues from there.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS
from ptune_dist.data.batches import Batch, HeldPart
from ptune_dist.distributed.world import World
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.below import BelowReader
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel

FEWEST_LEAD_TOKENS = 8  # a shorter one saves less than it costs to treat apart

Read = Callable[[Contexts], list[tuple[torch.Tensor, ...]]]


class ContextReader:
    """Gives batches what their contexts leave. `read` runs the base; it is collective where the base is sharded."""

    def __init__(self, read: Read, model: PromptedModel, world: World, *, cache: ContextCache | None, is_sharded: bool):
        self.cache = cache
        self._read = read
        self._model = model
        self._world = world
        self._must_agree = is_sharded and world.size > 1
        # Between hosts: what NCCL agrees on has to be copied from the GPU, which waits for all work before.
        self._hosts = dist.new_group(backend="gloo") if self._must_agree and world.device.type == "cuda" else None
        self._lead_tokens = np.zeros(0, np.int32)
        self._lead: KeysValues | None = None
        self._below = BelowReader(read, self._agree, model, cache)

    def set_lead(self, tokens: np.ndarray, is_whole: bool) -> None:
        """What contexts begin with; `is_whole`: they end with it too."""
        if self._model.uses_segments and len(tokens) and (len(tokens) >= FEWEST_LEAD_TOKENS or is_whole):
            self._lead_tokens = tokens

    def take_counts(self) -> tuple[int, int]:
        """Hits and misses of the cache since the last call."""
        return self.cache.take_counts() if self.cache else (0, 0)

    def plan(self, batch: Batch) -> Batch:
        """The batch with what `hold` will find for each row, known from the tokens alone."""
        if self._model.placement not in PLACEMENTS_WITH_CONTEXTS:
            return replace(batch, held_parts=[()] * len(batch.contexts))
        return replace(batch, held_parts=[self._parts_of(tokens) for tokens in batch.contexts])

    def _parts_of(self, tokens: np.ndarray) -> tuple[HeldPart, ...]:
        lead = len(self._lead_tokens) if self._begins(tokens) else 0
        parts = [HeldPart("lead", lead), HeldPart(tokens.tobytes(), len(tokens) - lead)]
        return tuple(part for part in parts if part.length)

    def hold(self, batch: Batch) -> Batch:
        """The batch with what was computed of each row's context. Collective: every rank must call.

        Where the base is sharded a rank whose rows have no contexts makes the passes that the others' rows need.
        Members whose prompts enter at a later layer read what the layers below have left.
        """
        return self._below.hold(self._hold_contexts(batch))

    def _hold_contexts(self, batch: Batch) -> Batch:
        if self._model.placement not in PLACEMENTS_WITH_CONTEXTS or 0 not in self._model.start_layers:
            return batch
        if len(self._lead_tokens) and self._lead is None:
            self._lead = self._wrap(self._read(Contexts([self._lead_tokens], batch.pad_id))[0])
        needed = [tokens for tokens in batch.contexts if len(tokens) or self._model.needs_empty_contexts]
        distinct = {tokens.tobytes(): tokens for tokens in needed}
        held: dict[bytes, tuple] = {}
        for key, tokens in distinct.items():
            recalled = self._recall(tokens)
            if recalled is not None:
                held[key] = recalled
        missing = {
            begins: [key for key in distinct if key not in held and self._begins(distinct[key]) == begins]
            for begins in (True, False)
        }
        num_passes = self._count_passes(missing)
        for begins, keys in missing.items():
            contexts = [distinct[key] for key in keys]
            computed = self._compute(contexts, batch.pad_id, begins, num_passes[begins])
            held |= dict(zip(keys, computed, strict=True))
        if not held:
            return batch
        nothing = () if self._model.uses_segments else (empty_like(next(iter(held.values()))[0]),)
        return batch.with_held([held.get(tokens.tobytes(), nothing) for tokens in batch.contexts])

    def _begins(self, tokens: np.ndarray) -> bool:
        """Whether a context begins with the lead."""
        lead = self._lead_tokens
        return len(lead) > 0 and len(tokens) >= len(lead) and np.array_equal(tokens[: len(lead)], lead)

    def _recall(self, tokens: np.ndarray) -> tuple | None:
        """What needs no pass: a context that is the lead, or one that the cache holds."""
        lead = (self._lead,) if self._begins(tokens) else ()
        if lead and len(tokens) == len(self._lead_tokens):
            return lead
        found = self.cache.get(self._key(tokens)) if self.cache else None
        if found is None:
            return None
        return (*lead, self._wrap(tuple(found[str(i)] for i in range(len(found)))))

    def _count_passes(self, missing: dict[bool, list[bytes]]) -> dict[bool, int]:
        """Passes for contexts that begin with the lead, and for the others; where ranks must agree, the most of any.

        With a cache each context is computed by itself: in a batch its last bits would depend on what else was missing,
        and a run that is resumed with an empty cache would not be the undisturbed one bit for bit. Groups of a data
        set's contexts that are always computed together would be exact, but each miss would compute all of its group.
        """
        counts = [len(keys) if self.cache else min(1, len(keys)) for keys in missing.values()]
        return dict(zip(missing, self._agree(counts), strict=True))

    def _agree(self, counts: list[int]) -> list[int]:
        """Where ranks must make the same passes, the most of each number that any of them has."""
        if not self._must_agree:
            return counts
        most = torch.tensor(counts)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._hosts)
        return most.tolist()

    def _compute(self, contexts: list[np.ndarray], pad_id: int, begins: bool, num_passes: int) -> list[tuple]:
        """Contexts that all begin with the lead, or all do not; in `num_passes`, some of them idle."""
        lead = self._lead if begins else None
        groups = [contexts] if contexts else []
        if self.cache:
            groups = [[tokens] for tokens in contexts]
        idle = np.append(self._lead_tokens if begins else self._lead_tokens[:0], pad_id)
        computed = []
        for number in range(num_passes):
            tokens = groups[number] if number < len(groups) else [idle]
            passed = self._read(Contexts(tokens, pad_id, lead))
            computed += passed if number < len(groups) else []
        if self.cache:
            for tokens, tensors in zip(contexts, computed, strict=True):
                self.cache.put(self._key(tokens), {str(i): tensor for i, tensor in enumerate(tensors)})
        before = () if lead is None else (lead,)
        return [(*before, self._wrap(tensors)) for tensors in computed]

    def _key(self, tokens: np.ndarray) -> np.ndarray:
        """What is held of a context is without its lead."""
        return np.append(tokens, len(self._lead_tokens) if self._begins(tokens) else 0)

    def _wrap(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """Keys/values, or what an encoder left [C, D]."""
        return KeysValues.of(tensors) if len(tensors) > 1 else tensors[0]


def empty_like(held: KeysValues | torch.Tensor) -> KeysValues | torch.Tensor:
    """What an empty context leaves."""
    return held.cut(slice(0)) if isinstance(held, KeysValues) else held[:0]
