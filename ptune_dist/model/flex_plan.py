"""What flex attention needs to know of a pass, worked out on the host: which keys a query reads, and which blocks.

Pure numpy, for the thread that prepares the next batch. The cost follows the number of segments and of blocks; nothing
is compared position by position.

Every query reads a few intervals of keys: its own segment up to itself, and the runs that its segment names. A sliding
window only moves an interval's lower end. So one mask function, over two integers per query and interval, serves every
placement and every window.

Where several members share a pass, queries and keys are rearranged so that no block holds positions of two members: a
kernel works on whole blocks, and in it zero times what is not a number is not a number. Cleaning such numbers away
instead would hide an overflow from the loss scale.

Shapes: N live positions, X positions given from outside, Q and J places of queries and keys (N and X + N where nothing
is rearranged, else multiples of a block), R and C blocks of them, K intervals.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from ptune_dist.model.attention import Segment
from ptune_dist.model.flex_copies import copy_shared

BLOCK = 128  # positions; the size that flex attention's kernels are tuned for
FEWEST_BLOCKS = 2  # see FlexPlan
ALIGNED = 32  # numbers: packed arrays begin at multiples of 128 bytes, as memory of their own would
Run = tuple[int, int]  # first position, number of positions
# First place among the keys, how many keys do not depend on the query, position of the first key in the text.
Interval = tuple[int, int, int]
SHARED = -1  # the owner of keys that several members read


@dataclass(frozen=True)
class FlexPlan:
    """Where everything stands, and what is read. All arrays are int32.

    take_copies [C, P]: the keys that `flex_copies` puts in front, of [outside, live]; empty where there are none. Where
    there are, they count as positions from outside below.
    take_queries [Q], take_keys [J]: which live position, and which of [outside, live], stands at a place; padding
    repeats one of the same member. put_queries [N], put_keys [X + N]: the inverse. All four are empty where nothing is
    rearranged. lows, highs [K, Q]: the query at a place reads the keys at places low <= place < high of each interval.
    kv_num [R], kv_indices [R, C]: the blocks of keys that a block of queries reads in part; full_kv_num and
    full_kv_indices: those that all of it reads whole. q_num [C], q_indices [C, R] and so on: the same, seen from the
    keys. R and C are at least 2: a size of one would be compiled as a constant.
    """

    take_copies: np.ndarray
    take_queries: np.ndarray
    take_keys: np.ndarray
    put_queries: np.ndarray
    put_keys: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    kv_num: np.ndarray
    kv_indices: np.ndarray
    full_kv_num: np.ndarray
    full_kv_indices: np.ndarray
    q_num: np.ndarray
    q_indices: np.ndarray
    full_q_num: np.ndarray
    full_q_indices: np.ndarray

    @property
    def is_rearranged(self) -> bool:
        return len(self.take_queries) > 0

    def pack(self) -> tuple[np.ndarray, list[tuple[int, ...]]]:
        """All arrays in one, for one copy to the device, and their shapes, for `unpack`."""
        arrays = [getattr(self, field.name) for field in fields(self)]
        shapes = [array.shape for array in arrays]
        starts = find_starts(shapes)
        flat = np.zeros(starts[-1], np.int32)
        for array, start in zip(arrays, starts, strict=False):
            flat[start : start + array.size] = array.reshape(-1)
        return flat, shapes


def unpack(flat: Any, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """The arrays of `FlexPlan.pack` as views of one array or tensor, by name."""
    named = zip(fields(FlexPlan), shapes, find_starts(shapes), strict=False)
    return {field.name: flat[start : start + math.prod(shape)].reshape(shape) for field, shape, start in named}


def find_starts(shapes: list[tuple[int, ...]]) -> list[int]:
    """Where each array begins in the packed one, and where that ends. None begins at 0: that would be compiled in."""
    starts = [ALIGNED]
    for shape in shapes:
        starts.append(starts[-1] - (-math.prod(shape) // ALIGNED) * ALIGNED)
    return starts


def plan_attention(
    segments: Sequence[Segment], outside_lengths: Sequence[int], window: int | None = None, block: int = BLOCK
) -> FlexPlan:
    """The plan of one pass for layers of one window (None: layers that read everything).

    `segments` cover the live positions 0 to N. `outside_lengths`: positions of each of the keys/values from outside.
    """
    segments, outside_lengths, take_copies = copy_shared(segments, outside_lengths, block)
    num_live = sum(segment.length for segment in segments)
    num_keys = sum(outside_lengths) + num_live
    # Fewer queries than a block are padded to one: Inductor compiles them apart.
    if len({segment.member for segment in segments}) > 1 or num_live < block:
        queries = arrange(group_queries(segments), block)
        keys = arrange(group_keys(segments, outside_lengths), block)
        moves = [queries.take, keys.take, queries.put, keys.put]
    else:
        queries, keys = (Arrangement(np.arange(n), np.arange(n)) for n in (num_live, num_keys))
        moves = [np.zeros(0)] * 4
    reads = [find_intervals(segment, keys, outside_lengths) for segment in segments]
    rows = expand(segments, reads, queries, window, block)
    shape = [max(FEWEST_BLOCKS, -(-len(arrangement.take) // block)) for arrangement in (queries, keys)]
    partial, full = find_blocks(rows, shape, block)
    tables = [array for blocks in (partial, full, partial.T, full.T) for array in list_blocks(blocks)]
    return FlexPlan(
        *(np.ascontiguousarray(array, np.int32) for array in (take_copies, *moves, rows.lows, rows.highs, *tables))
    )


class Arrangement(NamedTuple):
    """take: which item stands at a place. put: the place of each item."""

    take: np.ndarray
    put: np.ndarray


class Rows(NamedTuple):
    """lows, highs [K, Q]; and of each piece, which is what a block of queries has of one segment: the places of its

    first and its last query, and how many it has.
    """

    lows: np.ndarray
    highs: np.ndarray
    first: np.ndarray
    last: np.ndarray
    size: np.ndarray


def group_queries(segments: Sequence[Segment]) -> dict[int, list[Run]]:
    groups: dict[int, list[Run]] = defaultdict(list)
    for segment in segments:
        groups[segment.member].append((segment.start, segment.length))
    return groups


def group_keys(segments: Sequence[Segment], outside_lengths: Sequence[int]) -> dict[int, list[Run]]:
    """Keys from outside and live ones; those from outside that only one member reads stand with its live ones."""
    readers: list[set[int]] = [set() for _ in outside_lengths]
    for segment in segments:
        for number in segment.contexts:
            readers[number].add(segment.member)
    groups: dict[int, list[Run]] = defaultdict(list)
    first = 0
    for length, members in zip(outside_lengths, readers, strict=True):
        owner = next(iter(members)) if len(members) == 1 else SHARED
        groups[owner].append((first, length))
        first += length
    for segment in segments:
        groups[segment.member].append((first + segment.start, segment.length))
    return groups


def arrange(groups: dict[int, list[Run]], block: int) -> Arrangement:
    """Put the runs of each group end to end in blocks of its own."""
    taken = []
    put = np.zeros(sum(length for runs in groups.values() for _, length in runs), np.int64)
    place = 0
    for _, runs in sorted(groups.items()):
        items = np.concatenate([np.arange(first, first + length) for first, length in sorted(runs)])
        if not len(items):
            continue
        put[items] = place + np.arange(len(items))
        num_padded = -len(items) % block
        taken += [items, np.full(num_padded, items[-1])]
        place += len(items) + num_padded
    return Arrangement(np.concatenate(taken), put)


def find_intervals(segment: Segment, keys: Arrangement, outside_lengths: Sequence[int]) -> list[Interval]:
    """What the segment reads, in the order of its text.

    The last interval grows with the query. Runs that follow one another both in the text and among the keys are one.
    """
    starts = np.concatenate([[0], np.cumsum(outside_lengths, dtype=np.int64)])
    num_outside = int(starts[-1])
    runs = [(int(starts[number]), outside_lengths[number]) for number in segment.contexts]
    runs += [(num_outside + start, length) for start, length in segment.parents]
    parts: list[Interval] = []
    position = 0
    for first, length in [*((f, n) for f, n in runs if n), (num_outside + segment.start, 0)]:
        place = int(keys.put[first])
        if parts and place == parts[-1][0] + parts[-1][1]:
            parts[-1] = (parts[-1][0], parts[-1][1] + length, parts[-1][2])
        else:
            parts.append((place, length, position))
        position += length
    return parts


def expand(
    segments: Sequence[Segment], reads: list[list[Interval]], queries: Arrangement, window: int | None, block: int
) -> Rows:
    """Every query's intervals, and those at the ends of the pieces."""
    num_intervals = 2
    while num_intervals < max(len(each) for each in reads):
        num_intervals *= 2 if num_intervals == 2 else 4  # few different numbers: the mask is compiled for each
    parts = np.zeros((num_intervals, len(segments), 3), np.int64)
    for number, each in enumerate(reads):
        parts[num_intervals - len(each) :, number] = each
    lengths = np.array([segment.length for segment in segments])
    of = np.repeat(np.arange(len(segments)), lengths)
    own = np.arange(len(of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = queries.put[np.array([segment.start for segment in segments])[of] + own]
    low, fixed, position = (parts[:, of, i] for i in range(3))
    high = low + fixed
    high[-1] += own + 1
    if window is not None:
        in_text = np.array([segment.offset for segment in segments])[of] + own
        low = np.minimum(np.maximum(low, low + in_text - window + 1 - position), high)
    lows, highs = np.zeros((2, num_intervals, len(queries.take)), np.int64)
    lows[:, place] = low
    highs[:, place] = high
    begins = np.flatnonzero((own == 0) | (place % block == 0))
    ends = np.append(begins[1:], len(own)) - 1
    return Rows(lows, highs, place[begins], place[ends], ends - begins + 1)


def find_blocks(rows: Rows, shape: Sequence[int], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys a block of queries reads in part, and which all of its queries read whole: [R, C] each."""
    low_first, low_last = rows.lows[:, rows.first], rows.lows[:, rows.last]
    high_first, high_last = rows.highs[:, rows.first], rows.highs[:, rows.last]
    # Within a piece an interval's ends only grow, by one a query, so what any and what all queries read is an interval.
    begin = low_first // block
    end = np.where(low_first < high_last, -(-high_last // block), begin)
    some = sum_ranges(rows, begin, end, shape, block)
    begin = -(-low_last // block)
    whole = sum_ranges(rows, begin, np.maximum(begin, high_first // block), shape, block)
    is_full = whole == block
    return (some > 0) & ~is_full, is_full


def sum_ranges(rows: Rows, begin: np.ndarray, end: np.ndarray, shape: Sequence[int], block: int) -> np.ndarray:
    """[R, C]: how many queries of a block have the block of keys in their range [begin, end)."""
    change = np.zeros((shape[0], shape[1] + 1), np.int64)
    where = np.broadcast_to(rows.first // block, begin.shape)
    size = np.broadcast_to(rows.size, begin.shape)
    np.add.at(change, (where, begin), size)
    np.add.at(change, (where, end), -size)
    return change.cumsum(axis=1)[:, :-1]


def list_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row of [A, B], how many are set, and the numbers of those, padded with zeros to [A, B]."""
    num = blocks.sum(axis=1)
    row, column = np.nonzero(blocks)
    indices = np.zeros(blocks.shape, np.int64)
    indices[row, np.arange(len(row)) - np.repeat(np.cumsum(num) - num, num)] = column
    return num, indices
