"""The test cluster behaves as the tests of faults assume."""

import itertools
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster

pytestmark = pytest.mark.extended

TASK = """
import os, socket
print(os.environ["SLURM_NODEID"], socket.gethostname(), socket.gethostbyname(socket.gethostname()), flush=True)
"""

# Task 1 sends a line to task 0 every 0.1 s, and task 0 prints it.
TALK = """
import os, socket, time
if os.environ["SLURM_PROCID"] == "0":
    for line in socket.create_server(("n0", 5000)).accept()[0].makefile():
        print("heard", line.strip(), flush=True)
else:
    time.sleep(0.5)
    peer = socket.create_connection(("n0", 5000))
    for i in range(60):
        peer.sendall(f"{i}\\n".encode())
        time.sleep(0.1)
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Writes a batch script for two nodes that runs Python code in a step of `num_tasks`."""

    def write(code: str, num_tasks: int = 2, before: str = "") -> Path:
        (tmp_path / "task.py").write_text(code)
        step = f"srun --ntasks={num_tasks} --kill-on-bad-exit=1 python3 {tmp_path}/task.py"
        lines = ["#!/bin/bash", "#SBATCH --nodes=2 --ntasks-per-node=2 --open-mode=append", before]
        (tmp_path / "job.sh").write_text("\n".join([*lines, step, 'code=$?; echo "srun $code"; exit $code', ""]))
        return tmp_path / "job.sh"

    return write


def test_the_nodes_of_a_job_have_their_own_names_and_addresses(cluster: Cluster, script: Callable[..., Path]):
    job = cluster.submit(script(TASK, num_tasks=4))
    cluster.wait(job, ["COMPLETED"], timeout=15)
    lines = [line.split() for line in cluster.log(job).splitlines()]
    address = cluster.network.addresses
    expected = [["0", "n0", address["n0"]]] * 2 + [["1", "n1", address["n1"]]] * 2
    assert sorted(lines) == [*expected, ["srun", "0"]]


def test_a_cut_link_stalls_a_connection_but_neither_srun_nor_the_controller(
    cluster: Cluster, script: Callable[..., Path]
):
    job = cluster.submit(script(TALK))
    cluster.wait_for_text(job, "heard 5", timeout=15)
    cluster.cut("n0", "n1")
    time.sleep(1)
    before = cluster.log(job)
    time.sleep(2)
    assert cluster.log(job) == before and cluster.state(job) == "RUNNING"
    other = cluster.submit(script("print('fine')", num_tasks=1), options=["--nodes=1", "--nodelist=n1"])
    cluster.wait(other, ["COMPLETED"], timeout=10)  # the controller still reaches n1
    cluster.heal("n0", "n1")
    cluster.wait(job, ["COMPLETED"], timeout=15)
    assert "heard 59" in cluster.log(job) and "srun 0" in cluster.log(job)


def test_a_requeued_job_restarts_in_ten_seconds_and_appends_to_its_log(cluster: Cluster, script: Callable[..., Path]):
    job = cluster.submit(script("import time; time.sleep(60)", before="echo run ${SLURM_RESTART_COUNT-none}"))
    cluster.wait_for_text(job, "run none", timeout=15)
    cluster.requeue(job)
    cluster.wait_for_text(job, "run 1", timeout=12)
    assert cluster.facts(job)["Restarts"] == "1" and cluster.state(job) == "RUNNING"
    assert "run none" in cluster.log(job)


def test_a_killed_stepd_leaves_its_tasks_as_orphans_and_srun_waiting(cluster: Cluster, script: Callable[..., Path]):
    job = cluster.submit(script("import time; print('up', flush=True); time.sleep(60)"))
    cluster.wait_for_text(job, "up\nup", timeout=15)
    (stepd,) = cluster.stepd("n1", job, "0")
    (task,) = cluster.processes("n1", job)
    assert task.ppid() == stepd.pid and not cluster.stepd("n1", job, "batch")
    stepd.kill()
    time.sleep(1)
    assert not cluster.stepd("n1", job, "0") and task.is_running() and task.ppid() != stepd.pid
    assert cluster.state(job) == "RUNNING"


def test_a_cut_separates_two_nodes_and_a_cut_node_is_separated_from_all(cluster: Cluster):
    with cluster.restored():
        cluster.cut("n0", "n1")
        assert connections(cluster) == {"ctl n0", "ctl n1", "ctl n2", "n0 n2", "n1 n2"}
        cluster.cut_node("n2")
        assert connections(cluster) == {"ctl n0", "ctl n1"}
    assert connections(cluster) == {"ctl n0", "ctl n1", "ctl n2", "n0 n1", "n0 n2", "n1 n2"}


def connections(cluster: Cluster) -> set[str]:
    """The pairs of hosts of which the first can connect to the second one's slurmd."""
    pairs = [f"{a} {b}" for a, b in itertools.combinations(cluster.network.hosts, 2)]
    tries = {}
    for pair in pairs:
        here, there = pair.split()
        code = f"import socket; socket.create_connection(('{there}', 6818), 1)"
        command = ["ip", "netns", "exec", cluster.network.namespace(here), "python3", "-c", code]
        tries[pair] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    return {pair for pair, started in tries.items() if started.wait() == 0}
