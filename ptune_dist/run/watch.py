"""How a rank is watched: requests to stop, signs of life, stacks where it hangs, and its last word.

Floor 1. A launcher (`launch/run.sh`) watches from outside. Without one, a timer in the process ends a hang.
"""

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptune_dist.cluster.signs import (
    DONE,
    NODE_NAME,
    SHOW_STACKS,
    STOPPED,
    BeatFile,
    End,
    end_with_parent,
    is_asked_to_stop,
    is_orphaned,
    own_folder,
    stack_file,
    write_end,
)
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.status import end_status

SECONDS_BETWEEN_INTERRUPTS = 3.0
SECONDS_TO_SAVE_ALONE = 20.0  # where the launcher is dead, and perhaps the other ranks
SECONDS_BETWEEN_TIMERS = 1.0
STOPPED_REASON = "stopped on request, after saving"
NEVER_S = 10 * 365 * 86400.0
SAID_OF_LOST_PEERS = (
    "gloo/transport",
    "Connection closed by peer",
    "ncclRemoteError",
    "recvValue",
    "heartbeat monitor",
)


class Watch:
    """Remembers that TERM, USR2 or INT, or the launcher, asked this rank to stop, and tells that it is alive.

    Before `begin_steps`, when there is nothing to save, INT ends the process at once. After it the first is a request,
    and a second one ends; since one Ctrl-C reaches a rank twice, from the terminal and from torchrun, a second one
    counts after a while only. The ranks agree on a stop by adding `requested` up over ranks at a step boundary.
    """

    def __init__(self, rank: int, hang_timeout_s: float):
        self.folder = own_folder()
        self._hang_timeout_s, self._rank = hang_timeout_s or NEVER_S, rank
        # reading data and base gives no sign of life, and the first step may compile
        self._patience_s = max(self._hang_timeout_s, float(os.environ.get("PTUNE_LOAD_TIMEOUT_S") or 3600))
        self._file = BeatFile(self.folder, rank) if self.folder else None
        self._stacks, self._timer_set_at = None, 0.0
        self._step, self._asked, self._asked_at = 0, False, 0.0
        self._is_stepping, self._parent = False, os.getppid()
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._asked or (self.folder is not None and is_asked_to_stop(self.folder))

    def __enter__(self) -> "Watch":
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        if self.folder:
            self._stacks = open(stack_file(self.folder, self._rank), "w")
            faulthandler.enable(self._stacks)
            faulthandler.register(SHOW_STACKS, self._stacks)
            end_with_parent(signal.SIGTERM)  # saves what there is
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._stacks and not self.folder:  # no hang: the empty file goes
            self._stacks.close()
            path = Path(self._stacks.name)
            path.unlink()
            with contextlib.suppress(OSError):  # other ranks' files
                path.parent.rmdir()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin_steps(self, run_dir: Path) -> None:
        """Everything is loaded: from here on a sign of life is due within the hang timeout."""
        self._is_stepping = True
        if not self.folder and self._hang_timeout_s < NEVER_S:
            path = stack_file(run_dir / "stacks", self._rank)
            path.parent.mkdir(exist_ok=True)
            self._stacks = open(path, "w")
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """A sign of life; `step` where one more is done."""
        if step is not None:
            self._step = step
            if self._patience_s != self._hang_timeout_s:
                self._patience_s, self._timer_set_at = self._hang_timeout_s, 0.0
        if self._file:
            self._file.write(self._step, self._patience_s)
        elif self._stacks and time.monotonic() - self._timer_set_at > SECONDS_BETWEEN_TIMERS:
            self._timer_set_at = time.monotonic()
            faulthandler.dump_traceback_later(self._patience_s, exit=True, file=self._stacks)

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and not self._is_stepping:
            raise KeyboardInterrupt
        if os.getppid() != self._parent and self._stacks:  # an orphan: the others may be gone as well
            faulthandler.dump_traceback_later(SECONDS_TO_SAVE_ALONE, exit=True, file=self._stacks)
        if not self._asked:
            self._asked, self._asked_at = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > SECONDS_BETWEEN_INTERRUPTS:
            raise KeyboardInterrupt


def leave_word(function: Callable[[], int]) -> int:
    """Call `function`, leave word of its end to the launcher where there is one, and return the exit status."""
    if own_folder():  # requests to stop wait until `Watch` hears them; there is nothing to save before
        end_with_parent(signal.SIGKILL)
        if is_orphaned():
            os._exit(1)
    try:
        status = function()
    except BaseException as error:
        say_end(describe_error(error))
        raise
    say_end(End(STOPPED, STOPPED_REASON) if status == 75 else End(DONE))
    return status if own_folder() is None else 0


def say_end(end: End) -> None:
    folder, rank = own_folder(), int(os.environ.get("RANK", 0))
    if folder:
        with contextlib.suppress(OSError):
            write_end(folder, replace(end, rank=rank, node=end.node or os.environ.get(NODE_NAME, "")))


@contextlib.contextmanager
def status_of_failure(run_dir: Path) -> Iterator[None]:
    """Where what follows fails, status.json says why. One rank enters, under the run's lock.

    A mistake of the user's leaves the run as it was.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        end = describe_error(error)
        if (
            end.kind != "lost" or own_folder() is None or is_orphaned()
        ):  # why a rank has lost another, the launchers know
            end_status(run_dir, end)
        raise


def describe_error(error: BaseException) -> End:
    """What an exception of a rank was."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (UserError, RunFault)):
        return End("mistake" if isinstance(error, UserError) else "fault", text, node=getattr(error, "node", ""))
    if isinstance(error, KeyboardInterrupt):
        return End("ended", "interrupted")
    is_lost = any(word in text for word in SAID_OF_LOST_PEERS)
    return End("lost" if is_lost else "error", f"{type(error).__name__}: {text[:300]}")
