"""Encode rows by all cores: processes that are forked, each with a part of the rows at a time.

A forked process has the rows, the tokenizer and the compiled templates without reading or importing anything again, and
returns arrays. Elsewhere than on Linux, and where there are few rows, this process does it alone.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ptune_dist.cluster.processes import signal_on_parent_death
from ptune_dist.common.progress_line import REPORT_S, ProgressLine
from ptune_dist.data.examples import Examples, Part, part_of
from ptune_dist.data.sources import Rows
from ptune_dist.errors import RunFault

CHUNK_ROWS = 5_000
FEWEST_ROWS = 20_000  # fewer take less time than starting processes

T = TypeVar("T")
Encode = Callable[..., Examples]  # takes first_row and end_row

_function: list[Callable[[Any], Any]] = []  # of the forked processes, which inherit it


def encode_by_all_cores(rows: Rows, encode: Encode) -> Iterator[Part]:
    """All rows' examples in parts, as `encode` makes them of a range, in order.

    Raises UserError of the first row that has a mistake.
    """
    ranges = [(first, min(len(rows), first + CHUNK_ROWS)) for first in range(0, len(rows), CHUNK_ROWS)]
    progress = ProgressLine(f"tokenizing rows of {rows.name}", len(rows), between_s=REPORT_S)

    def encode_range(bounds: tuple[int, int]) -> Part:
        return part_of(encode(first_row=bounds[0], end_row=bounds[1]))

    for part in map_by_all_cores(encode_range, ranges, num_rows=len(rows)):
        progress.count(len(part.lengths))
        yield part


def map_by_all_cores(function: Callable[[Any], T], items: Iterable[Any], *, num_rows: int) -> Iterator[T]:
    """`function` of each item, in order, computed by all cores where there are many rows; items go to them by pipes.

    Few items are computed ahead, so that memory does not grow with their number. Raises what `function` raises first.
    """
    num_workers = count_cores()
    if num_rows < FEWEST_ROWS or num_workers < 2 or sys.platform != "linux" or _function:
        yield from map(function, items)
        return
    _function.append(function)
    pending: deque[Future[T]] = deque()
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork"), initializer=begin_worker)
    try:
        for item in items:
            pending.append(pool.submit(call, item))
            if len(pending) >= 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RunFault(
            "a process that tokenizes rows was killed: is there enough memory for one on each core?"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _function.clear()


def count_cores() -> int:
    """The cores that this process and its children may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def begin_worker() -> None:
    """Leave signals to the parent, end with it, and touch as little of what is shared with it as possible."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal_on_parent_death(signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()


def call(item: Any) -> Any:
    return _function[0](item)
