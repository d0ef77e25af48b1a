"""launch/run.sh as a scheduler starts it, with real ranks. The nodes are launchers on one machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.status import read_status
from tests.commands import run_command
from tests.conftest import write_config
from tests.processes import ROOT, free_port, process_env

RUN = str(ROOT / "launch" / "run.sh")
SABOTEUR = Path(__file__).parent / "saboteur"


def build_env(settings: dict[str, object]) -> dict[str, str]:
    """The environment of a launcher. A setting that is None is left out."""
    foreign = ("PTUNE_", "SLURM_", "PET_", "OMPI_", "NNODES", "NODE_RANK", "MASTER_ADDR")
    kept = {name: value for name, value in process_env().items() if not name.startswith(foreign)}
    ours = {"PTUNE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "PYTHONPATH": ""}
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
    """The output of all nodes, which must be one line."""
    lines = nodes.output.splitlines()
    assert len(lines) == 1, nodes.output
    return lines[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yaml")


# Without ranks


def test_a_wrong_key_is_reported_once_and_ends_every_node_with_2(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, "train.max_stepz=3")
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: ") and "max_stepz" in nodes.output


def test_a_mistake_on_one_node_ends_every_node(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, only_b=["model.no_such_key=1"])
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: node b: ") and "no_such_key" in nodes.output
    nodes = Nodes(tmp_path, config, only_a=["model.no_such_key=1"])
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: ") and "no_such_key" in nodes.output


def test_nodes_that_differ_are_refused(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, only_b=["seed=1"])
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: node b differs from the other nodes in its config: ")
    assert (nodes.status["state"], nodes.status["node"]) == ("failed", "b")
    site = tmp_path / "site.sh"  # read by every node first
    site.write_text('[ "$PTUNE_NODE_RANK" = 0 ] || PTUNE_PROCS=2\n')
    nodes = Nodes(tmp_path, config, PTUNE_SITE=site)
    assert nodes.wait(20) == [2, 2]
    expected = "error: node b differs from the other nodes in its number of processes (GPUs): 2, not 1: "
    assert only_line(nodes).startswith(expected)


def test_a_node_that_never_joins_is_named(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, names="a", PTUNE_NUM_NODES=2, PTUNE_NODE_NAMES="a,b", PTUNE_START_TIMEOUT_S=2)
    assert nodes.wait(20) == [1]
    assert only_line(nodes).startswith("launcher: unreachable: node b did not join within 2 s (see ")
    assert nodes.status["node"] == "b"


@pytest.mark.parametrize("head", ["no-such-host.invalid", "127.0.0.1"])
def test_a_head_that_is_not_found_is_named(config: Path, tmp_path: Path, head: str):
    began = time.monotonic()
    alone = {"PTUNE_NUM_NODES": 2, "PTUNE_NODE_RANK": 1, "PTUNE_NODE_NAMES": "a,b", "PTUNE_START_TIMEOUT_S": 2}
    nodes = Nodes(tmp_path, config, names="b", PTUNE_HEAD_ADDRESS=head, **alone)
    assert nodes.wait(30) == [1] and time.monotonic() - began < 15
    expected = {
        "no-such-host.invalid": "launcher: the head node's name 'no-such-host.invalid' does not resolve on node b",
        "127.0.0.1": "launcher: node b cannot reach the head node 127.0.0.1 (127.0.0.1, port ",
    }
    assert only_line(nodes).startswith(expected[head])


def test_a_port_in_use_is_named(config: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        nodes = Nodes(tmp_path, config, names="a", PTUNE_PORT=port)
        assert nodes.wait(20) == [2]
    expected = f"error: port {port} of the head node: Address already in use: set PTUNE_PORT to a free port"
    assert only_line(nodes) == expected


def test_a_wrong_command_line_is_reported_in_one_line(config: Path, tmp_path: Path):
    for arguments in ([], [config, "seed"], [config, "--no-such-flag"], ["--max-restarts", "-1", config]):
        nodes = Nodes(tmp_path, *arguments, names="a")
        assert nodes.wait(20) == [2], nodes.output
        only_line(nodes)


def test_a_request_to_stop_while_waiting_for_nodes_ends_with_75(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, names="a", PTUNE_NUM_NODES=2, PTUNE_NODE_NAMES="a,b")
    wait_until(lambda: nodes.status.get("state") == "starting", 10)
    nodes.launchers[0].terminate()
    assert nodes.wait(10) == [75]
    assert nodes.status["state"] == "stopped"


def test_a_request_to_stop_while_counting_gpus_ends_with_75(config: Path, tmp_path: Path):
    slow = tmp_path / "nvidia-smi"
    slow.write_text("#!/bin/sh\ntouch asked\nsleep 2\n")
    slow.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PTUNE_PROCS": "", "CUDA_VISIBLE_DEVICES": None}
    nodes = Nodes(tmp_path, config, names="a", **env)
    wait_until((tmp_path / "asked").exists, 10)
    nodes.launchers[0].terminate()
    assert nodes.wait(10) == [75]
    assert nodes.status["state"] == "stopped"


# With ranks


@pytest.mark.long
def test_two_nodes_learn_the_same_as_one_process_and_a_finished_run_is_not_restarted(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config)
    assert nodes.wait() == [0, 0], nodes.output
    assert nodes.output.count("finished: ") == 1
    assert (nodes.status["state"], nodes.status["restarts"]) == ("done", 0)
    assert {path.name for path in (nodes.run / "logs").iterdir()} == {"a.log", "b.log"}
    assert "finished: " in (nodes.run / "logs" / "a.log").read_text()
    files = {path: path.stat().st_mtime_ns for path in nodes.run.rglob("*")}
    again = Nodes(tmp_path, config)
    assert again.wait(20) == [0, 0] and "is finished: nothing to do" in only_line(again)
    assert files == {path: path.stat().st_mtime_ns for path in nodes.run.rglob("*")}
    alone = run_command("train", str(config), f"output_dir={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    assert read_losses(nodes.run) == pytest.approx(read_losses(tmp_path / "alone"), rel=1e-5)


def read_losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.mark.long
def test_a_mistake_that_only_ranks_find_is_reported_once_and_a_check_prints_the_ranks(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, "data.train=/no/such/file.jsonl")
    assert nodes.wait() == [2, 2]
    assert only_line(nodes).startswith("error: ") and "/no/such/file.jsonl" in nodes.output
    assert (nodes.status["state"], nodes.status["kind"]) == ("failed", "mistake")
    before = (nodes.run / "status.json").read_bytes()
    check = Nodes(tmp_path, config, "--check", names="a", PTUNE_PROCS=1)
    assert check.wait() == [0]
    assert "checked: 1 ranks, all fit" in check.output and "error" not in check.output
    assert (nodes.run / "status.json").read_bytes() == before


@pytest.mark.long
def test_each_fault_of_a_rank_is_named_and_the_ranks_are_restarted_up_to_the_limit(tmp_path: Path):
    config = write_config(
        tmp_path / "c.yaml", train={"max_steps": 100_000, "hang_timeout_s": 8}, checkpoint={"every": 1}
    )
    plan = tmp_path / "plan"
    env = {"PYTHONPATH": SABOTEUR, "PTUNE_TEST_FAULT": plan}
    nodes = Nodes(tmp_path, "--max-restarts", 2, config, **env)
    faults = {
        "by hand": "ZeroDivisionError: by hand",
        "hang": "in fail (sitecustomize.py, line",
        "crash": "rank 1 on node b was killed after step",  # SIGKILL is sent in tests/cluster
    }
    for number, (fault, message) in enumerate(faults.items()):
        nodes.wait_for_steps()
        assert nodes.status["restarts"] == number
        plan.write_text(fault)
        began = time.monotonic()
        ranks = nodes.ranks()
        assert sorted(ranks) == [0, 1]
        ranks[1].send_signal(signal.SIGUSR1)
        psutil.wait_procs(ranks.values(), timeout=30)
        assert not any(rank.is_running() for rank in ranks.values())
        assert time.monotonic() - began < (20 if fault == "hang" else 12)
        if number < 2:
            wait_until(lambda message=message: message in nodes.output, 20, message)
            wait_until(lambda number=number: nodes.status["restarts"] == number + 1, 20)
            assert f"restart {number + 1} of 2 in place" in nodes.output
    assert nodes.wait(30) == [1, 1]
    assert nodes.have_left_nothing()
    found = nodes.status
    assert (found["state"], found["kind"], found["node"], found["rank"]) == ("failed", "killed", "b", 1)
    assert found["reason"].startswith(message) and found["reason"].endswith("Fatal Python error: Segmentation fault")
    assert found["restarts"] == 2 and found["step"] > 6
    stacks = {path.name: path.read_text() for path in (nodes.run / "stacks").iterdir()}
    assert set(stacks) == {"rank-00000.txt", "rank-00001.txt"}
    assert "in fail" in stacks["rank-00001.txt"] and "in train" in stacks["rank-00000.txt"]


@pytest.mark.long
def test_ctrl_c_saves_a_second_one_ends_and_a_killed_launcher_leaves_no_process(tmp_path: Path):
    config = write_config(tmp_path / "c.yaml", train={"max_steps": 100_000})
    nodes = Nodes(tmp_path, config)
    nodes.wait_for_steps()
    ranks = nodes.ranks()
    assert sorted(ranks) == [0, 1]
    ranks[1].parent().suspend()  # torchrun: it would complain when the head's torchrun exits first
    nodes.launchers[1].send_signal(signal.SIGINT)  # on one node is enough
    assert nodes.wait(14) == [75, 75], nodes.output  # if torchrun were waited for, at least 15 s
    saved = nodes.status
    assert saved["state"] == "stopped" and saved["step"] >= 3
    assert "Traceback" not in nodes.output
    assert nodes.have_left_nothing()

    nodes = Nodes(tmp_path, config, names="a", PTUNE_PROCS=1)
    nodes.wait_for_steps()
    assert nodes.status["step"] == saved["step"]
    for rank in nodes.ranks().values():
        rank.suspend()  # so that they cannot save
    nodes.launchers[0].send_signal(signal.SIGINT)
    time.sleep(3.5)
    assert nodes.launchers[0].poll() is None
    nodes.launchers[0].send_signal(signal.SIGINT)
    assert nodes.wait(10) == [1]
    assert nodes.status["state"] == "failed" and nodes.status["reason"] == "interrupted"
    assert nodes.have_left_nothing()

    nodes = Nodes(tmp_path, config, names="a", PTUNE_PROCS=1)  # run/test_safety.py does the same with two ranks
    nodes.wait_for_steps()
    ranks = nodes.ranks()
    os.kill(nodes.launchers[0].pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks.values(), timeout=30)
    assert not alive and len(ranks) == 1
    assert nodes.status["step"] > saved["step"]  # they saved before they ended
