"""launch/run.sh as a scheduler starts it, with real ranks."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_command
from tests.conftest import write_config
from tests.launcher.nodes import Nodes, only_line, wait_until
from tests.processes import python_path

SABOTEUR = Path(__file__).parent / "saboteur"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yaml")


@pytest.mark.extended
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
    env = {"PYTHONPATH": python_path(SABOTEUR), "PTUNE_TEST_FAULT": plan}
    nodes = Nodes(tmp_path, "--max-restarts", 1, config, **env)
    faults = {  # an exception: the next test
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
        if number == 0:
            wait_until(lambda message=message: message in nodes.output, 20, message)
            wait_until(lambda: nodes.status["restarts"] == 1, 20)
            assert "restart 1 of 1 in place" in nodes.output
    assert nodes.wait(30) == [1, 1]
    assert nodes.have_left_nothing()
    found = nodes.status
    assert (found["state"], found["kind"], found["node"], found["rank"]) == ("failed", "killed", "b", 1)
    assert found["reason"].startswith(message) and found["reason"].endswith("Fatal Python error: Segmentation fault")
    assert found["restarts"] == 1 and found["step"] > 3
    stacks = {path.name: path.read_text() for path in (nodes.run / "stacks").iterdir()}
    assert set(stacks) == {"rank-00000.txt", "rank-00001.txt"}
    assert "in fail" in stacks["rank-00001.txt"] and "in train" in stacks["rank-00000.txt"]


@pytest.mark.extended
@pytest.mark.long
def test_a_lack_of_gpu_memory_ends_the_job_in_one_line_and_is_not_restarted(tmp_path: Path):
    config = write_config(tmp_path / "c.yaml", train={"max_steps": 100_000})
    plan = tmp_path / "plan"
    plan.write_text("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB")
    nodes = Nodes(tmp_path, config, names="a", PYTHONPATH=python_path(SABOTEUR), PTUNE_TEST_FAULT=plan)
    nodes.wait_for_steps()
    nodes.ranks()[1].send_signal(signal.SIGUSR1)
    assert nodes.wait(30) == [1], nodes.output
    expected = "rank 1 on node a ran out of GPU memory (tried to allocate 2.50 GiB): lower train.micro_batch_tokens"
    assert nodes.output.splitlines()[-1].startswith(f"launcher: fault: {expected}")
    assert "ZeroDivisionError" not in nodes.output  # the saboteur's; rank 0 may report that it has lost a peer
    assert "in place" not in nodes.output
    assert (nodes.status["kind"], nodes.status["rank"], nodes.status["restarts"]) == ("fault", 1, 0)


@pytest.mark.long
def test_ctrl_c_saves_and_a_second_one_ends(tmp_path: Path):
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


@pytest.mark.long
def test_a_killed_launcher_leaves_no_process(tmp_path: Path):
    nodes = Nodes(tmp_path, write_config(tmp_path / "c.yaml", train={"max_steps": 100_000}), names="a", PTUNE_PROCS=1)
    nodes.wait_for_steps()
    ranks = nodes.ranks()
    os.kill(nodes.launchers[0].pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks.values(), timeout=30)
    assert not alive and len(ranks) == 1
    assert nodes.status["step"] >= 3  # they saved before they ended
