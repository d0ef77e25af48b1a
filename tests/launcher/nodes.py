"""Jobs of launch/run.sh, whose nodes are launchers on one machine."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from ptune_dist.run.status import read_status
from tests.processes import ROOT, free_port, process_env, python_path

RUN = str(ROOT / "launch" / "run.sh")


def build_env(settings: dict[str, object]) -> dict[str, str]:
    """The environment of a launcher. A setting that is None is left out."""
    foreign = ("PTUNE_", "SLURM_", "PET_", "OMPI_", "NNODES", "NODE_RANK", "MASTER_ADDR")
    kept = {name: value for name, value in process_env().items() if not name.startswith(foreign)}
    ours = {"PTUNE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "PYTHONPATH": python_path()}
    env = kept | ours | settings
    return {name: str(value) for name, value in env.items() if value is not None}


class Nodes:
    """A job on nodes a and b with one rank each, or on a alone with two ranks."""

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        names: str = "ab",
        only_a: Sequence[str] = (),
        only_b: Sequence[str] = (),
        **env: object,
    ):
        """`only_a`, `only_b`: arguments on the command line of one node alone."""
        self.run = folder / "run"
        self.outputs: list[Path] = []
        self.launchers: list[subprocess.Popen] = []
        self.folders: set[Path] = set()
        port = free_port()
        number = len(list(folder.glob("*.out")))
        for rank, name in enumerate(names):
            topology = {
                "PTUNE_NUM_NODES": len(names),
                "PTUNE_NODE_RANK": rank,
                "PTUNE_NODE_NAMES": ",".join(names),
                "PTUNE_HEAD_ADDRESS": "127.0.0.1",
                "PTUNE_PORT": port,
                "PTUNE_JOB_ID": f"job-{port}",
                "PTUNE_PROCS": 3 - len(names),
            }
            own = only_a if name == "a" else only_b
            self.outputs.append(folder / f"{number}-{name}.out")
            with open(self.outputs[-1], "w") as output:
                launcher = subprocess.Popen(
                    [RUN, *map(str, arguments), *own],
                    cwd=folder,
                    env=build_env(topology | env),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.launchers.append(launcher)

    def wait(self, seconds: float = 90) -> list[int]:
        """The exit statuses; every launcher is ended."""
        try:
            return [launcher.wait(seconds) for launcher in self.launchers]
        finally:
            for launcher in self.launchers:
                launcher.kill()

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in self.outputs)

    @property
    def status(self) -> dict:
        return read_status(self.run)

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank. The folders of their nodes are remembered."""
        running = [launcher for launcher in self.launchers if launcher.poll() is None]
        children = [psutil.Process(launcher.pid).children(recursive=True) for launcher in running]
        found = [process for own in children for process in own if is_rank(process)]
        self.folders |= {Path(process.environ()["PTUNE_NODE_FOLDER"]) for process in found}
        return {int(process.environ()["RANK"]): process for process in found}

    def have_left_nothing(self) -> bool:
        """Whether the nodes' folders are gone from the memory disk."""
        return bool(self.folders) and not any(folder.exists() for folder in self.folders)

    def wait_for_steps(self, more: int = 3) -> None:
        """Wait until the ranks of the current attempt have logged `more` steps."""
        metrics = self.run / "metrics.jsonl"
        before: int | None = None
        give_up_at = time.monotonic() + 60
        while before is None or metrics.read_bytes().count(b"\n") < before + more:
            assert time.monotonic() < give_up_at and all(each.poll() is None for each in self.launchers), self.output
            if before is None and self.status.get("state") == "running" and metrics.exists():
                before = metrics.read_bytes().count(b"\n")
            time.sleep(0.05)


def is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ() and "train" in process.cmdline()
    except psutil.Error:
        return False


def wait_until(is_true: Callable[[], bool], seconds: float, what: str = "") -> None:
    give_up_at = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < give_up_at, what
        time.sleep(0.05)


def only_line(nodes: Nodes) -> str:
    """The output of all nodes, which must be one line beside those that say that torch is being imported."""
    lines = [line for line in nodes.output.splitlines() if "importing torch" not in line]
    assert len(lines) == 1, nodes.output
    return lines[0]
