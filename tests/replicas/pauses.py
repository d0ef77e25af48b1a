"""How long training pauses when a node is lost or joins, where nodes train as replicas.

    python -m tests.replicas.pauses --repeats 5 --out docs/benchmarks/node_pauses.json

Three nodes of one rank over the included base; all processes share this machine's cores. A pause is the longest time
between two lines of metrics.jsonl after the event, less the median one before it. A node that is killed closes its
connections; one that is frozen falls silent, as a machine that loses its power or its network does.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from ptune_dist.bench.machine import describe_machine
from tests.cluster.start_times import spread
from tests.processes import process_env
from tests.replicas.nodes import Cluster, Node

NUM_BEFORE = 30  # steps from which the usual time between two lines follows
NUM_AFTER = 40
MAX_STEPS = 100_000


class Clock:
    """When each step of a run was logged, as it is seen from outside."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster

    def watch(self, num_steps: int) -> list[float]:
        """The seconds between the next so many lines."""
        metrics = self._cluster.run / "metrics.jsonl"
        num_lines = metrics.read_bytes().count(b"\n")
        last = num_lines + num_steps
        times = [time.monotonic()]
        while num_lines < last:
            found = metrics.read_bytes().count(b"\n")
            times += [time.monotonic()] * (found - num_lines)
            num_lines = found
            time.sleep(0.002)
        return [after - before for before, after in pairwise(times)]


def measure(folder: Path) -> dict[str, float]:
    """The pauses of one run whose third node is killed and started again, and whose second one is frozen."""
    cluster = Cluster(folder, train={"max_steps": MAX_STEPS})
    nodes = [cluster.start(name) for name in ("n1", "n2", "n3")]
    try:
        return measure_events(cluster, nodes)
    finally:
        for rank in (rank for node in nodes for rank in node.ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)


def measure_events(cluster: Cluster, nodes: list[Node]) -> dict[str, float]:
    cluster.wait_for_step(1)
    cluster.wait_for_view(lambda found: len(found["blocks"]) == 3)
    clock = Clock(cluster)
    usual = statistics.median(clock.watch(NUM_BEFORE))
    found = {"a step": usual}

    nodes[2].kill()
    nodes[2].finish()
    found["killed: pause of the others"] = max(clock.watch(NUM_AFTER)) - usual

    began = time.monotonic()
    again = start_in_new_python(cluster, "n3")
    try:
        cluster.wait_for_view(lambda view: "n3" in view["blocks"])
        found["started again: until it computes"] = time.monotonic() - began
        nodes[1].send(signal.SIGSTOP)
        found["frozen: pause of the others"] = max(clock.watch(NUM_AFTER)) - usual
    finally:
        again.kill()
        again.wait()
    return found


def start_in_new_python(cluster: Cluster, name: str) -> subprocess.Popen[bytes]:
    """As a launcher starts it, with all imports; `Cluster.start` has made them already."""
    command = [sys.executable, "-m", "ptune_dist", "train", str(cluster.config)]
    env = process_env({"PTUNE_NODE_NAME": name})
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    runs = []
    for _ in range(parsed.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(Path(folder) / "nodes"))
        print(json.dumps(runs[-1]), flush=True)
    sides = {name: {"seconds": spread([run[name] for run in runs])} for name in runs[0]}
    about = f"shipped base, 3 nodes of one rank that share the cores of one machine, {parsed.repeats} runs"
    case = {"name": "node_pauses", "about": about, "sides": sides, "ratios": {}, "agreement": None, "runs": []}
    result = {
        "name": "node_pauses",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        "matrix": {"baseline": None},
        "cases": [case],
    }
    parsed.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
