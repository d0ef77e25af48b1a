"""Copies of keys that very many queries read, so that flex attention's backward pass is spread over the whole GPU.

There one program computes the gradient of a block of keys, for all query heads of a key/value head, and visits the
blocks of queries that read it one after another. All rows read the shared virtual tokens: their one block takes as long
as all positions of the pass together, while the rest of the GPU has finished. With a copy for every few rows that work
is done side by side; the gradients of the copies are added up.

Shapes: X positions given from outside, N live positions, C copies, P places of one copy of all copied runs.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ptune_dist.model.attention import Segment

READERS_OF_COPY = 512  # positions that read one copy, at least; 0: no copies
MOST_BLOCKS = 16  # of all copies of a run: a long run keeps a GPU busy without copies
Run = tuple[int, int]  # first of [outside, live], number of positions


class Copied(NamedTuple):
    """take [C, P]: what each copy holds, of [outside, live]; all copies stand in front of these, and start new blocks.

    segments and lengths: those that read the copies, which are parts from outside.
    """

    segments: list[Segment]
    lengths: list[int]
    take: np.ndarray


def copy_shared(segments: Sequence[Segment], outside_lengths: Sequence[int], block: int) -> Copied:
    """Copies where a run has many readers, all of them of one member.

    Several members are left alone: each has virtual tokens of its own, so the work is spread already.
    """
    unchanged = Copied(list(segments), list(outside_lengths), np.zeros((0, 0)))
    if not READERS_OF_COPY or len({segment.member for segment in segments}) > 1:
        return unchanged
    starts = [0, *itertools.accumulate(outside_lengths)]
    runs = [find_runs(segment, starts) for segment in segments]
    readers: dict[Run, list[int]] = defaultdict(list)
    for number, some in enumerate(runs):
        for run in some:
            readers[run].append(number)
    copies = {run: split_readers(segments, some, run[1], block) for run, some in readers.items() if run[1]}
    copied = {run: copy_of for run, copy_of in copies.items() if max(copy_of.values()) > 0}
    if not copied:
        return unchanged
    num_copies = 1 + max(max(copy_of.values()) for copy_of in copied.values())
    width = block * max(-(-length // block) for _, length in copied)
    take = np.concatenate([first + np.minimum(np.arange(width), length - 1) for first, length in copied])
    # Each copy of a run is a part from outside, and so is its padding, which nothing reads.
    lengths = [part for _, length in copied for part in (length, width - length)] * num_copies
    changed = []
    for number, segment in enumerate(segments):
        places = [(place, run) for place, run in enumerate(copied) if number in copied[run]]
        parts = {run: 2 * (copied[run][number] * len(copied) + place) for place, run in places}
        changed.append(read_copies(segment, runs[number], parts, len(lengths)))
    return Copied(changed, [*lengths, *outside_lengths], np.tile(take, (num_copies, 1)))


def find_runs(segment: Segment, starts: Sequence[int]) -> list[Run]:
    """What may be copied of all that a segment reads: its contexts and its first parent. `starts`: of the contexts."""
    runs = [(starts[context], starts[context + 1] - starts[context]) for context in segment.contexts]
    return runs + [(starts[-1] + first, length) for first, length in segment.parents[:1]]


def read_copies(segment: Segment, runs: list[Run], parts: dict[Run, int], num_parts: int) -> Segment:
    """The segment with copies in place of `runs`. `parts`: the numbers of those; other contexts follow `num_parts`."""
    contexts = [parts.get(run, num_parts + context) for run, context in zip(runs, segment.contexts, strict=False)]
    parents = segment.parents
    if parents and runs[-1] in parts:
        contexts.append(parts[runs[-1]])
        parents = parents[1:]
    return Segment(
        start=segment.start,
        length=segment.length,
        contexts=tuple(contexts),
        parents=parents,
        offset=segment.offset,
        member=segment.member,
        num_own=segment.num_own,
    )


def split_readers(segments: Sequence[Segment], numbers: list[int], length: int, block: int) -> dict[int, int]:
    """Which copy of a run of `length` positions each of its readers reads."""
    sizes = np.array([segments[number].length for number in numbers])
    most_copies = max(1, MOST_BLOCKS // -(-length // block))
    size = max(READERS_OF_COPY, -(-int(sizes.sum()) // most_copies))
    copies = np.unique((np.cumsum(sizes) - sizes) // size, return_inverse=True)[1]
    return dict(zip(numbers, copies.tolist(), strict=True))
