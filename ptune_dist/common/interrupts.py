"""What Ctrl-C and TERM do while there is nothing to save: one line, and the end of the process.

Python's own handler raises KeyboardInterrupt wherever the main thread is. Inside the import of an extension module that
becomes an ImportError, a SystemError or an abort, and in a destructor it is printed and lost. So this handler raises
nothing. `run.watch` takes over once there is something to save.

Only light modules are imported here: this is the first code that runs.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130
LINES = {signal.SIGINT: "interrupted: nothing to save", signal.SIGTERM: "terminated: nothing to save"}
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

_listening_pid = 0
_last_acts: list[Callable[[], None]] = []


def listen() -> None:
    """Install the handlers. A signal that is ignored, as by nohup or by our launcher, stays ignored."""
    global _listening_pid
    _listening_pid = os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_by)


def before_end(act: Callable[[], None]) -> None:
    """Have `end_interrupted` call `act` first, to record how this process ended."""
    _last_acts.append(act)


def forget(act: Callable[[], None]) -> None:
    """Undo `before_end`."""
    _last_acts.remove(act)


def end_by(number: int, _frame: FrameType | None) -> None:
    """End this process because of a signal."""
    if os.getpid() != _listening_pid:  # a forked worker: its parent prints the line
        os._exit(128 + number)
    if number == signal.SIGINT:
        end_interrupted()
    write_line(LINES[signal.SIGTERM])
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def ignore_signals() -> None:
    """All is done and the status is known: a signal while Python cleans up must not change it."""
    if os.getpid() == _listening_pid:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def end_interrupted(line: str = LINES[signal.SIGINT]) -> None:
    """End with status 130 and a line; returns only where `listen` was not called, as in a test."""
    if os.getpid() != _listening_pid:
        return
    ignore_signals()  # a second Ctrl-C must not cut off the record of the first
    try:
        for act in reversed(_last_acts):
            act()
    finally:
        write_line(line)
        os._exit(INTERRUPTED)


def write_line(line: str) -> None:
    """A line on stderr, from rank 0 only, whatever state Python's own streams are in."""
    if os.environ.get("RANK", "0") != "0":
        return
    begin = f"{SHOW_CURSOR}\n" if os.isatty(2) else ""  # after a bar, or the terminal's own ^C
    try:
        os.write(2, f"{begin}{line}\n".encode())
    except OSError:
        pass
