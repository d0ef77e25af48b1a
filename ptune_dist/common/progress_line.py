"""Progress of what takes long: a line on stderr now and then, so that nothing is silent and stdout stays clean."""

import os
import sys
import threading
import time
from dataclasses import dataclass, field

FIRST_LINE_S = 3.0
BETWEEN_LINES_S = 10.0
REPORT_S = 5.0  # where nothing else is printed
BYTES_PER_GIB = 1 << 30

_busy: list["BusyLine"] = []  # the innermost last
_last_line_at = 0.0


def say(line: str) -> None:
    """A line on stderr."""
    global _last_line_at
    _last_line_at = time.monotonic()
    print(line, file=sys.stderr, flush=True)


@dataclass
class ProgressLine:
    """Counts parts of a whole, such as rows; prints `what`, how many are done and when the rest will be."""

    what: str
    total: int
    is_shown: bool = True  # False on all ranks but the first
    unit: str = ""  # "GiB": of `total` bytes
    done: int = 0
    between_s: float = BETWEEN_LINES_S
    _began: float = field(default_factory=lambda: time.monotonic())
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = self._began + FIRST_LINE_S

    def count(self, number: int = 1) -> None:
        """`number` more are done."""
        self.done = min(self.total, self.done + number)
        now = time.monotonic()
        if self.is_shown and now >= self._next and self.done < self.total:
            self._next = now + self.between_s
            say(self.render(now - self._began))

    def render(self, seconds: float) -> str:
        counts = f"{self.done:,}/{self.total:,}"
        if self.unit == "GiB":
            counts = f"{self.done / BYTES_PER_GIB:,.2f}/{self.total / BYTES_PER_GIB:,.2f} GiB"
        if not self.done:
            return f"{self.what}: {counts}, {render_duration(seconds)} so far"
        return f"{self.what}: {counts}, ETA {render_duration(seconds * (self.total - self.done) / self.done)}"


class WaitingLine:
    """Prints `waiting for ...` and for how long, now and then, on the first rank of each node."""

    def __init__(self, what: str):
        self._what = what
        self._began = time.monotonic()
        self._next = self._began + FIRST_LINE_S

    def show(self) -> None:
        """To be called while the wait lasts."""
        now = time.monotonic()
        if is_first_here() and now >= self._next:
            self._next = now + REPORT_S
            waited = render_duration(now - self._began)
            say(f"waiting for {self._what}: {waited} so far")


class BusyLine:
    """Prints `what: 0:00:05 so far` now and then while its body runs and nothing else is printed by this module.

    For what cannot count its parts, on the first rank of each node. Of bodies within bodies the innermost is named, and
    the outermost alone sees to it that there is a line every few seconds. Nothing may be forked in a body, because a
    thread prints. A context manager.
    """

    def __init__(self, what: str, *, first_s: float = REPORT_S):
        self._what = what
        self._first_s = first_s
        self._began = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._began = time.monotonic()
        _busy.append(self)
        if is_first_here() and len(_busy) == 1:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        _busy.remove(self)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _print(self) -> None:
        pause_s = self._first_s
        while not self._ended.wait(pause_s):
            pause_s = self._first_s - (time.monotonic() - max(self._began, _last_line_at))
            if pause_s <= 0:
                pause_s = self._first_s
                for innermost in _busy[-1:]:
                    say(innermost.render())

    def render(self) -> str:
        return f"{self._what}: {render_duration(time.monotonic() - self._began)} so far"


def is_first_here() -> bool:
    """Whether this is the first rank of its node (by torchrun's variable), or no rank."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def render_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
