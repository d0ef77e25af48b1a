"""The ranks of one node: torchrun is started, and ended together with every process that came from it."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from ptune_dist.cluster.devices import NUM_GPUS
from ptune_dist.cluster.link import OWN_PAUSE_S
from ptune_dist.cluster.outcome import Outcome, find_cause
from ptune_dist.cluster.processes import is_dead, send_signal, signal_on_parent_death, wait_until_dead
from ptune_dist.cluster.rank_files import (
    EXPECTED_NODES,
    LAUNCHER_PID,
    NODE_FOLDER,
    NODE_NAME,
    SHOW_STACKS,
    count_begun,
    create_node_folder,
    read_heartbeats,
    request_stop,
    stack_file,
    to_file_name,
    write_secret,
)
from ptune_dist.cluster.rank_monitor import RankMonitor
from ptune_dist.cluster.secret import VARIABLE as SECRET
from ptune_dist.cluster.secret import read_variable

SECONDS_FOR_STACKS = 3.0
SECONDS_TO_END = 10.0
SECONDS_TO_EXIT = 15.0  # after the last rank has recorded its outcome
SECONDS_BETWEEN_CHECKS = 0.2
# Of torch's CUDA allocator. torch 2.13 reads the first name, and the older second one with precedence over it.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class RankLaunch:
    """What to start on one node, and where in the job."""

    command: Sequence[str]  # of the package: ["train", CONFIG, ...]
    run_dir: Path
    job_id: str
    node: str
    node_rank: int
    num_nodes: int
    num_procs: int
    num_gpus: int  # that the node promises; 0: the ranks train on the CPU
    address: str  # of the head
    port: int  # of this attempt's store
    interface: str  # of the network between the nodes; "" leaves the choice to gloo
    start_timeout_s: float
    num_replicas: int = 0  # as in NodeJob


class Ranks:
    """One attempt on one node. Raises RunFault or OSError if it cannot be started."""

    def __init__(self, launch: RankLaunch):
        self._launch = launch
        memory = Path("/dev/shm")  # heartbeats should not wait for a disk
        self.folder, self._claim = create_node_folder(memory if memory.is_dir() else Path(tempfile.gettempdir()))
        self._monitor = RankMonitor(
            self.folder, launch.node, launch.num_procs, launch.start_timeout_s, on_gpu=launch.num_gpus > 0
        )
        if launch.num_replicas:
            write_secret(self.folder, read_variable())
        self._copiers: list[threading.Thread] = []
        self._checked_at = time.monotonic()
        self._all_reported_at = 0.0
        self._has_shown_stacks = False
        has_terminal = sys.stdout.isatty()
        self._torchrun = subprocess.Popen(
            build_torchrun_command(launch, self.folder),
            env=build_environment(launch, self.folder),
            start_new_session=True,
            preexec_fn=prepare_child,
            stdin=subprocess.DEVNULL,
            stdout=None if has_terminal else subprocess.PIPE,
            stderr=None if has_terminal else subprocess.PIPE,
        )
        if not has_terminal:
            self._copy_output()

    def _copy_output(self) -> None:
        """Copy what the ranks print to our own streams, and both to the node's log in the run directory."""
        path = self._launch.run_dir / "logs" / f"{to_file_name(self._launch.node)}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = open(path, "ab", buffering=0)
        except OSError:
            log = None
        for source, sink in ((self._torchrun.stdout, sys.stdout.buffer), (self._torchrun.stderr, sys.stderr.buffer)):
            copier = threading.Thread(target=copy_lines, args=(source, sink, log), daemon=True)
            copier.start()
            self._copiers.append(copier)

    def request_stop(self) -> None:
        request_stop(self.folder)

    def are_starting(self) -> bool:
        """Whether no rank has anything to save: one still imports or loads, and the others wait for it to begin."""
        return count_begun(self.folder) < self._launch.num_procs and not self._monitor.outcomes()

    def check(self) -> Outcome | None:
        """How the ranks of this node have ended, or what is wrong with one of them; None while all is well."""
        now = time.monotonic()
        if now - self._checked_at < SECONDS_BETWEEN_CHECKS:
            return None
        if now - self._checked_at > OWN_PAUSE_S:  # this launcher was suspended, and perhaps its ranks as well
            self._monitor.resumed_at = now
        self._checked_at = now
        try:
            self.folder.stat()
            return self._monitor.find_problem() or self._find_end()
        except FileNotFoundError:  # removed by systemd's RemoveIPC, for instance
            node = self._launch.node
            text = f"{self.folder}, the folder for heartbeats, has disappeared from node {node}"
            return Outcome("error", text, node=node)

    def _find_end(self) -> Outcome | None:
        """How healthy ranks have ended: as they reported, or as torchrun's exit status tells."""
        status = self._torchrun.poll()  # before the outcomes are read: a rank records its own before torchrun exits
        outcomes = self._monitor.outcomes()
        if len(outcomes) == self._launch.num_procs:
            self._all_reported_at = self._all_reported_at or time.monotonic()
            is_late = time.monotonic() - self._all_reported_at > SECONDS_TO_EXIT
            has_ended = status is not None or is_late or self._are_ranks_gone()
            return find_cause(outcomes) if has_ended else None
        if status is None:
            return None
        text = f"torchrun on node {self._launch.node} exited with status {status}"
        own = Outcome("killed" if status < 0 else "error", text)
        return self._monitor.with_node(find_cause([*outcomes, own]))

    def _are_ranks_gone(self) -> bool:
        """Whether no rank is left. torchrun itself may linger: if the head's exits first, the others complain."""
        try:
            ranks = psutil.Process(self._torchrun.pid).children()
        except psutil.NoSuchProcess:
            return True
        return all(is_dead(rank.pid) for rank in ranks)

    def summarize(self) -> Outcome:
        """What this node knows when its ranks must be ended because of a failure on another node."""
        return self._monitor.summarize()

    def show_stacks(self) -> None:
        """Have each rank write its stacks, once, and copy them to the run directory. The ranks continue."""
        if self._has_shown_stacks:
            return
        self._has_shown_stacks = True
        self._monitor.remember_frozen()
        own_pids = {process.pid for process in self._processes()}
        beats = [beat for beat in read_heartbeats(self.folder) if beat.pid in own_pids]
        for number in (SHOW_STACKS, signal.SIGCONT):  # a suspended process handles a signal only once it is resumed
            for beat in beats:
                send_signal(beat.pid, number)
        wait_until_written([stack_file(self.folder, beat.rank) for beat in beats], SECONDS_FOR_STACKS)
        keeper = threading.Thread(target=self._keep_stacks, daemon=True)  # in a thread: the disk may be what hangs
        keeper.start()
        keeper.join(SECONDS_FOR_STACKS)

    def _keep_stacks(self) -> None:
        folder = self._launch.run_dir / "stacks"
        if self._launch.num_replicas:  # whose ranks have the same numbers
            folder /= to_file_name(self._launch.node)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("rank-*.txt"):
                if path.stat().st_size:
                    shutil.copyfile(path, folder / path.name)
        except OSError:
            return  # a full disk must not keep the launcher from ending the ranks

    def end(self, *, with_stacks: bool) -> Outcome | None:
        """End every process of this attempt. With stacks, each rank first writes its own; returns a stuck rank."""
        stuck = None
        if with_stacks:
            self.show_stacks()
            stuck = self._monitor.find_stuck()
        if self._torchrun.poll() is None:  # first, so that it neither complains nor starts another rank
            self._torchrun.kill()
        self._torchrun.wait()
        give_up_at = time.monotonic() + SECONDS_TO_END
        processes = self._processes()
        while processes and time.monotonic() < give_up_at:
            for process in processes:
                send_signal(process.pid, signal.SIGKILL)
            wait_until_dead([process.pid for process in processes], 1.0)
            processes = self._processes()
        for copier in self._copiers:
            copier.join(timeout=2.0)
        return stuck

    def _processes(self) -> list[psutil.Process]:
        """Every process of this attempt, orphans included: they have the node's folder in their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(NODE_FOLDER) == str(self.folder):
                    found.append(process)
        return found

    def remove_folder(self) -> None:
        """Remove the node's folder, after the ranks have ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()


def build_torchrun_command(launch: RankLaunch, folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend=static",
        f"--rdzv-id={launch.job_id}",
        f"--nnodes={launch.num_nodes}",
        f"--node-rank={launch.node_rank}",
        f"--nproc-per-node={launch.num_procs}",
        f"--master-addr={launch.address}",
        f"--master-port={launch.port}",
        "--max-restarts=0",
        f"--log-dir={folder / 'torchrun'}",  # one of its own would remain when torchrun is killed
        "--signals-to-handle=SIGQUIT",  # requests to stop come through our file: torchrun must not kill a save
        "-m",
        "ptune_dist",
        *launch.command,
    ]


def build_environment(launch: RankLaunch, folder: Path) -> dict[str, str]:
    """Our own environment with what the ranks need. Variables that are set already win over the defaults."""
    num_cores = max(1, len(os.sched_getaffinity(0)) // launch.num_procs)
    defaults = {
        "NCCL_DEBUG": "WARN",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(num_cores),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # of each rank; by default up to 32
    }
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        defaults[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"  # varying lengths fragment fixed segments
    if launch.interface:
        defaults["GLOO_SOCKET_IFNAME"] = launch.interface
    ours = {
        NODE_FOLDER: str(folder),
        NODE_NAME: launch.node,
        LAUNCHER_PID: str(os.getpid()),
        NUM_GPUS: str(launch.num_gpus),
    }
    if launch.num_replicas > 1:
        ours[EXPECTED_NODES] = str(launch.num_replicas)
    env = defaults | os.environ | ours
    env.pop(SECRET, None)  # programs print their environment; those that need it have a file
    return env


def prepare_child() -> None:
    """Runs in torchrun's process before torchrun: it dies with its launcher and ignores requests to stop.

    The ranks inherit the ignored signals until `Watch` handles them, so a request to stop cannot kill a rank while it
    is loading.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the whole base
    signal_on_parent_death(signal.SIGKILL)


def wait_until_written(files: list[Path], seconds: float) -> None:
    """Return once no file is empty and none grows any more, or after `seconds`."""
    give_up_at = time.monotonic() + seconds
    before: list[int] = []
    while time.monotonic() < give_up_at:
        sizes = [file.stat().st_size for file in files]
        if sizes == before and all(sizes):
            return
        before = sizes
        time.sleep(0.1)


def copy_lines(source: BinaryIO, sink: BinaryIO, log: BinaryIO | None) -> None:
    """Copy until the source ends. A sink that fails does not stop the reading, since that would block the ranks."""
    sinks = [sink] if log is None else [sink, log]
    for line in iter(source.readline, b""):
        for out in sinks:
            try:
                out.write(line)
                out.flush()
            except (OSError, ValueError):
                continue
