"""How a rank is watched: requests to stop, heartbeats, the stacks of a rank that hangs, and its outcome.

A launcher (`launch/run.sh`) watches from outside. Without one, a timer inside the process ends a hang.
"""

import contextlib
import faulthandler
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome
from ptune_dist.cluster.processes import signal_on_parent_death
from ptune_dist.cluster.rank_files import (
    NODE_NAME,
    SHOW_STACKS,
    HeartbeatFile,
    is_launcher_dead,
    is_stop_requested,
    mark_begun,
    node_folder,
    stack_file,
    write_outcome,
)
from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.common.interrupts import LINES, before_end, end_interrupted, forget
from ptune_dist.common.writes import Write, write_now
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.status import end_status

SECONDS_BETWEEN_INTERRUPTS = 3.0
SECONDS_TO_SAVE_ALONE = 20.0  # after the launcher, and perhaps other ranks, have died
SECONDS_BETWEEN_TIMERS = 1.0
STOPPED_REASON = "stopped on request, after saving"
INTERRUPT = Outcome("ended", "interrupted")
NEVER_S = 10 * 365 * 86400.0
# Fragments of what gloo, NCCL and torch's store say when another rank has gone away.
LOST_PEER_MESSAGES = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "ncclSystemError",  # older versions of NCCL say this for a lost peer too
    "remote process exit",
    "NCCL communicator was aborted",
    "Socket Timeout",
    "recvValue",
    "heartbeat monitor",
)
# Fragments of what torch, Triton, cuBLAS, cuDNN and NCCL say when memory has run out.
GPU_MEMORY_MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
    "Failed to CUDA calloc",
)
CPU_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory: you tried to allocate")


class StopAgreed(Exception):
    """All ranks have left what they did, an evaluation for instance, because one was asked to stop."""


class Watch:
    """Notices requests to stop, from TERM, USR2, INT or the launcher, and reports that this rank is alive.

    Before `begin_steps` there is nothing to save, and INT ends the process at once. After it, the first INT is a
    request to stop and a second one ends the process. One Ctrl-C reaches a rank twice, from the terminal and from
    torchrun, so a second one counts only after a few seconds. The ranks agree to stop by summing `requested` at a step
    boundary.
    """

    def __init__(self, rank: int, hang_timeout_s: float):
        self.folder = node_folder()
        self._rank = rank
        self._hang_timeout_s = hang_timeout_s or NEVER_S
        # Reading the data and the base sends no heartbeat, and the first step may compile.
        load_timeout_s = float(os.environ.get("PTUNE_LOAD_TIMEOUT_S") or 3600)
        self._patience_s = max(self._hang_timeout_s, load_timeout_s)
        self._file = HeartbeatFile(self.folder, rank) if self.folder else None
        self._stacks: TextIO | None = None
        self._timer_set_at = 0.0
        self._step = 0
        self._is_stepping = False
        self._run_dir = Path()
        self._is_asked = False
        self._asked_at = 0.0
        self._parent = os.getppid()
        self._handlers_before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._is_asked or (self.folder is not None and is_stop_requested(self.folder))

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                self._handlers_before[number] = signal.signal(number, self._handle)
        if self.folder:
            self._stacks = open(stack_file(self.folder, self._rank), "w")
            faulthandler.enable(self._stacks)
            faulthandler.register(SHOW_STACKS, self._stacks)
            signal_on_parent_death(signal.SIGTERM)  # a request to save and stop
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._stacks and not self.folder:  # there was no hang: remove the empty file
            self._stacks.close()
            path = Path(self._stacks.name)
            with contextlib.suppress(OSError):  # if files of other ranks are left, or the run was removed
                path.unlink()
                path.parent.rmdir()
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def begin_run(self) -> None:
        """Everything is loaded: the launcher ends a rank before this call at once when it is asked to stop.

        Every rank must call before any rank writes into the run's folder.
        """
        if self.folder:
            mark_begun(self.folder, self._rank)

    def begin_steps(self, run_dir: Path) -> None:
        """From the first step on, heartbeats are due within the hang timeout."""
        self._is_stepping = True
        self._run_dir = run_dir
        if not self.folder and self._hang_timeout_s < NEVER_S:
            path = stack_file(run_dir / "stacks", self._rank)
            with fault_on_failed_write(path):
                path.parent.mkdir(exist_ok=True)
                self._stacks = open(path, "w")
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Send a heartbeat; `step` is the number of steps done, if another one is."""
        if step is not None:
            self._step = step
            if self._patience_s != self._hang_timeout_s:
                self._patience_s = self._hang_timeout_s
                self._timer_set_at = 0.0
        if self._file:
            self._file.write(self._step, self._patience_s)
        elif self._stacks and time.monotonic() - self._timer_set_at > SECONDS_BETWEEN_TIMERS:
            self._timer_set_at = time.monotonic()
            faulthandler.dump_traceback_later(self._patience_s, exit=True, file=self._stacks)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._is_stepping:
            interrupt()
        if os.getppid() != self._parent and self._stacks:  # an orphan: other ranks may be gone, and saving may hang
            faulthandler.dump_traceback_later(SECONDS_TO_SAVE_ALONE, exit=True, file=self._stacks)
        if not self._is_asked:
            self._is_asked = True
            self._asked_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > SECONDS_BETWEEN_INTERRUPTS:
            interrupt(describe_kept(self._run_dir))


def interrupt(line: str = LINES[signal.SIGINT]) -> NoReturn:
    """End with what is saved; an exception would not survive everywhere (see `common.interrupts`)."""
    end_interrupted(line)
    raise KeyboardInterrupt


def describe_kept(run_dir: Path) -> str:
    """The line after a second Ctrl-C: steps since the last checkpoint are lost."""
    try:
        found = list_checkpoints(run_dir / "checkpoints")
    except UserError:  # the disk does not answer, and this is a signal handler
        return "interrupted a second time"
    where = f"continues from {found[-1]}" if found else "starts again: there is no checkpoint yet"
    return f"interrupted a second time; the same command {where}"


def report_outcome(function: Callable[[], int]) -> int:
    """Call `function` and return its exit status; a launcher, if there is one, learns how it ended.

    Under a launcher a known outcome has status 0, since torchrun takes any other for a crash. A lack of memory becomes
    a RunFault, which is reported in one line, except under a bare torchrun, where only rank 0 could report it.
    """
    if node_folder():  # until `Watch` takes over there is nothing to save, and requests to stop are ignored
        signal_on_parent_death(signal.SIGKILL)
        if is_launcher_dead():  # it died before the line above took effect
            os._exit(1)

    def record_interrupt() -> None:
        record_outcome(INTERRUPT)

    before_end(record_interrupt)
    try:
        status = function()
    except BaseException as error:
        outcome = describe_error(error)
        record_outcome(outcome)
        is_reported = node_folder() is not None or os.environ.get("WORLD_SIZE", "1") == "1"
        if outcome.kind == "fault" and is_reported and not isinstance(error, RunFault):
            raise RunFault(outcome.reason) from error
        raise
    finally:
        forget(record_interrupt)
    record_outcome(Outcome(STOPPED, STOPPED_REASON) if status == 75 else Outcome(DONE))
    return status if node_folder() is None else 0


def record_outcome(outcome: Outcome) -> None:
    """Record this rank's outcome for its launcher, if there is one."""
    folder = node_folder()
    if folder is None:
        return
    rank = int(os.environ.get("RANK", 0))
    node = outcome.node or os.environ.get(NODE_NAME, "")
    with contextlib.suppress(OSError):
        write_outcome(folder, replace(outcome, rank=rank, node=node))


@contextlib.contextmanager
def failure_in_status(run_dir: Path, record: Callable[[Write], None] = write_now) -> Iterator[None]:
    """If the body fails, record why in status.json. For one rank, which holds the run's lock.

    `record` is the world's pen.

    A user's mistake leaves the run as it was. A rank that has lost another does not know why; its launcher does.
    """

    def record_interrupt() -> None:
        record(lambda: end_status(run_dir, INTERRUPT))

    before_end(record_interrupt)
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        outcome = describe_error(error)
        has_launcher = node_folder() is not None and not is_launcher_dead()
        if (outcome.kind != "lost" or not has_launcher) and run_dir.is_dir():  # it may have been removed
            record(lambda: end_status(run_dir, outcome))
        raise
    finally:
        forget(record_interrupt)


def describe_error(error: BaseException) -> Outcome:
    """The outcome of a rank that ends with this exception."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError):
        return Outcome("mistake", text)
    if isinstance(error, RunFault):
        return Outcome("fault", text, node=getattr(error, "node", ""))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPT
    if isinstance(error, MemoryError) or names_any(text, CPU_MEMORY_MESSAGES):
        return describe_lack_of_memory("memory", text)
    if names_any(text, GPU_MEMORY_MESSAGES):
        return describe_lack_of_memory("GPU memory", text)
    kind = "lost" if names_any(text, LOST_PEER_MESSAGES) else "error"
    return Outcome(kind, f"{type(error).__name__}: {text[:300]}")


def names_any(text: str, messages: tuple[str, ...]) -> bool:
    return any(message in text for message in messages)


def describe_lack_of_memory(what: str, text: str) -> Outcome:
    """A fault, since it would happen again: a restart computes the same batch."""
    rank = os.environ.get("RANK", "0")
    node = os.environ.get(NODE_NAME, "")
    where = f"rank {rank} on node {node}" if node else f"rank {rank}"
    amount = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    detail = f" (tried to allocate {amount[1]})" if amount else ""
    remedy = "lower train.micro_batch_tokens, or use more ranks with ZeRO-3, model.quantization=int8 or offload_param"
    return Outcome("fault", f"{where} ran out of {what}{detail}: {remedy}")
