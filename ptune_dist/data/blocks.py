"""A step cut into blocks, whose sums are added in a fixed tree: the result does not depend on who computes which block.

Blocks are a pure function of the step's units and of the number of blocks, a power of two. The tree is the binary one
over their numbers (see `nodes.blocks`): the sum over blocks [lo, hi) is that of the first half plus that of the second.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from ptune_dist.data.batches import cut_evenly, split_unit
from ptune_dist.data.dealing import Unit, deal_to_owners
from ptune_dist.nodes.blocks import Range, subtrees


class Summable(Protocol):
    """Tensors, in the main."""

    def __add__(self, other: Any, /) -> Any: ...


T = TypeVar("T", bound=Summable)


def cut_into_blocks(
    units: Sequence[Unit],
    cost: Callable[[list[Unit]], int],
    num_blocks: int,
    *,
    work: Callable[[list[Unit]], int] | None = None,
    members_share: bool = True,
) -> list[list[Unit]]:
    """Units as `num_blocks` lists of similar cost, some of which may be empty.

    The units of a block have similar lengths. With `work`, what a unit costs once its context is held, the block of an
    example is mostly the same in all steps, so that whoever computes a block finds the contexts that it has kept.
    Without `members_share` a unit that is larger than a block is split by its members.
    """
    sizes = {unit: cost([unit]) for unit in units}
    pieces = list(units)
    if not members_share:
        most = max(1, sum(sizes.values()) // num_blocks)
        pieces = [part for unit in units for part in (split_unit(unit, cost, most) if sizes[unit] > most else [unit])]
        sizes |= {piece: cost([piece]) for piece in pieces if piece not in sizes}
    if work:
        return deal_to_owners(pieces, {piece: work([piece]) for piece in pieces}, num_blocks)
    pieces.sort(key=lambda piece: -sizes[piece])
    return cut_evenly(pieces, sizes, num_blocks)


def divide(ranges: Sequence[Range], num_ranks: int) -> list[list[Range]]:
    """A node's subtrees shared among its ranks: to each as many blocks as to the others, give or take one, in order.

    The blocks of a rank are subtrees of those that are given, so that a node's own sums are made of its ranks'.
    """
    total = sum(one.num_blocks for one in ranges)
    found: list[list[Range]] = []
    for rank in range(num_ranks):
        first = rank * total // num_ranks
        last = (rank + 1) * total // num_ranks
        own: list[Range] = []
        before = 0
        for one in ranges:
            own += subtrees(max(one.lo, one.lo + first - before), min(one.hi, one.lo + last - before))
            before += one.num_blocks
        found.append(own)
    return found


def add_up(wanted: Range, parts: Mapping[Range, T]) -> T:
    """The sum over a subtree, of sums over parts that cover it. Raises KeyError where they do not."""
    found = parts.get(wanted)
    if found is not None:
        return found
    if wanted.num_blocks <= 1:
        raise KeyError(wanted)
    middle = (wanted.lo + wanted.hi) // 2
    return add_up(Range(wanted.lo, middle), parts) + add_up(Range(middle, wanted.hi), parts)


class RunningSums(Generic[T]):
    """Sums over the subtrees of a rank, block after block: at any time few of them are held."""

    def __init__(self, wanted: Sequence[Range]):
        self._wanted = set(wanted)
        self._open: list[tuple[Range, T]] = []
        self.found: dict[Range, T] = {}

    def add(self, block: int, value: T) -> None:
        """The next block's, in the order of `wanted`."""
        whole = Range(block, block + 1)
        while whole not in self._wanted and self._open and is_second_half(whole, self._open[-1][0]):
            first, before = self._open.pop()
            value = before + value
            whole = Range(first.lo, whole.hi)
        if whole in self._wanted:
            self.found[whole] = value
        else:
            self._open.append((whole, value))


def is_second_half(part: Range, other: Range) -> bool:
    """Whether `other` and `part` are the two halves of a subtree."""
    size = part.num_blocks
    return other == Range(part.lo - size, part.lo) and other.lo % (2 * size) == 0
