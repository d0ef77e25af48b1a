"""Runs that tests train on the cluster and disturb: submitted, observed, and compared with an undisturbed run."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ptune_dist.run.checkpoint import load_checkpoint
from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.status import last_step, read_status
from tests.cluster.slurm import Cluster
from tests.commands import run_command
from tests.conftest import TINY, write_config

NUM_STEPS = 60
EVERY = 5
HANG_TIMEOUT_S = 8
SECONDS_TO_END = 30  # for every process of a job that has lost one
# After a hang is found: 4 s for the stacks of all nodes, at most 10 s for the processes to end; usually 3 s in all.
SECONDS_TO_REPORT = 10
PATIENCE_S = 180  # for what has no deadline: torch is imported twice on each node, and the cores may be busy
SABOTEUR = Path(__file__).parent / "saboteur"
# The moments of a save as the saboteur names them: before a file is opened, and after half of it is written.
MOMENTS = [
    "os.mkdir .writing-step",
    "open prompt.safetensors",
    "half of prompt.safetensors",
    "open optimizer.safetensors",
    "half of optimizer.safetensors",
    "open state.json",
    "half of state.json",
    "open .writing-step",  # to sync it
    "os.rename .writing-step",
    "open checkpoints",  # to sync it
    "os.rename step",  # the oldest, which is removed next
    "open .old-step",
    "os.remove prompt.safetensors",
    "os.remove optimizer.safetensors",
    "os.remove state.json",
    "os.rmdir .old-step",
]
AFTER_THE_RENAME = MOMENTS[MOMENTS.index("open checkpoints") :]
ENV = {"PTUNE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_run(folder: Path, **sections: Any) -> Path:
    """The config of a run. `sections` are merged into what all runs share."""
    folder.mkdir(parents=True)
    shared: dict[str, Any] = {
        "train": {"max_steps": NUM_STEPS, "hang_timeout_s": HANG_TIMEOUT_S, "learning_rate": 0.02},
        "checkpoint": {"every": EVERY, "keep": 3},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    for name, section in sections.items():
        shared[name] = {**shared.get(name, {}), **section} if isinstance(section, dict) else section
    return write_config(folder / "config.json", **shared)


class Run:
    """A run, and the last job that was submitted for it."""

    def __init__(self, cluster: Cluster, folder: Path, **sections: Any):
        self.cluster = cluster
        self.dir = folder / "run"
        self.config = write_run(folder, **sections)
        self.job = ""

    # The job

    def submit(self, *overrides: str, nodes: str = "n0,n1", options: list[str] | None = None, **env: object) -> None:
        """sbatch slurm/train.sbatch CONFIG on these nodes, or on any two if `nodes` is ""; `env` are settings."""
        where = [f"--nodes={nodes.count('n')}", f"--nodelist={nodes}"] if nodes else ["--nodes=2"]
        settings = ENV | {name: str(value) for name, value in env.items()}
        self.job = self.cluster.submit(
            "slurm/train.sbatch", str(self.config), *overrides, options=[*where, *(options or [])], env=settings
        )

    def train_without_slurm(self, *, num_nodes: int) -> None:
        """Train the run to its end with two ranks on this machine, as if on `num_nodes` nodes."""
        done = run_command("train", str(self.config), num_ranks=2, num_nodes=num_nodes)
        assert done.returncode == 0, done.stderr[-3000:]

    def wait_for_end(self, state: str, timeout: float = PATIENCE_S) -> None:
        """Wait until the job has ended; it must end in this state of Slurm's."""
        ended = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"]
        found = self.cluster.wait(self.job, ended, timeout)
        assert found == state, self.cluster.describe(self.job, state)

    def wait_for_requeue(self, timeout: float = PATIENCE_S) -> None:
        self.cluster.wait(self.job, ["PENDING"], timeout)

    def wait_for(self, holds: Callable[[], bool], timeout: float, what: str) -> None:
        """Raises TimeoutError with the job's facts and the end of its log."""
        give_up_at = time.monotonic() + timeout
        while not holds():
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"{what} after {timeout} s: {self.status}\n{self.cluster.describe(self.job, what)}")
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return self.cluster.log(self.job)

    @property
    def status(self) -> dict:
        return read_status(self.dir)

    # Progress

    @property
    def num_lines(self) -> int:
        """The lines of metrics.jsonl: the last step, or until a resumed run logs its first one, the last one ever."""
        with contextlib.suppress(FileNotFoundError):
            return (self.dir / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    @property
    def starts(self) -> list[int]:
        """The step from which each start so far has resumed, from the log."""
        found = re.findall(r"base .* per rank, .*; from (?:the start|step (\d+))", self.log)
        return [int(step or 0) for step in found]

    def wait_for_step(self, step: int, *, restarts: int, timeout: float = PATIENCE_S) -> None:
        """Wait until a new step is done, after `restarts` restarts."""

        def is_reached() -> bool:
            status = self.status
            assert status.get("state") != "done" and status.get("restarts", 0) <= restarts, self.describe()
            is_running = status.get("state") == "running" and status["restarts"] == restarts
            return is_running and self.num_lines >= step and len(self.starts) == restarts + 1

        self.wait_for(is_reached, timeout, f"step {step} after {restarts} restarts")

    def describe(self) -> str:
        return f"{self.status}\n{self.log[-4000:]}"

    # Processes

    def processes(self, kind: str, node: str | None = None) -> list[psutil.Process]:
        """`kind`: launcher, torchrun or rank."""
        found = []
        for process in self.cluster.processes(node, self.job):
            with contextlib.suppress(psutil.Error):
                if kind_of(process.cmdline()) == kind:
                    found.append(process)
        return found

    def attempt(self) -> list[psutil.Process]:
        """The current ranks and torchruns."""
        return self.processes("rank") + self.processes("torchrun")

    # Results

    def checkpoint_steps(self) -> list[int]:
        return [load_checkpoint(path).step for path in list_checkpoints(self.dir / "checkpoints")]

    def losses(self, num_steps: int = NUM_STEPS) -> list[float]:
        """The loss of each step, which must have exactly one line."""
        lines = read_metrics(self.dir)
        assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
        return [line["loss"] for line in lines]

    def final_files(self) -> list[bytes]:
        last = self.dir / "checkpoints" / f"step-{last_step(self.dir):08d}"
        files = [
            self.dir / "prompt" / "prompt.safetensors",
            last / "prompt.safetensors",
            last / "optimizer.safetensors",
        ]
        return [file.read_bytes() for file in files]

    def assert_bitwise(self, undisturbed: "Run", num_steps: int = NUM_STEPS) -> None:
        assert self.losses(num_steps) == undisturbed.losses(num_steps)
        assert self.final_files() == undisturbed.final_files()
        summary = json.loads((self.dir / "summary.json").read_text())
        assert summary["steps"] == num_steps and self.status["state"] == "done"


def kind_of(command: list[str]) -> str:
    for kind, module in (("launcher", "ptune_dist.cluster"), ("torchrun", "torch.distributed.run")):
        if module in command:
            return kind
    return "rank" if "ptune_dist" in command and "train" in command else ""


def wait_until_gone(processes: list[psutil.Process], timeout: float = SECONDS_TO_END) -> float:
    """Returns the seconds until every process has ended."""
    began = time.monotonic()
    left = processes
    while left:
        assert time.monotonic() - began < timeout, f"still running after {timeout} s: {left}"
        time.sleep(0.05)
        left = [process for process in left if is_alive(process)]
    return time.monotonic() - began


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def damage(path: Path, *, is_truncated: bool) -> None:
    """Truncate a file to its first half, or flip one bit in it."""
    data = bytearray(path.read_bytes())
    if is_truncated:
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


VALIDATION = {"validation": str(TINY / "data" / "validation.jsonl")}
