"""Copies of keys that very many queries read, so that flex attention's backward pass is spread over the whole GPU.

There one program computes the gradient of a block of keys, for all query heads of a key/value head, and visits the
blocks of queries that read it one after another. All rows read the shared virtual tokens: their one block takes as long
as all positions of the pass together, while the rest of the GPU has finished. With a copy for every few rows that work
is done side by side; the gradients of the copies are added up.

Shapes: X positions given from outside, N live positions, C copies, P places of one copy of all copied runs.
"""

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
    copy_of = {run: split_readers(segments, numbers, run[1], block) for run, numbers in find_readers(*unchanged[:2])}
    copy_of = {run: copies for run, copies in copy_of.items() if max(copies.values(), default=0) > 0}
    if not copy_of:
        return unchanged
    num_copies = 1 + max(max(copies.values()) for copies in copy_of.values())
    width = block * max(-(-length // block) for _, length in copy_of)
    take = np.concatenate([first + np.minimum(np.arange(width), length - 1) for first, length in copy_of])
    lengths = [part for _, length in copy_of for part in (length, width - length)] * num_copies
    starts = np.concatenate([[0], np.cumsum(outside_lengths, dtype=np.int64)])

    def read_copies(number: int, segment: Segment) -> Segment:
        def part_of(place: int, run: Run) -> int | None:
            copy = copy_of.get(run, {}).get(number)
            return None if copy is None else 2 * (copy * len(copy_of) + place)

        places = {run: place for place, run in enumerate(copy_of)}
        contexts: list[int] = []
        for context in segment.contexts:
            run = (int(starts[context]), outside_lengths[context])
            part = part_of(places.get(run, 0), run)
            contexts.append(len(lengths) + context if part is None else part)
        parents = segment.parents
        if parents:
            run = (int(starts[-1]) + parents[0][0], parents[0][1])
            part = part_of(places.get(run, 0), run)
            if part is not None:
                contexts.append(part)
                parents = parents[1:]
        return segment._replace(contexts=tuple(contexts), parents=parents)

    changed = [read_copies(number, segment) for number, segment in enumerate(segments)]
    return Copied(changed, [*lengths, *outside_lengths], np.tile(take, (num_copies, 1)))


def find_readers(segments: Sequence[Segment], outside_lengths: Sequence[int]) -> list[tuple[Run, list[int]]]:
    """Runs that may be copied, with the numbers of the segments that read them: contexts, and a first parent."""
    starts = np.concatenate([[0], np.cumsum(outside_lengths, dtype=np.int64)])
    readers: dict[Run, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        runs = [(int(starts[context]), outside_lengths[context]) for context in segment.contexts]
        runs += [(int(starts[-1]) + start, length) for start, length in segment.parents[:1]]
        for run in runs:
            if run[1]:
                readers[run].append(number)
    return list(readers.items())


def split_readers(segments: Sequence[Segment], numbers: list[int], length: int, block: int) -> dict[int, int]:
    """Which copy of a run of `length` positions each of its readers reads."""
    sizes = np.array([segments[number].length for number in numbers])
    most_copies = max(1, MOST_BLOCKS // -(-length // block))
    size = max(READERS_OF_COPY, -(-int(sizes.sum()) // most_copies))
    copies = np.unique((np.cumsum(sizes) - sizes) // size, return_inverse=True)[1]
    return dict(zip(numbers, copies.tolist(), strict=True))
