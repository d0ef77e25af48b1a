"""When the steps of a run were logged, as it is seen from outside."""

import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Gap(NamedTuple):
    """The time between two lines."""

    step: int  # of the later one
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class StepTimes:
    """Call `read` often. `members`: the nodes that have computed blocks of the last step."""

    def __init__(self, metrics: Path):
        self.members: set[str] = set()
        self.step = 0
        self.last_at = time.monotonic()
        self._metrics = metrics
        self._seen: dict[int, float] = {}
        self._changed_at = 0  # the step since which these are the members
        self._state = (0, 0)

    def read(self) -> None:
        if not self._metrics.exists():
            return
        found = self._metrics.stat()
        if (found.st_ino, found.st_size) == self._state:
            return
        self._state = (found.st_ino, found.st_size)
        for line in self._metrics.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                self._take(json.loads(line))

    def _take(self, line: dict) -> None:
        if line["step"] <= self.step:
            return
        self.step = line["step"]
        self.last_at = self._seen[self.step] = time.monotonic()
        if "nodes" in line and (members := set(line["nodes"]["blocks"])) != self.members:
            self.members = members
            self._changed_at = self.step

    @property
    def num_since_change(self) -> int:
        """Steps since other nodes have computed them."""
        return self.step - self._changed_at

    def gaps(self) -> list[Gap]:
        return [Gap(step, start, end) for (_, start), (step, end) in pairwise(self._seen.items())]

    @property
    def usual_s(self) -> float:
        """The median time of the last steps."""
        return statistics.median(gap.seconds for gap in self.gaps()[-15:])

    def median(self, first: int, last: int) -> float:
        return statistics.median(gap.seconds for gap in self.gaps() if first < gap.step <= last)

    def longest(self, start: float, end: float) -> float:
        """The longest gap that is at least in part between two times."""
        return max((gap.seconds for gap in self.gaps() if gap.end > start and gap.start < end), default=0.0)
