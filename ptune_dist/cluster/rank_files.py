"""How a node's launcher and its ranks communicate: through small files in one folder on the node's memory disk.

The launcher creates the folder and passes its path to the ranks in the environment. A rank writes its heartbeat, its
outcome and its stacks there; the launcher writes a request to stop. Without a launcher there is no folder.
"""

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ptune_dist.cluster.outcome import Outcome
from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.common.locks import Lock, try_lock

# Variables in a rank's environment.
NODE_FOLDER = "PTUNE_NODE_FOLDER"
NODE_NAME = "PTUNE_NODE_NAME"
LAUNCHER_PID = "PTUNE_LAUNCHER_PID"
EXPECTED_NODES = "PTUNE_EXPECTED_NODES"  # of replicas: how many were started together

SHOW_STACKS = signal.SIGQUIT  # a rank writes its stacks, whatever it is doing, and continues
HEARTBEAT = struct.Struct("=qqdd")  # process id, steps done, time, deadline of the next one (time.monotonic, in s)


def node_folder() -> Path | None:
    """The folder that this rank shares with its launcher; None without a launcher."""
    path = os.environ.get(NODE_FOLDER)
    return Path(path) if path else None


def to_file_name(node: str) -> str:
    """A file name made of a node's name: "2 (ip-10-0-0-21)" becomes "2-ip-10-0-0-21"."""
    return re.sub(r"[^\w.-]+", "-", node).strip("-")


def write_secret(folder: Path, secret: str) -> None:
    """Pass PTUNE_SECRET to the ranks, which need it where nodes train as replicas; "" if it is not set."""
    with open(os.open(folder / "secret", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secret)


def read_secret() -> str:
    """What the launcher of this rank has passed; "" without one."""
    folder = node_folder()
    if folder is None or not (folder / "secret").exists():
        return ""
    return (folder / "secret").read_text()


def is_launcher_dead() -> bool:
    """Whether this rank had a launcher that is gone."""
    launcher = os.environ.get(LAUNCHER_PID)
    return bool(launcher) and sys.platform == "linux" and not Path(f"/proc/{launcher}").exists()


def create_node_folder(parent: Path) -> tuple[Path, Lock]:
    """Create the launcher's folder and lock a file in it; folders of dead launchers are removed.

    The launcher holds the lock for as long as it lives. Process ids would not do: containers that share /dev/shm do not
    share them. Raises RunFault.
    """
    for folder in parent.glob("ptune-*"):
        with contextlib.suppress(OSError):
            claim = try_lock(folder / "claim")
            if claim is not None:
                shutil.rmtree(folder, ignore_errors=True)
                claim.close()
    with fault_on_failed_write(parent):
        new = Path(tempfile.mkdtemp(prefix=".ptune-", dir=parent))
        folder = parent / new.name[1:]
        claim = try_lock(new / "claim")
        assert claim is not None, "nobody else knows the folder"
        new.rename(folder)  # visible to other launchers only once it is locked
        claim.moved_to(folder)
    return folder, claim


@dataclass(frozen=True)
class Heartbeat:
    """The latest heartbeat of a rank; times are those of time.monotonic."""

    rank: int
    pid: int
    step: int
    at: float
    deadline: float


class HeartbeatFile:
    """A rank's heartbeat: 32 bytes of shared memory, so that one costs a microsecond."""

    def __init__(self, folder: Path, rank: int):
        path = folder / f"rank-{rank:05d}.beat"
        path.write_bytes(bytes(HEARTBEAT.size))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), HEARTBEAT.size)

    def write(self, step: int, seconds: float) -> None:
        """Report that the rank is alive with `step` steps done, and that its next heartbeat is due in `seconds`."""
        now = time.monotonic()
        # A single copy. pack_into would zero the memory first, and a reader could see that.
        self._memory[:] = HEARTBEAT.pack(os.getpid(), step, now, now + seconds)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The latest heartbeat of each rank of the node that has written one, by rank."""
    found = []
    for path in sorted(folder.glob("rank-*.beat")):
        content = path.read_bytes()
        if len(content) != HEARTBEAT.size:
            continue
        pid, step, at, deadline = HEARTBEAT.unpack(content)
        if pid:
            found.append(Heartbeat(int(path.stem.removeprefix("rank-")), pid, step, at, deadline))
    return found


def mark_begun(folder: Path, rank: int) -> None:
    """Record that a rank has loaded everything: from here on it may write into the run's folder."""
    (folder / f"rank-{rank:05d}.begun").touch()


def count_begun(folder: Path) -> int:
    """How many ranks of the node have loaded everything."""
    return len(list(folder.glob("rank-*.begun")))


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Record how the rank that `outcome` names has ended."""
    aside = folder / f".rank-{outcome.rank:05d}.end"
    aside.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    aside.rename(folder / f"rank-{outcome.rank:05d}.end")


def read_outcomes(folder: Path) -> dict[int, Outcome]:
    """The outcomes that ranks have recorded, by rank, the earliest first."""
    paths = sorted(folder.glob("rank-*.end"), key=lambda path: path.stat().st_mtime_ns)
    found = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return {outcome.rank: outcome for outcome in found if outcome.rank is not None}


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def request_stop(folder: Path) -> None:
    """Ask the ranks of a node to save and stop."""
    with contextlib.suppress(OSError):  # a missing folder is reported elsewhere
        (folder / "stop").touch()


def is_stop_requested(folder: Path) -> bool:
    return (folder / "stop").exists()
