"""Progress of what takes long: a line on stderr now and then, so that nothing is silent and stdout stays clean."""

import sys
import time
from dataclasses import dataclass, field

FIRST_LINE_S = 3.0
BETWEEN_LINES_S = 10.0
BYTES_PER_GIB = 1 << 30


@dataclass
class ProgressLine:
    """Counts parts of a whole, such as rows; prints `what`, how many are done and when the rest will be."""

    what: str
    total: int
    is_shown: bool = True  # False on all ranks but the first
    unit: str = ""  # "GiB": of `total` bytes
    done: int = 0
    _began: float = field(default_factory=lambda: time.monotonic())
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = self._began + FIRST_LINE_S

    def count(self, number: int = 1) -> None:
        """`number` more are done."""
        self.done = min(self.total, self.done + number)
        now = time.monotonic()
        if self.is_shown and now >= self._next and self.done < self.total:
            self._next = now + BETWEEN_LINES_S
            print(self.render(now - self._began), file=sys.stderr, flush=True)

    def render(self, seconds: float) -> str:
        left_s = seconds * (self.total - self.done) / max(1, self.done)
        counts = f"{self.done:,}/{self.total:,}"
        if self.unit == "GiB":
            counts = f"{self.done / BYTES_PER_GIB:,.2f}/{self.total / BYTES_PER_GIB:,.2f} GiB"
        return f"{self.what}: {counts}, ETA {render_duration(left_s)}"


def render_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
