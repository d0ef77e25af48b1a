"""Which examples make a step, how they are split over ranks and micro-batches, and what a micro-batch holds.

All of it is a pure function of the seed, the step and the lengths: every rank computes the same plan without a message,
the order does not depend on the world size, and a step number is all that a resume needs.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptune_dist.data.encode import Examples

# an example and the members of the bank that read it
Unit = tuple[int, tuple[int, ...]]
# micro step -> rank -> units; an empty list is a rank that idles along with weight zero
Plan = list[list[list[Unit]]]
# Where examples have owners: how uneven ranks' work may be before an example that may travel, or any, is lent.
MOST_UNEVEN, MOST_UNEVEN_AT_ALL = 1.05, 1.3
ONE_IN_TRAVELS = 4


@functools.lru_cache(maxsize=16)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The examples of one epoch in order: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def step_examples(step: int, *, batch_size: int, num_examples: int, seed: int) -> list[int]:
    """Examples of optimizer step `step` (the first is 1): epochs follow one another without a gap, none is dropped."""
    first = (step - 1) * batch_size
    positions = range(first, first + batch_size)
    return [int(epoch_order(num_examples, seed, p // num_examples)[p % num_examples]) for p in positions]


def join_readers(readers: Iterable[tuple[int, int]]) -> list[Unit]:
    """Units from (example, member) pairs: an example that a member meets twice, at an epoch's seam, makes two."""
    units: list[dict[int, list[int]]] = []
    for example, member in readers:
        free = next((unit for unit in units if member not in unit.get(example, [])), None)
        if free is None:
            units.append(free := {})
        free.setdefault(example, []).append(member)
    return [(example, tuple(members)) for unit in units for example, members in unit.items()]


def plan_micro_batches(
    units: Sequence[Unit], cost: Callable[[list[Unit]], int], *, world_size: int, micro_batch_tokens: int,
    work: Callable[[list[Unit]], int] | None = None,
) -> Plan:  # fmt: skip
    """Split units into micro-batches whose `cost` is at most `micro_batch_tokens`, one for every rank at a time.

    Units are sorted by cost and cut into as few windows as will do; the units of a window, which are of like length,
    are dealt to the ranks so that each has like work. A unit's members are split where they are too many together; one
    member's row that is longer than the budget is a micro-batch of its own.

    With `work`, what a unit costs where its context is held, examples have owners: rank `example % world_size` holds
    its context. One example in four may be lent for the sake of even work, any where it would be very uneven.
    """
    pieces = [piece for unit in units for piece in split_unit(unit, cost, micro_batch_tokens)]
    sizes = {piece: cost([piece]) for piece in pieces}
    loads = {piece: work([piece]) for piece in sizes} if work else sizes
    pieces.sort(key=lambda piece: -sizes[piece])
    # Together they cost less than apart where they share positions, and more where they are padded.
    least = min(cost(pieces), sum(sizes[piece] for piece in pieces))
    num_windows = max(1, math.ceil(least / (world_size * micro_batch_tokens)))
    while True:
        windows = cut_evenly(pieces, sizes, num_windows)
        plan = [
            deal_to_owners(window, loads, world_size) if work else deal(window, sizes, world_size) for window in windows
        ]
        if all(len(share) < 2 or cost(share) <= micro_batch_tokens for shares in plan for share in shares):
            return plan
        num_windows += 1 + num_windows // 20


def split_unit(unit: Unit, cost: Callable[[list[Unit]], int], most: int) -> list[Unit]:
    """A unit in as few parts with fewer members as fit."""
    example, members = unit
    for num_parts in range(1, len(members) + 1):
        size = math.ceil(len(members) / num_parts)
        parts = [(example, members[i : i + size]) for i in range(0, len(members), size)]
        if size == 1 or cost([parts[0]]) <= most:
            return parts
    return [unit]


def cut_evenly(pieces: list[Unit], sizes: dict[Unit, int], num: int) -> list[list[Unit]]:
    """`num` runs of like total size, some perhaps empty and then left out."""
    total, done = sum(sizes[piece] for piece in pieces), 0
    windows: list[list[Unit]] = [[] for _ in range(num)]
    for piece in pieces:
        middle = done + sizes[piece] / 2
        windows[min(num - 1, int(num * middle / total)) if total else 0].append(piece)
        done += sizes[piece]
    return [window for window in windows if window]


def deal(window: list[Unit], sizes: dict[Unit, int], world_size: int) -> list[list[Unit]]:
    """The window's units, the largest first, to whichever rank has least."""
    shares: list[list[Unit]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for piece in window:
        rank = loads.index(min(loads))
        shares[rank].append(piece)
        loads[rank] += sizes[piece]
    return shares


def deal_to_owners(window: list[Unit], sizes: dict[Unit, int], world_size: int) -> list[list[Unit]]:
    """The window's units to their owners; where that is too uneven some are lent."""
    shares: list[list[Unit]] = [[piece for piece in window if piece[0] % world_size == r] for r in range(world_size)]
    loads = [sum(sizes[piece] for piece in share) for share in shares]
    even = sum(loads) / world_size
    for most, may_travel in ((MOST_UNEVEN, travels), (MOST_UNEVEN_AT_ALL, lambda example, world_size: True)):
        for _ in window:
            heaviest, lightest = loads.index(max(loads)), loads.index(min(loads))
            gap = loads[heaviest] - loads[lightest]
            lent = [piece for piece in shares[heaviest] if may_travel(piece[0], world_size) and sizes[piece] < gap]
            if loads[heaviest] <= most * even or not lent:
                break
            best = min(lent, key=lambda piece: abs(gap - 2 * sizes[piece]))
            shares[heaviest].remove(best)
            shares[lightest].append(best)
            loads[heaviest] -= sizes[best]
            loads[lightest] += sizes[best]
    return shares


def travels(example: int, world_size: int) -> bool:
    """Whether an example may be lent for a small gain: always the same ones, so that few contexts are held twice."""
    return example // world_size % ONE_IN_TRAVELS == 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch: token ids of its rows in three parts each, and who reads which row.

    contexts: what stands before the virtual tokens; rests: input after them; targets: what is supervised (an encoder's:
    the number of the label). readers: (row, member) pairs; every loss is one reader's. held: what was computed of each
    row's context, where it has one. most_targets: supervised tokens of whichever rank has most in this micro-step.
    numbers: each row's target, where targets are numbers.
    """

    contexts: list[np.ndarray]
    rests: list[np.ndarray]
    targets: list[np.ndarray]
    readers: list[tuple[int, int]]
    pad_id: int
    held: list[Any] | None = None
    most_targets: int = 0
    numbers: list[float | None] | None = None

    def with_held(self, held: list[Any]) -> "Batch":
        return replace(self, held=held)


def collate(examples: Examples, shares: list[list[Unit]], rank: int, pad_id: int) -> Batch:
    """A rank's micro-batch of a micro-step; one that idles gets one padding token and nothing to predict."""
    units = shares[rank]
    most_targets = max(sum(len(some) * int(examples.num_targets[i]) for i, some in share) for share in shares)
    if not units:
        nothing, padding = np.zeros(0, np.int32), np.array([pad_id], np.int32)
        has_contexts = bool(examples.num_context.any())
        parts = ([padding], [nothing]) if has_contexts else ([nothing], [padding])
        return Batch(*parts, [nothing], [(0, 0)], pad_id, most_targets=most_targets)
    rows = [example for example, _ in units]
    return Batch(
        [examples.context_ids(i) for i in rows],
        [examples.rest_ids(i) for i in rows],
        [examples.target_ids(i) for i in rows],
        [(row, member) for row, (_, members) in enumerate(units) for member in members],
        pad_id,
        most_targets=most_targets,
        numbers=[examples.number(i) for i in rows],
    )


def pad_rows(rows: list[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T], padded on the right to at least one position, and where there is a token [B, T]."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(1, int(lengths.max()))), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids, np.arange(ids.shape[1]) < lengths[:, None]
