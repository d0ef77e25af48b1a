"""Select the examples of a step and split them over ranks and micro-batches.

A plan is a pure function of the seed, the step and the lengths. So every rank computes the same plan without
communication, the order does not depend on the world size, and a resumed run needs only the step number.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ptune_dist.data.dealing import Unit, deal, deal_to_owners, even_out
from ptune_dist.data.examples import Examples
from ptune_dist.data.label_tree import LabelTree

# micro step -> rank -> units; a rank with an empty list takes part in the micro step with weight zero
Plan = list[list[list[Unit]]]
# What a rank gets of a window has at least this many parts, so that the ranks' work is even.
LEAST_PIECES = 8


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in one epoch: a permutation that depends only on seed and epoch.

    4 bytes an example where their numbers fit; the same order as that of `Generator.permutation`.
    """
    order = np.arange(num_examples, dtype=np.uint32 if num_examples < 1 << 32 else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


@functools.lru_cache(maxsize=64)
def part_of_order(num_examples: int, seed: int, epoch: int, part: int) -> np.ndarray:
    """A part of an epoch's order, of `order_part_size` examples, so that many members' orders need little memory."""
    size = order_part_size(num_examples)
    return epoch_order(num_examples, seed, epoch)[part * size : (part + 1) * size].copy()


def order_part_size(num_examples: int) -> int:
    return max(65536, -(-num_examples // 32))


def step_examples(step: int, *, batch_size: int, num_examples: int, seed: int) -> list[int]:
    """Examples of optimizer step `step` (from 1). A batch may span two epochs; no example is dropped."""
    places = step_places(step, batch_size=batch_size, num_examples=num_examples, seed=seed)
    return [example for _, example in places]


def step_places(step: int, *, batch_size: int, num_examples: int, seed: int) -> list[tuple[int, int]]:
    """As `step_examples`, each with its epoch (from 0)."""
    size = order_part_size(num_examples)
    found = []
    for position in range((step - 1) * batch_size, step * batch_size):
        epoch, place = divmod(position, num_examples)
        part, index = divmod(place, size)
        found.append((epoch, int(part_of_order(num_examples, seed, epoch, part)[index])))
    return found


def join_readers(readers: Iterable[tuple[int, int]]) -> list[Unit]:
    """Units of (example, member) pairs; an example that a member reads twice, where epochs meet, is in two units."""
    rounds: list[dict[int, list[int]]] = []  # example -> members; a repeated pair belongs to the next round
    for example, member in readers:
        found = next((unit for unit in rounds if member not in unit.get(example, [])), None)
        if found is None:
            found = {}
            rounds.append(found)
        found.setdefault(example, []).append(member)
    return [(example, tuple(members)) for unit in rounds for example, members in unit.items()]


def plan_micro_batches(
    units: Sequence[Unit],
    cost: Callable[[list[Unit]], int],
    *,
    world_size: int,
    micro_batch_tokens: int,
    work: Callable[[list[Unit]], int] | None = None,
    flops: Callable[[Unit], int] | None = None,
    members_share: bool = True,
) -> Plan:
    """Split units into micro-batches whose `cost` is at most `micro_batch_tokens`, one per rank and micro step.

    Units are sorted by cost and cut into as few windows as possible. The units of a window, which have similar lengths,
    are distributed over the ranks so that the ranks have similar work. A unit with too many members is split by
    members, and without `members_share` so is a large one; a single member's row that exceeds the budget is a
    micro-batch of its own.

    members_share: whether members that read a row in one micro-batch share work.

    flops: what a rank computes of a unit. With it, the units of the whole step are distributed before they are cut, and
    members of a unit move to another rank where both ranks then have less to do than the busier one had, although what
    the members share is computed twice.

    With `work`, the cost of a unit on the rank that holds its context, examples have owners: rank `example %
    world_size` holds the context. To balance the work, one example in four may move to another rank; if the imbalance
    is large, any example may. `flops` does not count then.
    """
    pieces = [piece for unit in units for piece in split_unit(unit, cost, micro_batch_tokens)]
    sizes = {piece: cost([piece]) for piece in pieces}
    # Units cost less together than apart if they share positions, and more if they are padded.
    least = min(cost(pieces), sum(sizes[piece] for piece in pieces))
    num_windows = max(1, math.ceil(least / (world_size * micro_batch_tokens)))
    if world_size > 1 and not members_share:
        largest = least // (num_windows * world_size * LEAST_PIECES)
        pieces = [part for piece in pieces for part in split_unit(piece, cost, largest)]
        sizes |= {piece: cost([piece]) for piece in pieces if piece not in sizes}
    pieces.sort(key=lambda piece: -sizes[piece])
    fits = functools.partial(is_within, cost=cost, micro_batch_tokens=micro_batch_tokens)
    if flops and not work:
        split = functools.partial(split_evenly, pieces, functools.cache(flops), fits, world_size)
    else:
        loads = {piece: work([piece]) for piece in pieces} if work else sizes
        deal_window = functools.partial(deal_to_owners if work else deal, sizes=loads, world_size=world_size)
        split = functools.partial(split_windows, pieces, sizes, deal_window)
    while True:
        plan = split(num_windows)
        if all(fits(share) for shares in plan for share in shares):
            return plan
        num_windows += 1 + num_windows // 20


def is_within(share: list[Unit], cost: Callable[[list[Unit]], int], micro_batch_tokens: int) -> bool:
    return len(share) < 2 or cost(share) <= micro_batch_tokens


def split_windows(
    pieces: list[Unit],
    sizes: dict[Unit, int],
    deal_window: Callable[[list[Unit]], list[list[Unit]]],
    num_windows: int,
) -> Plan:
    """Windows of units of similar sizes, each of them distributed over the ranks."""
    return [deal_window(window) for window in cut_evenly(pieces, sizes, num_windows) if window]


def split_evenly(
    pieces: list[Unit],
    flops: Callable[[Unit], int],
    fits: Callable[[list[Unit]], bool],
    world_size: int,
    num_windows: int,
) -> Plan:
    """All units distributed over the ranks, and each rank's cut into as many windows.

    Ranks have even work in the whole step, and then in each window too.
    """
    shares = deal(pieces, {piece: flops(piece) for piece in pieces}, world_size)
    even_out(shares, flops)
    of_ranks = []
    for share in shares:
        loads = {piece: flops(piece) for piece in share}
        of_ranks.append(cut_evenly(sorted(share, key=lambda piece: -loads[piece]), loads, num_windows))
    plan = [list(window) for window in zip(*of_ranks, strict=True) if any(window)]
    for window in plan:
        even_out(window, flops, fits)
    return plan


def split_unit(unit: Unit, cost: Callable[[list[Unit]], int], max_cost: int) -> list[Unit]:
    """A unit as the fewest parts, with fewer members each, that cost at most `max_cost`."""
    example, members = unit
    for num_parts in range(1, len(members) + 1):
        size = math.ceil(len(members) / num_parts)
        parts = [(example, members[i : i + size]) for i in range(0, len(members), size)]
        if size == 1 or cost([parts[0]]) <= max_cost:
            return parts
    return [unit]


def cut_evenly(pieces: list[Unit], sizes: dict[Unit, int], num: int) -> list[list[Unit]]:
    """`num` consecutive runs of similar total size; some may be empty."""
    total = sum(sizes[piece] for piece in pieces)
    done = 0
    windows: list[list[Unit]] = [[] for _ in range(num)]
    for piece in pieces:
        middle = done + sizes[piece] / 2
        number = min(num - 1, int(num * middle / total)) if total else 0
        windows[number].append(piece)
        done += sizes[piece]
    return windows


class HeldPart(NamedTuple):
    """A part of what is held of a context; rows share the parts that have one key."""

    key: Hashable
    length: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch: the token ids of its rows, in three parts each, and the members that read each row.

    contexts: tokens before the virtual tokens. rests: input tokens after them. targets: supervised tokens (for an
    encoder: the index of the label). readers: (row, member) pairs; every loss belongs to one reader. held: what was
    computed of each row's context, for rows that have one. numbers: each row's target, where targets are numbers.
    held_parts: the parts that each row of `held` will have, known before they are computed. prepared: the model's plan
    of the pass, made ahead of it. trees: each row's labels, where labels are scored. read: what a model's `read_inputs`
    left of the readers' inputs. tasks: the number of each row's task, where rows have tasks. below: by how the layers
    below later prompts read rows, what they left of each row.
    """

    contexts: list[np.ndarray]
    rests: list[np.ndarray]
    targets: list[np.ndarray]
    readers: list[tuple[int, int]]
    pad_id: int
    held: list[Any] | None = None
    numbers: list[float | None] | None = None
    held_parts: list[tuple[HeldPart, ...]] | None = None
    prepared: Any = None
    trees: list[LabelTree] | None = None
    read: Any = None
    tasks: list[int] | None = None
    below: dict[Any, list[Any]] | None = None

    def with_held(self, held: list[Any]) -> "Batch":
        return replace(self, held=held)


def collate(examples: Examples, shares: list[list[Unit]], rank: int, pad_id: int) -> Batch:
    """A rank's micro-batch of one micro step; a rank without units gets one padding token and no targets."""
    units = shares[rank]
    if not units:
        return idle_batch(pad_id, has_contexts=examples.known.has_contexts)
    rows = [example for example, _ in units]
    return Batch(
        contexts=[examples.context_ids(i) for i in rows],
        rests=[examples.rest_ids(i) for i in rows],
        targets=[examples.target_ids(i) for i in rows],
        readers=[(row, member) for row, (_, members) in enumerate(units) for member in members],
        pad_id=pad_id,
        numbers=[examples.number(i) for i in rows],
        tasks=None if examples.tasks is None else examples.tasks[rows].tolist(),
    )


def idle_batch(pad_id: int, *, has_contexts: bool) -> Batch:
    """Padding and no targets, with a context if the rows of other ranks have contexts.

    A text's last token is not read, so it takes two to read one.
    """
    nothing = np.zeros(0, np.int32)
    padding = np.array([pad_id], np.int32)
    return Batch(
        contexts=[padding if has_contexts else nothing],
        rests=[np.array([pad_id, pad_id], np.int32)],
        targets=[nothing],
        readers=[(0, 0)],
        pad_id=pad_id,
        tasks=[0],
    )


def pad_rows(rows: list[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T], padded on the right to at least one position, and a mask [B, T] that is true at tokens."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(1, int(lengths.max()))), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids, np.arange(ids.shape[1]) < lengths[:, None]
