"""Requests to stop that reach a launcher: by a signal, or by the end of its standard input."""

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType

SECONDS_BETWEEN_INTERRUPTS = 3.0  # one Ctrl-C may arrive twice


@dataclass
class StopRequests:
    """What this launcher has been asked to do."""

    to_stop: bool = False
    to_end: bool = False  # a second Ctrl-C
    stopped_at: float = 0.0

    def listen(self) -> None:
        """Install the signal handlers; if PTUNE_STOP_WITH_INPUT is set, also watch the standard input."""
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self.handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
            signal.signal(signal.SIGHUP, self.handle)
        if os.environ.get("PTUNE_STOP_WITH_INPUT"):  # ssh does not forward signals
            threading.Thread(target=self._wait_for_end_of_input, daemon=True).start()

    def _wait_for_end_of_input(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        self.handle(signal.SIGTERM, None)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.to_stop:
            self.to_stop = True
            self.stopped_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.stopped_at > SECONDS_BETWEEN_INTERRUPTS:
            self.to_end = True
