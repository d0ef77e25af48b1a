"""What the kernel knows about other processes: their state, and the death of a parent. Linux's /proc and prctl."""

import atexit
import contextlib
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from ptune_dist.common.interrupts import ignore_signals

PR_SET_PDEATHSIG = 1  # prctl(2)
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not safe between fork and exec


def signal_on_parent_death(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies, even by SIGKILL. Linux only."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def process_state(pid: int) -> str:
    """The state letter of proc(5), such as "R" or "Z"; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def is_dead(pid: int) -> bool:
    """Whether the process is gone or a zombie."""
    return process_state(pid) in ("", "Z")


def wait_until_dead(pids: list[int], seconds: float) -> None:
    """Return once each is gone or a zombie, or after `seconds`: an orphan stays a zombie until an init reaps it."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at and not all(map(is_dead, pids)):
        time.sleep(0.02)


def send_signal(pid: int, number: int) -> None:
    """Like os.kill, but a process that is already gone is not an error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def leave(status: int) -> NoReturn:
    """End this process: with torch, without Python's own cleanup, once all it writes is written.

    torch keeps process groups that others still hold, such as DeepSpeed. Their threads abort a process now and then
    while Python cleans up, and a run that has finished would count as failed. In a process that is no rank, exit
    functions still run, to remove temporary files and end workers.
    """
    ignore_signals()
    if "torch.distributed" in sys.modules:
        if "RANK" not in os.environ:
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # its reader is gone
                stream.flush()
        os._exit(status)
    sys.exit(status)
