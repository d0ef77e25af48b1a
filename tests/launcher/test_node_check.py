"""An unfit node is named before anything is trained on it."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ptune_dist.cluster.node_check import GIB, RankFacts, judge_links, judge_ranks
from tests.cluster.network import Network
from tests.processes import process_env

HEALTHY = RankFacts(0, "n0", "H100", 80 * GIB, 79 * GIB, True, 0.01)


def make_facts(number: int, **odd: object) -> list[RankFacts]:
    """The facts about `number` ranks, two per node, the last of which is odd."""
    found = [replace(HEALTHY, rank=i, node=f"n{i // 2}") for i in range(number)]
    found[-1] = replace(found[-1], **odd)
    return found


@pytest.mark.parametrize("number", [1, 2, 8])
def test_equal_ranks_are_fit(number: int):
    assert judge_ranks(make_facts(number)) is None
    without_gpus = [replace(fact, memory_bytes=0, free_bytes=0, device="CPU") for fact in make_facts(number)]
    assert judge_ranks(without_gpus) is None


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            {"product_is_right": False},
            "rank 3 on node n1 computes a matrix product wrongly: take the node out of service",
        ),
        ({"device": "A100"}, "rank 3 on node n1 has A100 of 80 GiB, most ranks have H100 of 80 GiB"),
        ({"memory_bytes": 40 * GIB}, "rank 3 on node n1 has H100 of 40 GiB, most ranks have H100 of 80 GiB"),
        (
            {"free_bytes": 30 * GIB},
            "rank 3 on node n1: only 30 of 80 GiB of the GPU are free: another process is using it",
        ),
        ({"product_s": 0.05}, "rank 3 on node n1 takes 5.0 times as long as the others for a matrix product"),
    ],
)
def test_the_odd_rank_and_its_node_are_named(odd: dict, message: str):
    fault = judge_ranks(make_facts(4, **odd))
    assert str(fault).startswith(message) and fault.node == "n1"


def test_a_cpu_that_is_busy_with_another_rank_is_not_a_fault():
    found = [replace(fact, memory_bytes=0, free_bytes=0, device="CPU") for fact in make_facts(4, product_s=1.0)]
    assert judge_ranks(found) is None


def ring(number: int, slow: int | None, factor: float = 0.05) -> dict[tuple[str, str], float]:
    """The links between `number` nodes; those of one node are slow."""
    pairs = [(i, i + 1) for i in range(number - 1)] + ([(number - 1, 0)] if number > 2 else [])
    return {(f"n{a}", f"n{b}"): 10e9 * (factor if slow in (a, b) else 1 + a % 3 / 10) for a, b in pairs}


@pytest.mark.parametrize("number", [3, 4, 5, 9, 32])
def test_a_node_with_slow_links_is_named(number: int):
    assert judge_links(ring(number, None)) is None
    for slow in range(number):
        fault = judge_links(ring(number, slow))
        assert fault.node == f"n{slow}" and str(fault).startswith(f"slow network at node n{slow}: "), fault
        assert "0.5 GB/s, usual is 1" in str(fault)


def test_a_single_slow_link_is_named_with_both_ends():
    links = ring(5, None) | {("n2", "n3"): 1e8}
    assert "n2 and n3 0.1 GB/s" in str(judge_links(links))


def test_a_single_link_has_nothing_to_be_compared_with():
    assert judge_links({}) is None
    assert judge_links(ring(2, 0)) is None


SCRIPT = """
import sys, time
from pathlib import Path
from ptune_dist.distributed.world import init_distributed
from ptune_dist.errors import NodeFault
from ptune_dist.cluster.node_check import check_nodes
world = init_distributed()
for number in range(2):
    began = time.perf_counter()
    try:
        result = f"fit, {len(check_nodes(world))} ranks"
    except NodeFault as fault:
        result = f"unfit {fault.node}: {fault}"
    seconds = time.perf_counter() - began
    Path(f"{sys.argv[1]}.{number}").write_text(f"{seconds:.3f} {result}")
    while number == 0 and not Path(sys.argv[2]).exists():
        time.sleep(0.05)
"""


@pytest.mark.extended
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="needs root and iproute2")
def test_a_slow_network_card_is_found(tmp_path: Path):
    network = Network(["n0", "n1", "n2"])
    network.build()
    try:
        env = process_env(
            {
                "DS_ACCELERATOR": "cpu",
                "WORLD_SIZE": "3",
                "MASTER_ADDR": network.addresses["n0"],
                "MASTER_PORT": "29511",
                "GLOO_SOCKET_IFNAME": "eth0",
            }
        )
        for rank, host in enumerate(network.hosts):
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "PTUNE_NODE_NAME": host}
            command = [sys.executable, "-c", SCRIPT, tmp_path / host, tmp_path / "slowed"]
            network.start(host, command, env | own, tmp_path / f"{host}.log")
        for host in network.hosts:
            seconds, result = read_when_written(tmp_path / f"{host}.0", network, host, tmp_path)
            assert result == "fit, 3 ranks" and seconds < 20
        rate = ["tbf", "rate", "20mbit", "burst", "64kb", "latency", "100ms"]
        subprocess.run(["tc", "-n", network.namespace("n2"), "qdisc", "add", "dev", "eth0", "root", *rate], check=True)
        (tmp_path / "slowed").touch()
        for host in network.hosts:
            seconds, result = read_when_written(tmp_path / f"{host}.1", network, host, tmp_path)
            assert result.startswith("unfit n2: slow network at node n2: ") and seconds < 20, result
    finally:
        network.remove()


def read_when_written(path: Path, network: Network, host: str, folder: Path) -> tuple[float, str]:
    """The seconds that a check took, and its result."""
    give_up_at = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < give_up_at and network.pids(host), (folder / f"{host}.log").read_text()[-2000:]
        time.sleep(0.05)
    seconds, _, result = path.read_text().partition(" ")
    print(path.name, seconds, result)
    return float(seconds), result
