"""launch/run.sh on nodes that train as replicas: each has a head, restarts and an end of its own."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.status import read_status
from tests.conftest import write_config
from tests.launcher.nodes import Nodes, wait_until
from tests.processes import python_path

STEPS = 120
PATIENCE_S = 240  # torch is imported on each node, and the cores may be busy


def node_status(nodes: Nodes, name: str) -> dict:
    return read_status(nodes.run / "launchers" / name)


def test_a_mistake_on_one_node_does_not_end_the_other_nor_does_a_common_port(tmp_path: Path):
    """The ranks of the other one hang in their imports, and a request to stop ends them."""
    (tmp_path / "slow" / "torch").mkdir(parents=True)
    (tmp_path / "slow" / "torch" / "__init__.py").write_text("import time; open('asked', 'w'); time.sleep(60)\n")
    config = write_config(tmp_path / "c.yaml", train={"max_steps": 3, "nodes": "replicas"})
    nodes = Nodes(tmp_path, config, only_b=["model.no_such_key=1"], PYTHONPATH=python_path(tmp_path / "slow"))
    a, b = nodes.launchers
    assert b.wait(20) == 2 and "no_such_key" in nodes.outputs[1].read_text()
    wait_until((tmp_path / "asked").exists, 20)
    assert a.poll() is None and nodes.status["state"] == node_status(nodes, "a")["state"] == "starting"
    a.terminate()
    assert nodes.wait(20) == [75, 2]
    assert nodes.status["state"] == node_status(nodes, "a")["state"] == "stopped"
    first = nodes.outputs[0].read_text().splitlines()[0]
    assert first.startswith("launcher: train ") and "on node a, one of the run's replicas" in first


def test_launchers_of_one_name_get_numbers(tmp_path: Path):
    (tmp_path / "slow" / "torch").mkdir(parents=True)
    (tmp_path / "slow" / "torch" / "__init__.py").write_text("import time; time.sleep(60)\n")
    config = write_config(tmp_path / "c.yaml", train={"max_steps": 3, "nodes": "replicas"})
    nodes = Nodes(tmp_path, config, PYTHONPATH=python_path(tmp_path / "slow"), PTUNE_NODE_NAME="vm")
    for name in ("vm", "vm-2"):
        wait_until(lambda name=name: node_status(nodes, name).get("state") == "starting", 20, nodes.output)
    assert "this node is called vm-2: another launcher of the run is vm" in nodes.output
    for launcher in nodes.launchers:
        launcher.terminate()
    assert nodes.wait(20) == [75, 75]


def test_a_secret_that_is_too_short_is_a_mistake(tmp_path: Path):
    config = write_config(tmp_path / "c.yaml", train={"max_steps": 3, "nodes": "replicas"})
    nodes = Nodes(tmp_path, config, names="a", PTUNE_SECRET="short")
    assert nodes.wait(20) == [2] and "PTUNE_SECRET needs at least 16 characters" in nodes.output


@pytest.mark.long
def test_a_node_whose_rank_dies_and_one_that_is_lost_come_back(tmp_path: Path):
    """One rank is killed, and later all processes of the other node. Each waits for the other."""
    train = {"max_steps": STEPS, "nodes": "replicas", "min_nodes": 2, "hang_timeout_s": 120}
    config = write_config(tmp_path / "c.yaml", train=train, checkpoint={"every": 50})
    nodes = Nodes(tmp_path, config)
    wait_for_steps(nodes)
    assert {node_status(nodes, name)["state"] for name in "ab"} == {"running"}
    ranks = {process.environ()["PTUNE_NODE_NAME"]: process for process in ranks_of(nodes)}
    ranks["a"].kill()
    wait_until(lambda: node_status(nodes, "a").get("restarts") == 1, PATIENCE_S, "a restart in place")
    wait_for_steps(nodes)
    assert nodes.status["restarts"] == 0 and "restart 1 of 3 in place" in nodes.outputs[0].read_text()
    b = nodes.launchers.pop()
    for process in [*psutil.Process(b.pid).children(recursive=True), psutil.Process(b.pid)]:
        process.send_signal(signal.SIGKILL)
    again = Nodes(tmp_path, config, names="b", PTUNE_PROCS=1)
    assert nodes.wait(PATIENCE_S) == [0] == again.wait(30), nodes.output + again.output
    assert (nodes.status["state"], nodes.status["restarts"]) == ("done", 0)
    assert {name: node_status(nodes, name)["restarts"] for name in "ab"} == {"a": 1, "b": 1}
    lines = read_metrics(nodes.run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["num_nodes"] for line in lines} <= {1, 2}
    late = Nodes(tmp_path, config, names="c")
    assert late.wait(30) == [0] and "is finished: nothing to do" in late.output


def wait_for_steps(nodes: Nodes) -> None:
    """Wait until both nodes have made more steps."""
    before = len(num_nodes_of_steps(nodes))
    wait_until(lambda: num_nodes_of_steps(nodes)[before:][-3:] == [2, 2, 2], PATIENCE_S, "steps of both nodes")


def num_nodes_of_steps(nodes: Nodes) -> list[int]:
    """The nodes that made each step so far."""
    assert all(each.poll() is None for each in nodes.launchers), nodes.output
    metrics = nodes.run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["num_nodes"] for line in lines if line.endswith("\n")]


def ranks_of(nodes: Nodes) -> list[psutil.Process]:
    found = [child for each in nodes.launchers for child in psutil.Process(each.pid).children(recursive=True)]
    return [process for process in found if "RANK" in process.environ() and "train" in process.cmdline()]
