"""A node that waits for others, below `train.min_nodes`, logs it once and sets status.json."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from ptune_dist.errors import RunFault
from ptune_dist.run.shared_pen import SharedPen
from ptune_dist.run.status import mark_running, update_status


class Waiting:
    """For rank 0. A status that cannot be written now is no reason to end."""

    def __init__(self, run_dir: Path, pen: SharedPen, say: Callable[[str], None]):
        self._run_dir = run_dir
        self._pen = pen
        self._say = say
        self._is_said = False
        self._is_in_status = False

    def look(self, num_missing: int) -> None:
        """While a step does not begin, for want of so many nodes."""
        if not num_missing:
            return
        text = f"waits for {num_missing} more node{'s' * (num_missing > 1)} (train.min_nodes)"
        if not self._is_said:
            self._say(text)
            self._is_said = True
        if self._pen.is_writer and not self._is_in_status:
            with contextlib.suppress(RunFault):
                update_status(self._run_dir, state="waiting", reason=text)
            self._is_in_status = True

    def end(self) -> None:
        """A step begins."""
        if self._pen.is_writer and self._is_in_status:
            with contextlib.suppress(RunFault):
                mark_running(self._run_dir)
        self._is_said = self._is_in_status = False
