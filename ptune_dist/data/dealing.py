"""Distribute units over ranks so that the ranks have even work.

Nothing here is random: every rank comes to the same distribution.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

# an example and the members of the sweep that read it
Unit = tuple[int, tuple[int, ...]]
# If examples have owners, examples move to another rank while the busiest rank has more than this many times the mean
# work: movable ones above the first limit, any others above the second.
MAX_IMBALANCE = 1.05
MAX_IMBALANCE_OF_FIXED = 1.3
ONE_IN_MOVABLE = 4
# Without owners, members of units move while the busiest rank has more than this many times the mean work.
EVEN_ENOUGH = 1.01


def deal(window: list[Unit], sizes: dict[Unit, int], world_size: int) -> list[list[Unit]]:
    """Distribute a window's units, the largest first, each to the rank with the least work so far."""
    shares: list[list[Unit]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for piece in window:
        rank = loads.index(min(loads))
        shares[rank].append(piece)
        loads[rank] += sizes[piece]
    return shares


class Move(NamedTuple):
    """A unit without some of its members, which another rank reads, perhaps with members that it has already.

    left, joined: what is left of the unit, and what the other rank has then. met: the other rank's unit until then.
    loads: of both ranks afterwards.
    """

    unit: Unit
    left: Unit
    met: Unit | None
    joined: Unit
    loads: tuple[int, int]


def even_out(
    shares: list[list[Unit]], flops: Callable[[Unit], int], fits: Callable[[list[Unit]], bool] = lambda _: True
) -> None:
    """Move members of units from the busiest to the idlest rank, in place, while both ranks save more than that adds.

    `flops`: of a unit on one rank; what its members share is computed on each rank that reads it. `fits`: whether a
    rank can have a share.
    """
    loads = [sum(map(flops, share)) for share in shares]
    for _ in range(sum(len(members) for share in shares for _, members in share)):
        busiest = loads.index(max(loads))
        idlest = loads.index(min(loads))
        if loads[busiest] * len(shares) <= EVEN_ENOUGH * sum(loads):
            break
        both = (loads[busiest], loads[idlest])
        moves = list_moves(shares[busiest], shares[idlest], both, flops)
        # Each of the two ranks ends sooner by the difference of the larger loads.
        better = [move for move in moves if 2 * (both[0] - max(move.loads)) > max(0, sum(move.loads) - sum(both))]
        better.sort(key=lambda move: (max(move.loads), sum(move.loads)))
        move = next((move for move in better if fits(taken(shares[idlest], move))), None)
        if move is None:
            break
        shares[busiest].remove(move.unit)
        shares[busiest] += [move.left] if move.left[1] else []
        shares[idlest] = taken(shares[idlest], move)
        loads[busiest], loads[idlest] = move.loads


def list_moves(
    busy: list[Unit], idle: list[Unit], loads: tuple[int, int], flops: Callable[[Unit], int]
) -> Iterator[Move]:
    """The moves of one or more members from one rank's share to another's, which have these loads."""
    for unit in busy:
        example, members = unit
        met = next((other for other in idle if other[0] == example and not set(other[1]) & set(members)), None)
        before = flops(met) if met else 0
        for count in range(1, len(members) + 1):
            left = (example, members[count:])
            joined = (example, tuple(sorted(members[:count] + (met[1] if met else ()))))
            rest = loads[0] - flops(unit) + (flops(left) if left[1] else 0)
            yield Move(unit, left, met, joined, (rest, loads[1] - before + flops(joined)))


def taken(share: list[Unit], move: Move) -> list[Unit]:
    """The share of the rank that a move goes to, after it."""
    return [unit for unit in share if unit is not move.met] + [move.joined]


def deal_to_owners(window: list[Unit], sizes: dict[Unit, int], world_size: int) -> list[list[Unit]]:
    """Give a window's units to their owners, then move some where the work is too uneven."""
    shares: list[list[Unit]] = [[piece for piece in window if piece[0] % world_size == r] for r in range(world_size)]
    move_to_balance(shares, sizes, MAX_IMBALANCE, functools.partial(is_movable, world_size=world_size))
    move_to_balance(shares, sizes, MAX_IMBALANCE_OF_FIXED, lambda example: True)
    return shares


def move_to_balance(
    shares: list[list[Unit]], sizes: dict[Unit, int], max_imbalance: float, may_move: Callable[[int], bool]
) -> None:
    """Move units from the busiest to the idlest rank, in place, until none has `max_imbalance` times the mean work."""
    loads = [sum(sizes[piece] for piece in share) for share in shares]
    even = sum(loads) / len(shares)
    for _ in range(sum(map(len, shares))):
        heaviest = loads.index(max(loads))
        lightest = loads.index(min(loads))
        gap = loads[heaviest] - loads[lightest]
        candidates = [piece for piece in shares[heaviest] if may_move(piece[0]) and sizes[piece] < gap]
        if loads[heaviest] <= max_imbalance * even or not candidates:
            break
        best = min(candidates, key=lambda piece: abs(gap - 2 * sizes[piece]))
        shares[heaviest].remove(best)
        shares[lightest].append(best)
        loads[heaviest] -= sizes[best]
        loads[lightest] += sizes[best]


def is_movable(example: int, world_size: int) -> bool:
    """Whether an example may move for a small gain: always the same ones, so that few contexts are held twice."""
    return example // world_size % ONE_IN_MOVABLE == 0
