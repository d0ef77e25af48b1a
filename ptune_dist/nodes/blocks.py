"""Blocks of a step, the fixed binary tree over them, and how they are divided over nodes.

A step's rows are cut into a power of two of blocks. The blocks are the leaves of a complete binary tree, and the sum
of a step is made along this tree: each inner vertex adds its left half to its right half. So the sum does not depend
on who computes which blocks. A node sends the sums of the largest subtrees that it owns whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Range:
    """The blocks lo, ..., hi - 1 of a step: an aligned subtree (its length a power of two that divides lo)."""

    lo: int
    hi: int

    @property
    def num_blocks(self) -> int:
        return self.hi - self.lo


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def subtrees(lo: int, hi: int) -> list[Range]:
    """The fewest aligned subtrees that make up the blocks lo, ..., hi - 1, in order."""
    found = []
    while lo < hi:
        size = lo & -lo or 1 << (hi - lo).bit_length() - 1  # block 0 is aligned to every size
        while lo + size > hi:
            size //= 2
        found.append(Range(lo, lo + size))
        lo += size
    return found


def sum_along_tree(pieces: Mapping[Range, T], add: Callable[[T, T], T], num_blocks: int) -> T:
    """The sum of all blocks from the sums of subtrees that cover them: the same bits, whatever subtrees these are."""

    def total(lo: int, hi: int) -> T:
        if (piece := pieces.get(Range(lo, hi))) is not None:
            return piece
        middle = (lo + hi) // 2
        return add(total(lo, middle), total(middle, hi))

    return total(0, num_blocks)
