"""What a rank and its node's launcher tell each other, in files of one folder on the node's own memory disk.

Floor 0. The launcher makes the folder and names it to the ranks in the environment. A rank leaves signs of life there,
its last word, and its stacks; the launcher leaves a request to stop. Without a launcher there is no folder.
"""

import contextlib
import ctypes
import json
import mmap
import os
import signal
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# in a rank's environment
FOLDER, NODE_NAME, LAUNCHER_PID = "PTUNE_NODE_FOLDER", "PTUNE_NODE_NAME", "PTUNE_LAUNCHER_PID"
SHOW_STACKS = signal.SIGQUIT  # a rank writes its stacks, whatever it is busy with, and goes on
PR_SET_PDEATHSIG = 1  # prctl(2)
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not to be loaded between fork and exec
BEAT = struct.Struct("=qqdd")  # process id, steps done, when, by when the next is due (time.monotonic, in s)

# How a rank, or a node, may end; of several, the one that stands first explains the others.
DONE, STOPPED = "done", "stopped"
KINDS = (
    "mistake",  # the user's, or a node that is not fit: nothing was begun
    "fault",  # a known one that would come again (loss not a number, disk full)
    "killed",  # without a last word
    "frozen",  # stopped by a signal, or by a debugger
    "unreachable",  # a node that is not heard from
    "error",  # an exception
    "stuck",  # no progress, in something else than waiting for other ranks
    "hang",  # no progress
    "lost",  # another rank went away
    "ended",  # by the launcher, for what happened elsewhere
    STOPPED,  # on request, after saving
    DONE,
)
WORTH_A_RESTART = ("killed", "frozen", "error", "stuck", "hang", "lost", "ended")
STATUS = {DONE: 0, STOPPED: 75, "mistake": 2}  # exit statuses; every other kind is 1


@dataclass(frozen=True)
class End:
    """How a rank or a node ended."""

    kind: str
    reason: str = ""
    rank: int | None = None
    node: str = ""

    @property
    def status(self) -> int:
        return STATUS.get(self.kind, 1)


STOPPED_EARLY = End(STOPPED, "asked to stop before the start")


def first_cause(ends: list[End]) -> End:
    """The end that explains the others; of one kind, the one that came first."""
    return min(ends, key=lambda end: KINDS.index(end.kind))


def own_folder() -> Path | None:
    """Where this rank's launcher looks, None without a launcher."""
    return Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life."""

    rank: int
    pid: int
    step: int
    at: float
    deadline: float


class BeatFile:
    """A rank's signs of life: 32 bytes in shared memory, so that a sign costs a microsecond."""

    def __init__(self, folder: Path, rank: int):
        path = folder / f"rank-{rank:05d}.beat"
        path.write_bytes(bytes(BEAT.size))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), BEAT.size)

    def write(self, step: int, seconds: float) -> None:
        """Alive, with `step` steps done; the next sign comes within so many seconds."""
        now = time.monotonic()  # one copy: pack_into zeroes the memory first, and a reader may look just then
        self._memory[:] = BEAT.pack(os.getpid(), step, now, now + seconds)


def read_beats(folder: Path) -> list[Beat]:
    """Of every rank of the node that has given one."""
    found = []
    for path in sorted(folder.glob("rank-*.beat")):
        content = path.read_bytes()
        if len(content) == BEAT.size and (beat := BEAT.unpack(content))[0]:
            found.append(Beat(int(path.stem.removeprefix("rank-")), *beat))
    return found


def write_end(folder: Path, end: End) -> None:
    """A rank's last word."""
    aside = folder / f".rank-{end.rank:05d}.end"
    aside.write_text(json.dumps(asdict(end)), encoding="utf-8")
    aside.rename(folder / f"rank-{end.rank:05d}.end")


def read_ends(folder: Path) -> dict[int, End]:
    """Last words, the earliest first."""
    paths = sorted(folder.glob("rank-*.end"), key=lambda path: path.stat().st_mtime_ns)
    found = [End(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return {end.rank: end for end in found}


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def ask_to_stop(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that is gone is a fault of its own
        (folder / "stop").touch()


def is_asked_to_stop(folder: Path) -> bool:
    return (folder / "stop").exists()


def end_with_parent(number: int) -> None:
    """Have the kernel send this signal when the process that started this one dies, by kill -9 too. Linux only."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def is_orphaned() -> bool:
    """Whether this rank's launcher is dead already."""
    launcher = os.environ.get(LAUNCHER_PID)
    return bool(launcher) and not Path(f"/proc/{launcher}").exists() and sys.platform == "linux"
