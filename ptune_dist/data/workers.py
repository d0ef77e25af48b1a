"""Encode rows by all cores: processes that are forked, each with a range of rows at a time.

A forked process has the rows, the tokenizer and the compiled templates without reading or importing anything again, and
returns arrays. Elsewhere than on Linux, and where there are few rows, this process does it alone.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from ptune_dist.cluster.processes import signal_on_parent_death
from ptune_dist.data.encode import Examples
from ptune_dist.data.sources import Rows
from ptune_dist.errors import RunFault

CHUNK_ROWS = 5_000
FEWEST_ROWS = 20_000  # fewer take less time than starting processes
REPORT_S = 5.0

Encode = Callable[..., Examples]  # takes first_row and end_row
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]

_encode: list[Encode] = []  # of the forked processes, which inherit it


def encode_by_all_cores(rows: Rows, encode: Encode) -> Examples:
    """All rows' examples, as `encode` makes them of a range. Raises UserError of the first row that has a mistake."""
    num_workers = count_cores()
    if len(rows) < FEWEST_ROWS or num_workers < 2 or sys.platform != "linux" or _encode:
        return encode()
    parts = list(encode_ranges(len(rows), encode, num_workers))
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.concatenate([part[1] for part in parts]), out=offsets[1:])
    numbers = [part[5] for part in parts if part[5] is not None]
    return Examples(
        ids=np.concatenate([part[0] for part in parts]),
        offsets=offsets,
        num_targets=np.concatenate([part[2] for part in parts]),
        is_truncated=np.concatenate([part[3] for part in parts]),
        where=rows.where,
        num_context=np.concatenate([part[4] for part in parts]),
        numbers=np.concatenate(numbers) if numbers else None,
    )


def count_cores() -> int:
    """The cores that this process and its children may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def encode_ranges(num_rows: int, encode: Encode, num_workers: int) -> Iterator[Arrays]:
    """The arrays of each range of rows, in order."""
    _encode.append(encode)
    pending: deque[tuple[int, Future[Arrays]]] = deque()
    ranges = iter(range(0, num_rows, CHUNK_ROWS))
    report = Report(num_rows)
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork"), initializer=begin_worker)
    try:
        while True:
            while len(pending) < 2 * num_workers:
                first = next(ranges, None)
                if first is None:
                    break
                end = min(num_rows, first + CHUNK_ROWS)
                pending.append((end, pool.submit(encode_range, first, end)))
            if not pending:
                return
            end, future = pending.popleft()
            yield future.result()
            report(end)
    except BrokenProcessPool:
        raise RunFault(
            "a process that tokenizes rows was killed: is there enough memory for one on each core?"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _encode.clear()


def begin_worker() -> None:
    """Leave signals to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal_on_parent_death(signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_range(first: int, end: int) -> Arrays:
    found = _encode[0](first_row=first, end_row=end)
    lengths = found.lengths.astype(np.int32)
    return found.ids, lengths, found.num_targets, found.is_truncated, found.num_context, found.numbers


class Report:
    """A line every few seconds: how many rows are done, and how long the rest will take."""

    def __init__(self, num_rows: int):
        self._num_rows = num_rows
        self._began = time.monotonic()
        self._last = self._began

    def __call__(self, num_done: int) -> None:
        now = time.monotonic()
        if now - self._last < REPORT_S:
            return
        self._last = now
        left_s = (now - self._began) * (self._num_rows - num_done) / num_done
        print(f"tokenizing: {num_done:,} of {self._num_rows:,} rows, {left_s:.0f} s left", file=sys.stderr, flush=True)
