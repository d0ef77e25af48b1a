"""The ranks of one node: torchrun started, watched from outside, ended with everything that it started.

Floor 6.
"""

import contextlib
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, BinaryIO

import psutil

from ptune_dist.cluster.link import OWN_GAP_S
from ptune_dist.cluster.signs import (
    DONE,
    FOLDER,
    LAUNCHER_PID,
    NODE_NAME,
    SHOW_STACKS,
    STOPPED,
    End,
    ask_to_stop,
    end_with_parent,
    first_cause,
    read_beats,
    read_ends,
    stack_file,
)
from ptune_dist.common.files import fault_on_failed_write

SECONDS_FOR_STACKS = 3.0
# For other ranks: in a collective, or in the first look at its result, which on a GPU comes later.
WHERE_RANKS_WAIT = ("/torch/distributed/", "/torch/cuda/", "/deepspeed/runtime/", "/ptune_dist/distributed/world.py")
ABORTED = ": Fatal Python error: Aborted"
SECONDS_TO_END = 10.0
SECONDS_FOR_WORDS = 3.0
SECONDS_TO_LEAVE = 15.0  # after the last word of all ranks
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Start:
    """What torchrun is told."""

    command: Sequence[str]  # of the package: ["train", CONFIG, ...]
    run_dir: Path
    job_id: str
    node: str
    node_rank: int
    num_nodes: int
    num_procs: int
    address: str  # of the head
    port: int  # of this attempt's store
    interface: str  # of the network between the nodes; "" leaves the choice to gloo
    start_timeout_s: float


class Ranks:
    """One attempt on one node."""

    def __init__(self, start: Start):
        self._start, self._began = start, time.monotonic()
        memory = Path("/dev/shm")  # signs of life are no work for a disk
        self.folder, self._claim = make_folder(memory if memory.is_dir() else Path(tempfile.gettempdir()))
        self._copiers: list[threading.Thread] = []
        to_pipes = {} if sys.stdout.isatty() else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._torchrun = subprocess.Popen(
            self._command(),
            env=self._environment(),
            start_new_session=True,
            preexec_fn=prepare_child,
            stdin=subprocess.DEVNULL,
            **to_pipes,
        )
        if to_pipes:
            self._copy_output()
        self._has_shown, self._frozen = False, None
        self._looked_at, self._resumed_at, self._failed_at, self._said_at = time.monotonic(), 0.0, 0.0, 0.0

    def _command(self) -> list[str]:
        start = self._start
        return [
            sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=static", f"--rdzv-id={start.job_id}",
            f"--nnodes={start.num_nodes}", f"--node-rank={start.node_rank}", f"--nproc-per-node={start.num_procs}",
            f"--master-addr={start.address}", f"--master-port={start.port}", "--max-restarts=0",
            f"--log-dir={self.folder / 'torchrun'}",  # a folder of its own would stay where it is killed
            # requests to stop come by the launcher's file: torchrun must not kill what is being saved
            "--signals-to-handle=SIGQUIT", "-m", "ptune_dist", *start.command,
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        start = self._start
        cores = max(1, len(os.sched_getaffinity(0)) // start.num_procs)
        defaults = {
            "NCCL_DEBUG": "WARN", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": str(cores),
            "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        }  # fmt: skip
        if start.interface:
            defaults["GLOO_SOCKET_IFNAME"] = start.interface
        ours = {FOLDER: str(self.folder), NODE_NAME: start.node, LAUNCHER_PID: str(os.getpid())}
        return defaults | os.environ | ours

    def _copy_output(self) -> None:
        """To our own streams and, together, to a log of the node in the run."""
        path = self._start.run_dir / "logs" / f"{slug(self._start.node)}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = open(path, "ab", buffering=0)
        except OSError:
            log = None
        for source, sink in ((self._torchrun.stdout, sys.stdout.buffer), (self._torchrun.stderr, sys.stderr.buffer)):
            self._copiers.append(threading.Thread(target=copy_lines, args=(source, sink, log), daemon=True))
            self._copiers[-1].start()

    def ask_to_stop(self) -> None:
        ask_to_stop(self.folder)

    def look(self) -> End | None:
        """How the ranks of this node have ended, or what is wrong with one that has not; None while all is well."""
        if time.monotonic() - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return None
        if time.monotonic() - self._looked_at > OWN_GAP_S:  # we were stopped, and the ranks perhaps with us
            self._resumed_at = time.monotonic()
        self._looked_at = time.monotonic()
        try:
            return self._judge()
        except FileNotFoundError:  # systemd's RemoveIPC, say
            return self._named(
                End("error", f"{self.folder}, where ranks give signs, is gone from node {self._start.node}")
            )

    def _judge(self) -> End | None:
        """How the ranks have ended, what is wrong with one, or None. Raises FileNotFoundError without the folder."""
        self.folder.stat()
        found = self._frozen or self._find_dead() or self._find_hung() or self._find_failed()
        if found and found.kind == "lost":
            found = self.observe()  # another's word may explain it
        ends = list(read_ends(self.folder).values())
        is_all_said = len(ends) == self._start.num_procs
        self._said_at = self._said_at or (time.monotonic() if is_all_said else 0.0)
        is_left = is_all_said and (self._are_gone() or time.monotonic() - self._said_at > SECONDS_TO_LEAVE)
        if found or (self._torchrun.poll() is None and not is_left):
            return found
        if is_all_said:
            return first_cause(ends)
        code = self._torchrun.returncode
        kind, text = "killed" if code < 0 else "error", f"torchrun on node {self._start.node} ended with status {code}"
        return self._named(first_cause([*ends, End(kind, text)]))

    def observe(self) -> End:
        """What this node knows when it is told to end its ranks for what happened on another."""
        ends = [*read_ends(self.folder).values()]
        found = [end for end in (self._find_dead(), self._find_frozen(), *ends) if end]
        found = [end for end in found if end.kind not in (DONE, STOPPED)]
        return self._named(first_cause(found)) if found else End("ended", node=self._start.node)

    def _find_dead(self) -> End | None:
        """A rank that is gone without a last word."""
        ends = read_ends(self.folder)
        dead = [b for b in read_beats(self.folder) if b.rank not in ends and state_of(b.pid) in ("", "Z")]
        dead = [b for b in dead if b.rank not in read_ends(self.folder)]  # its word may have come just then
        if not dead:
            return None
        dead.sort(key=lambda beat: self._what_stacks_say(beat.rank).endswith(ABORTED))
        which = ", ".join(str(beat.rank) for beat in dead)
        why = self._what_stacks_say(dead[0].rank)
        text = f"rank {which} on node {self._start.node} was killed after step {dead[0].step}{why}"
        kind = "lost" if why.endswith(ABORTED) else "killed"  # NCCL aborts a rank that has lost another
        return End(kind, text, dead[0].rank, self._start.node)

    def _are_gone(self) -> bool:
        """Whether no rank is left. torchrun itself may stay: where the head's leaves first the others complain."""
        try:
            ranks = psutil.Process(self._torchrun.pid).children()
        except psutil.NoSuchProcess:
            return True
        return all(state_of(rank.pid) in ("", "Z") for rank in ranks)

    def _find_failed(self) -> End | None:
        """A rank that has ended badly while others wait for it; each gets a while to say what it knows."""
        ends = [end for end in read_ends(self.folder).values() if end.kind not in (DONE, STOPPED)]
        self._failed_at = self._failed_at or (time.monotonic() if ends else 0.0)
        return first_cause(ends) if ends and time.monotonic() - self._failed_at > SECONDS_FOR_WORDS else None

    def _what_stacks_say(self, rank: int) -> str:
        """ "Fatal Python error: Segmentation fault", where the fault handler saw it."""
        path = stack_file(self.folder, rank)
        first = path.read_text(errors="replace").partition("\n")[0] if path.exists() else ""
        return f": {first}" if first.startswith("Fatal") else ", by hand or for want of memory"

    def _find_frozen(self) -> End | None:
        """A rank that is stopped, or was until its stacks were asked for."""
        if self._frozen:
            return self._frozen
        for beat in read_beats(self.folder):
            if state_of(beat.pid) in ("T", "t"):
                where = f"rank {beat.rank} on node {self._start.node}"
                text = f"{where} is stopped (SIGSTOP or a debugger) after step {beat.step}"
                return End("frozen", text, beat.rank, self._start.node)
        return None

    def _find_hung(self) -> End | None:
        """The rank of this node whose next sign of life is overdue, the longest silent first."""
        now, beats = time.monotonic(), read_beats(self.folder)
        node, patience = self._start.node, self._start.start_timeout_s
        if len(beats) < self._start.num_procs and now - self._began > patience:
            return End("hang", f"a rank on node {node} has not begun within {patience:.0f} s", node=node)
        late = [beat for beat in beats if now > max(beat.deadline, self._resumed_at + beat.deadline - beat.at)]
        late = [beat for beat in late if beat.rank not in read_ends(self.folder)]
        if not late:
            return None
        worst = min(late, key=lambda beat: beat.at)
        frozen = self._find_frozen()
        text = (
            f"rank {worst.rank} on node {node} has made no progress for {now - worst.at:.0f} s, after step {worst.step}"
        )
        return frozen or End("hang", text, worst.rank, node)

    def _named(self, end: End) -> End:
        return replace(end, node=end.node or self._start.node)

    def end(self, *, with_stacks: bool) -> End | None:
        """End every process of this attempt; with stacks, each rank's go to the run first, and are judged."""
        stuck = None
        if with_stacks:
            self.show_stacks()
            stuck = self._find_stuck()
        if self._torchrun.poll() is None:  # first, that it neither complains nor starts another rank
            self._torchrun.kill()
        self._torchrun.wait()
        until = time.monotonic() + SECONDS_TO_END
        while (processes := self._processes()) and time.monotonic() < until:
            for process in processes:
                send_signal(process.pid, signal.SIGKILL)
            psutil.wait_procs(processes, timeout=1.0)
        for copier in self._copiers:
            copier.join(timeout=2.0)
        return stuck

    def _processes(self) -> list[psutil.Process]:
        """All that was started for this attempt, by the node's folder in its environment: orphans are among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(FOLDER) == str(self.folder):
                    found.append(process)
        return found

    def show_stacks(self) -> None:
        """Have each rank write its stacks, once; the ranks go on. What they do after this is how they end."""
        if self._has_shown:
            return
        self._has_shown, self._frozen = True, self._find_frozen()
        ours = {process.pid for process in self._processes()}
        beats = [beat for beat in read_beats(self.folder) if beat.pid in ours]
        for number in (SHOW_STACKS, signal.SIGCONT):  # of one that is stopped
            for beat in beats:
                send_signal(beat.pid, number)
        files, before = [stack_file(self.folder, beat.rank) for beat in beats], None
        until = time.monotonic() + SECONDS_FOR_STACKS
        while time.monotonic() < until and (sizes := [file.stat().st_size for file in files]) != before:
            before = sizes if all(sizes) else None
            time.sleep(0.1)
        keeper = threading.Thread(target=self._keep_stacks, daemon=True)  # a disk that stalls may be what hangs
        keeper.start()
        keeper.join(SECONDS_FOR_STACKS)

    def _find_stuck(self) -> End | None:
        """A rank for which others wait: signs of life cannot tell, since those who wait give none either."""
        for beat in sorted(read_beats(self.folder), key=lambda beat: beat.at):
            path = stack_file(self.folder, beat.rank)
            place = busy_place(path.read_text(errors="replace")) if path.exists() else ""
            if place:
                seconds, node = time.monotonic() - beat.at, self._start.node
                text = (
                    f"rank {beat.rank} on node {node} has made no progress for {seconds:.0f} s, after step {beat.step}"
                )
                return End("stuck", f"{text}, in {place}", beat.rank, node)
        return None

    def _keep_stacks(self) -> None:
        folder = self._start.run_dir / "stacks"
        try:
            folder.mkdir(exist_ok=True)
            for path in self.folder.glob("rank-*.txt"):
                if path.stat().st_size:
                    shutil.copyfile(path, folder / path.name)
        except OSError:
            return  # a full disk must not keep the launcher from ending the ranks

    def forget(self) -> None:
        """Remove the node's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()


def make_folder(parent: Path) -> tuple[Path, IO]:
    """A new folder and the file in it whose lock says that its launcher lives; those of killed launchers are removed.

    A lock and not a process id: containers that share /dev/shm do not share ids. Raises RunFault.
    """
    for folder in parent.glob("ptune-*"):
        with contextlib.suppress(OSError):
            with open(folder / "claim") as claim:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
    with fault_on_failed_write(parent):
        new = Path(tempfile.mkdtemp(prefix=".ptune-", dir=parent))
        claim = open(new / "claim", "w")
        fcntl.flock(claim, fcntl.LOCK_EX)
        folder = new.rename(parent / new.name[1:])  # seen by others only now that it is claimed
    return folder, claim


def prepare_child() -> None:
    """In torchrun before it begins: it dies with its launcher, and stop requests are none of its business.

    What is ignored here is ignored by the ranks too until `Watch` handles it, so that a request that comes while they
    load is not their end.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a base in a core file helps nobody
    end_with_parent(signal.SIGKILL)


def busy_place(stack: str) -> str:
    """Where a rank was busy when its fault handler wrote its stacks; "" where it waited for other ranks."""
    found = re.search(r'^Current thread .*\n  File "(.*)", line (\d+) in (.*)', stack, re.MULTILINE)
    if not found or any(place in found[1] for place in WHERE_RANKS_WAIT):
        return ""
    return f"{found[3]} ({Path(found[1]).name}, line {found[2]})"


def slug(name: str) -> str:
    """A file's name from a node's: "2 (ip-10-0-0-21)" becomes "2-ip-10-0-0-21"."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def state_of(pid: int) -> str:
    """A letter as in proc(5), "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def copy_lines(source: BinaryIO, sink: BinaryIO, log: BinaryIO | None) -> None:
    """Until the source ends; a sink that fails is no reason to stop reading, which would block the ranks."""
    for line in iter(source.readline, b""):
        for out in (sink, log):
            try:
                if out:
                    out.write(line)
                    out.flush()
            except (OSError, ValueError):
                continue
