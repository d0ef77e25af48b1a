"""Answers in progress: the keys/values of their rows, and attention of passes that read one more token of each.

The rows of a pool end at one column, so that a pass writes all new keys/values at one place; where a row begins differs
from row to row. What all rows read first, the lead, is held once.

Shapes: n rows, N live positions, L layers, P positions of the lead, C columns, H heads, G key/value heads, R = H / G,
D width of a head.
"""

import math
from typing import Protocol

import numpy as np
import torch

from ptune_dist.data.batches import Batch
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.attention_layouts import RecordedSegments

SPARE_COLUMNS = 32  # beyond what is used now, so that rows are not moved at every pass
FEWEST_COLUMNS = 48
POOL_RATIO = 1.4  # of the longest rows of a pool and those of the next


class Decoder(Protocol):
    """Rows of answers in progress, of one member's prompt. `start` and `run` are collective where the base is sharded.

    Rows are known by their places, which change with `settle`.
    """

    enters_any_time: bool  # rows may enter beside others; else only where none is in progress
    shares_beginnings: bool  # `start` reads what all inputs begin with
    needs_contexts: bool  # of every row that enters, even of an empty one
    takes_contexts: bool  # what was computed of contexts is given to it; else it reads them itself

    @property
    def held_per_position(self) -> int:
        """The keys/values of how many positions weigh no more than what training holds of one position."""
        ...

    def own_length(self, context: np.ndarray, rest: np.ndarray) -> int:
        """The positions of an input that a row has for itself; `rest` is without what the lead has of it."""
        ...

    def start(self, batch: Batch) -> None:
        """Read what all inputs begin with, the lead: the one row's context, the prompt, and the row's rest.

        It is left out where inputs have contexts of their own.
        """
        ...

    def run(self, tokens: list[int], new: Batch, *, is_any_new: bool, is_new: bool) -> torch.Tensor:
        """Logits [n + m, V] after the newest token of each row, and after the whole inputs of the rows of `new`.

        Without `is_new` that batch is a placeholder; it is read all the same where this rank has nothing else to do, or
        another one has rows that enter (`is_any_new`) and all must compute the same.
        """
        ...

    def settle(self, leaving: list[int], entering: list[int], needs: list[int]) -> list[int]:
        """After a pass: rows in progress that are finished, and rows of its new batch that continue, by their places.

        `needs`: of those that enter, the most positions of their own. Returns the rows that are in progress now, in
        their new order, each by its place among the logits of the pass.
        """
        ...


class KeysValuesPool:
    """The keys/values of rows, in the order in which they came; the last one takes the place of one that leaves."""

    def __init__(self, lead: KeysValues | None):
        self.lead = lead
        self._starts: list[int] = []  # each row's first column
        self._end = 0  # the column after the last
        self._held: list[torch.Tensor] = []  # keys and values, [L, slots, G, C, D] each
        self._like: list[torch.Tensor] = []  # the same without positions: [L, 0, G, D] each

    @property
    def num_rows(self) -> int:
        return len(self._starts)

    @property
    def num_lead(self) -> int:
        return self.lead.length if self.lead else 0

    @property
    def lengths(self) -> list[int]:
        """The positions of each row, lead included."""
        return [self.num_lead + self._end - start for start in self._starts]

    def add(self, rows: list[KeysValues], num_columns: int) -> None:
        """Rows that were read, lead excluded. Where room must be made, it is made for so many positions."""
        longest = max(row.length for row in rows)
        if not self._starts:
            self._end = longest
        shift = max(0, longest - self._end)  # of the rows that are there
        self._like = [tensor[:, :0] for tensor in rows[0].tensors]
        self._reserve(self.num_rows + len(rows), shift, num_columns)
        for row in rows:
            slot = self.num_rows
            self._starts.append(self._end - row.length)
            for held, tensor in zip(self._held, row.tensors, strict=True):
                held[:, slot] = 0  # nothing of a former row, which may not have been a number
                held[:, slot, :, self._starts[slot] : self._end] = tensor.transpose(1, 2)

    def remove(self, slot: int) -> None:
        """The row leaves; the last row takes its place."""
        last = self.num_rows - 1
        if slot != last:
            for held in self._held:
                held[:, slot] = held[:, last]
            self._starts[slot] = self._starts[last]
        self._starts.pop()

    def advance(self) -> None:
        """A pass has written the keys/values of every row's next position."""
        self._end += 1

    def make_room(self) -> None:
        """Before a pass: a free column."""
        if self._starts:
            self._reserve(self.num_rows, 0, 0)

    def _reserve(self, num_rows: int, shift: int, num_columns: int) -> None:
        """Have room for so many rows and a free column; where that takes a new tensor, drop columns that none reads."""
        if self._held and shift == 0:
            _, num_slots, _, num_columns_held, _ = self._held[0].shape
            if num_rows <= num_slots and self._end < num_columns_held:
                return
        first = min(self._starts, default=0)
        used = self._end - first
        end = used + shift
        num_columns = max(num_columns, end + SPARE_COLUMNS)
        num_slots = num_rows + num_rows // 4  # rows enter a few at a time
        room = [like.new_zeros(len(like), num_slots, like.shape[2], num_columns, like.shape[3]) for like in self._like]
        if self._starts:
            for new, held in zip(room, self._held, strict=True):
                new[:, : self.num_rows, :, shift:end] = held[:, : self.num_rows, :, first : self._end]
        self._starts = [start - first + shift for start in self._starts]
        self._end = end
        self._held = room

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float, mask: torch.Tensor
    ) -> torch.Tensor:
        """[n, H, D] of every row's next position: q [n, H, D], k and v [n, G, D], what is not read [n, P + C]."""
        count = self.num_rows
        first = min(self._starts)
        for held, own in zip(self._held, (k, v), strict=True):
            held[layer, :count, :, self._end] = own
        keys, values = (held[layer, :count, :, first : self._end + 1] for held in self._held)  # [n, G, C, D] each
        q = (q * scale).unflatten(1, (k.shape[1], -1))  # [n, G, R, D]
        scores = q @ keys.transpose(2, 3)  # [n, G, R, C]
        if self.lead is not None:
            grouped = q.transpose(0, 1)  # [G, n, R, D]
            over_lead = grouped.flatten(1, 2) @ self.lead.keys[layer].permute(1, 2, 0)  # [G, n * R, P]
            scores = torch.cat([over_lead.unflatten(1, grouped.shape[1:3]).transpose(0, 1), scores], dim=3)
        scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        out = shares[..., self.num_lead :] @ values  # [n, G, R, D]
        if self.lead is not None:
            of_lead = shares[..., : self.num_lead].transpose(0, 1)  # [G, n, R, P]
            over_lead = of_lead.flatten(1, 2) @ self.lead.values[layer].transpose(0, 1)
            out = out + over_lead.unflatten(1, of_lead.shape[1:3]).transpose(0, 1)
        return out.flatten(1, 2)

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor:
        """What the rows' next positions do not read [n, P + C]: other rows' columns, and what is out of the window."""
        first = min(self._starts)
        starts = torch.tensor(self._starts, device=device)[:, None] - first
        columns = torch.arange(self._end + 1 - first, device=device)
        lead = torch.arange(self.num_lead, device=device).expand(self.num_rows, -1)
        is_unread = torch.cat([lead < 0, columns < starts], dim=1)
        if window is None:
            return is_unread
        positions = torch.cat([lead, columns - starts + self.num_lead], dim=1)
        queries = torch.tensor(self.lengths, device=device)[:, None]
        return is_unread | (queries - positions >= window)


class Pools:
    """Pools of rows of like length, so that little of what is read is padding. Rows are numbered pool after pool."""

    def __init__(self, lead: KeysValues | None):
        self.lead = lead
        self._pools: dict[int, KeysValuesPool] = {}  # by the most positions of a row's own

    @property
    def in_order(self) -> list[KeysValuesPool]:
        return [self._pools[bound] for bound in sorted(self._pools)]

    @property
    def num_lead(self) -> int:
        return self.lead.length if self.lead else 0

    @property
    def lengths(self) -> list[int]:
        """The positions of each row, lead included."""
        return [length for pool in self.in_order for length in pool.lengths]

    def settle(self, leaving: list[int], entering: dict[int, KeysValues], needs: dict[int, int]) -> list[int]:
        """Rows leave and enter; returns all rows by their old numbers. Those that enter have numbers above the others.

        needs: the most positions that a row will have of its own.
        """
        places: dict[int, list[int]] = {}
        first = 0
        for bound in sorted(self._pools):
            pool = self._pools[bound]
            count = pool.num_rows
            own = list(range(first, first + count))
            for slot in sorted((row - first for row in leaving if first <= row < first + count), reverse=True):
                pool.remove(slot)
                own[slot] = own[-1]
                own.pop()
            first += count
            places[bound] = own
        for bound in {round_up(need) for need in needs.values()}:
            new = [number for number, need in needs.items() if round_up(need) == bound]
            pool = self._pools.setdefault(bound, KeysValuesPool(self.lead))
            pool.add([entering[number] for number in new], bound)
            places[bound] = places.get(bound, []) + new
        self._pools = {bound: pool for bound, pool in self._pools.items() if places[bound]}
        return [row for bound in sorted(self._pools) for row in places[bound]]


def round_up(need: int) -> int:
    """The positions that rows of one pool have at most."""
    bound = FEWEST_COLUMNS
    while bound < need:
        bound = math.ceil(bound * POOL_RATIO)
    return bound


class DecodePass:
    """Attention of one pass: the next positions of rows in pools, then whole new rows, whose keys/values it records."""

    def __init__(self, pools: list[KeysValuesPool], new: RecordedSegments | None, device: torch.device):
        self._pools = pools
        self._new = new
        self._device = device
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        found: list[torch.Tensor] = []
        first = 0
        for number, pool in enumerate(self._pools):
            if (number, window) not in self._masks:
                self._masks[number, window] = pool.mask(window, self._device)
            rows = slice(first, first + pool.num_rows)
            found.append(pool.attend(q[rows], k[rows], v[rows], layer, scale, self._masks[number, window]))
            first += pool.num_rows
        if self._new is not None:
            found.append(self._new.attend(q[first:], k[first:], v[first:], layer=layer, scale=scale, window=window))
        return torch.cat(found)
