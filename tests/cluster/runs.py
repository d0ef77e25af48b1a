"""Runs that tests train on the cluster and hurt: submitted, watched from outside, compared with an undisturbed one."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ptune_dist.run.checkpoint import load_checkpoint
from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.status import last_step, read_status
from tests.cluster.slurm import Cluster
from tests.conftest import TINY, write_config

ALL = os.environ.get("PTUNE_TEST_CLUSTER") == "all"
only_in_full = pytest.mark.skipif(not ALL, reason="minutes of Slurm's own patience: set PTUNE_TEST_CLUSTER=all")

NUM_STEPS, EVERY, HANG_TIMEOUT_S = 120, 5, 8
SECONDS_TO_END = 30  # for every process of a job that has lost one
# From the moment that a hang is found: 4 s for all nodes' stacks, 10 at most for the processes to go; 3 s are usual.
SECONDS_TO_SAY = 10
PATIENCE_S = 180  # with what is no promise: torch is imported twice on each node, and cores may be busy
SABOTEUR = Path(__file__).parent / "saboteur"
# Of a save, as the saboteur names them; a file's are: before it, half of it, all of it.
MOMENTS = [
    "os.mkdir .writing-step",
    "open prompt.safetensors",
    "half of prompt.safetensors",
    "open optimizer.safetensors",
    "half of optimizer.safetensors",
    "open state.json",
    "half of state.json",
    "open .writing-step",  # to flush it
    "os.rename .writing-step",
    "open checkpoints",  # to flush it
    "os.rename step",  # the oldest, to be removed
    "open .old-step",
    "os.remove prompt.safetensors",
    "os.remove optimizer.safetensors",
    "os.remove state.json",
    "os.rmdir .old-step",
]
AFTER_THE_RENAME = MOMENTS[MOMENTS.index("open checkpoints") :]
ENV = {"PTUNE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_run(folder: Path, **sections) -> Path:
    """The config that the runs of these tests share but for `sections`."""
    folder.mkdir()
    shared = {
        "train": {"max_steps": NUM_STEPS, "hang_timeout_s": HANG_TIMEOUT_S, "learning_rate": 0.02},
        "checkpoint": {"every": EVERY, "keep": 3},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    for name, section in sections.items():
        shared[name] = {**shared.get(name, {}), **section} if isinstance(section, dict) else section
    return write_config(folder / "config.json", **shared)


class Run:
    """One run and the last job that was submitted for it."""

    def __init__(self, cluster: Cluster, folder: Path, **sections):
        self.cluster, self.dir = cluster, folder / "run"
        self.config, self.job = write_run(folder, **sections), ""

    # The job

    def submit(self, *overrides: str, nodes: str = "n0,n1", options: list[str] | None = None, **env: object) -> None:
        """sbatch slurm/train.sbatch CONFIG on these nodes, on any two where `nodes` is ""; `env` are settings."""
        where = [f"--nodes={nodes.count('n')}", f"--nodelist={nodes}"] if nodes else ["--nodes=2"]
        options = [*where, *(options or [])]
        env = ENV | {name: str(value) for name, value in env.items()}
        self.job = self.cluster.submit("slurm/train.sbatch", str(self.config), *overrides, options=options, env=env)

    def wait_for_end(self, state: str, timeout: float = PATIENCE_S) -> None:
        """Of the job, in that state of Slurm's."""
        ended = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"]
        found = self.cluster.wait(self.job, ended, timeout)
        assert found == state, self.cluster.told(self.job, state)

    def wait_for_requeue(self, timeout: float = PATIENCE_S) -> None:
        self.cluster.wait(self.job, ["PENDING"], timeout)

    def wait_for(self, holds: Callable[[], bool], timeout: float, what: str) -> None:
        """TimeoutError with the job's facts and the end of its log."""
        give_up = time.monotonic() + timeout
        while not holds():
            if time.monotonic() > give_up:
                raise TimeoutError(f"{what} after {timeout} s: {self.status}\n{self.cluster.told(self.job, what)}")
            time.sleep(0.03)

    @property
    def log(self) -> str:
        return self.cluster.log(self.job)

    @property
    def status(self) -> dict:
        return read_status(self.dir)

    # Where it stands

    @property
    def num_lines(self) -> int:
        """Of metrics.jsonl: the last step done, or before a resumed run's first step the last one done ever."""
        with contextlib.suppress(FileNotFoundError):
            return (self.dir / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    @property
    def starts(self) -> list[int]:
        """The step that each start so far went on from, as the log has them."""
        found = re.findall(r"base .* per rank, .*; from (?:the start|step (\d+))", self.log)
        return [int(step or 0) for step in found]

    def wait_for_step(self, step: int, *, restarts: int, timeout: float = PATIENCE_S) -> None:
        """Until that step, which no start before had done, is done after so many restarts."""

        def is_there() -> bool:
            status = self.status
            assert status.get("state") != "done" and status.get("restarts", 0) <= restarts, self.told()
            is_on = status.get("state") == "running" and status["restarts"] == restarts
            return is_on and self.num_lines >= step and len(self.starts) == restarts + 1

        self.wait_for(is_there, timeout, f"step {step} after {restarts} restarts")

    def told(self) -> str:
        return f"{self.status}\n{self.log[-4000:]}"

    # Its processes

    def processes(self, kind: str, node: str | None = None) -> list[psutil.Process]:
        """`kind`: launcher, torchrun or rank."""
        found = []
        for process in self.cluster.processes(node, self.job):
            with contextlib.suppress(psutil.Error):
                if kind_of(process.cmdline()) == kind:
                    found.append(process)
        return found

    def attempt(self) -> list[psutil.Process]:
        """Ranks and torchruns of this moment."""
        return self.processes("rank") + self.processes("torchrun")

    # What came of it

    def checkpoint_steps(self) -> list[int]:
        return [load_checkpoint(path).step for path in list_checkpoints(self.dir / "checkpoints")]

    def losses(self, num_steps: int = NUM_STEPS) -> list[float]:
        """Each step's, which has one line."""
        lines = read_metrics(self.dir)
        assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
        return [line["loss"] for line in lines]

    def final_files(self) -> list[bytes]:
        last = self.dir / "checkpoints" / f"step-{last_step(self.dir):08d}"
        return [
            (self.dir / "prompt" / "prompt.safetensors").read_bytes(),
            *((last / name).read_bytes() for name in ("prompt.safetensors", "optimizer.safetensors")),
        ]

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
    """Seconds until every process has ended; AssertionError with those that have not."""
    began = time.monotonic()
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() - began < timeout, f"still there after {timeout} s: {left}"
        time.sleep(0.05)
    return time.monotonic() - began


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def damage(path: Path, *, is_truncated: bool) -> None:
    """Half of a file, or one flipped bit in it."""
    data = bytearray(path.read_bytes())
    if is_truncated:
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


VALIDATION = {"validation": str(TINY / "data" / "validation.jsonl")}
