"""launch/run.sh as a scheduler starts it, up to the start of its ranks."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import write_config
from tests.interrupts import is_anyone_in
from tests.launcher.nodes import Nodes, only_line, wait_until
from tests.processes import python_path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yaml")


def test_a_wrong_key_is_reported_once_and_ends_every_node_with_2(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, "train.max_stepz=3")
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: ") and "max_stepz" in nodes.output


@pytest.mark.long
def test_a_mistake_on_one_node_ends_every_node(config: Path, tmp_path: Path):
    nodes = Nodes(tmp_path, config, only_b=["model.no_such_key=1"])
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: node b: ") and "no_such_key" in nodes.output
    nodes = Nodes(tmp_path, config, only_a=["model.no_such_key=1"])
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: ") and "no_such_key" in nodes.output


@pytest.mark.long
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


@pytest.mark.long
def test_a_wrong_command_line_is_reported_in_one_line(config: Path, tmp_path: Path):
    for arguments in ([config, "seed"], ["--max-restarts", "-1", config]):
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_does_not_wait_for_ranks_that_import(config: Path, tmp_path: Path, number: signal.Signals):
    (tmp_path / "slow" / "torch").mkdir(parents=True)
    (tmp_path / "slow" / "torch" / "__init__.py").write_text("import time; open('asked', 'w'); time.sleep(60)\n")
    nodes = Nodes(tmp_path, config, names="a", PYTHONPATH=python_path(tmp_path / "slow"))
    wait_until((tmp_path / "asked").exists, 20)
    began = time.monotonic()
    nodes.launchers[0].send_signal(number)
    assert nodes.wait(20) == [75] and time.monotonic() - began < 10
    assert only_line(nodes).startswith("launcher: stopped: asked to stop before the first step (see ")
    assert (nodes.status["state"], nodes.status["kind"]) == ("stopped", "stopped")
    assert not is_anyone_in(tmp_path)
