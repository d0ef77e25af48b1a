"""Rows that cannot be used are skipped, where a config asks for it: each is found, counted and named."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptune_dist.data.examples import Examples, Part, part_of
from ptune_dist.data.sources import Rows
from ptune_dist.data.views import GroupedRows
from ptune_dist.data.workers import CHUNK_ROWS, map_by_all_cores
from ptune_dist.errors import UserError

Encode = Callable[..., Examples]  # takes first_row and end_row
Found = tuple[list[Part], list[tuple[int, str]]]  # the examples of sound rows, and the others with what is wrong


@dataclass(frozen=True)
class Skipped:
    """Rows that are left out: a line about each. in_part: about rows of which another answer is left."""

    whole: list[str] = field(default_factory=list)
    in_part: list[str] = field(default_factory=list)


def encode_sound_rows(rows: Rows, encode: Encode) -> tuple[list[Part], np.ndarray, dict[int, str]]:
    """The examples of the rows that have no mistake, their numbers [N], and what is wrong with the others.

    A range with a mistake is halved until the row is found. Raises UserError where no row is sound.
    """

    def encode_range(bounds: tuple[int, int]) -> Found:
        return halve(encode, *bounds)

    ranges = [(first, min(len(rows), first + CHUNK_ROWS)) for first in range(0, len(rows), CHUNK_ROWS)]
    parts: list[Part] = []
    wrong: dict[int, str] = {}
    for some, mistakes in map_by_all_cores(encode_range, ranges, num_rows=len(rows)):
        parts += some
        wrong |= dict(mistakes)
    if not parts:
        raise UserError(f"data.on_error: no row of {rows.name} can be used: {next(iter(wrong.values()))}")
    kept = np.array([index for index in range(len(rows)) if index not in wrong], np.int64)
    return parts, kept, wrong


def halve(encode: Encode, first: int, end: int) -> Found:
    try:
        return [part_of(encode(first_row=first, end_row=end))], []
    except UserError as error:
        if end - first == 1:
            return [], [(first, str(error))]
    middle = (first + end) // 2
    parts, mistakes = halve(encode, first, middle)
    more_parts, more_mistakes = halve(encode, middle, end)
    return parts + more_parts, mistakes + more_mistakes


def group_skipped(wrong: dict[int, str], rows: Rows, kept: np.ndarray) -> Skipped:
    """What is left out of the source, each of its rows once; `wrong` and `kept` are numbers among `rows`."""
    if not isinstance(rows, GroupedRows):
        return Skipped(list(wrong.values()))
    sources = rows.sources_of(np.array(list(wrong), np.int64)).tolist()
    lines: dict[int, str] = {}
    for source, line in zip(sources, wrong.values(), strict=True):
        lines.setdefault(source, line)
    left = set(rows.sources_of(kept).tolist())
    return Skipped(
        [line for source, line in lines.items() if source not in left],
        [line for source, line in lines.items() if source in left],
    )


def count_kept(ends: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The `ends` of groups [G] once only the `kept` rows are left; groups without any are gone."""
    groups = np.searchsorted(ends, kept, side="right")
    counts = np.bincount(groups, minlength=len(ends))
    return np.cumsum(counts[counts > 0])
