"""What the exchange between replicas takes on slow links, beside one world under ZeRO-3 that gathers every parameter.

    python -m tests.replicas.links --out docs/benchmarks/slow_links.json --document docs/clusters.md

Each node is one rank in a network namespace of its own, far from the others (`tests/cluster/slow_network.py`): 50 ms
one way, 10 Mbit/s of what it sends, and a fifth of a core, however many nodes there are. Every node writes its own run
folder, and they find each other at host:port. Needs root, iproute2, /dev/net/tun and cgroup v1.

`--document` puts the table between the document's slow links marks; with `--again`, that of an earlier --out.

What the exchange costs is `exchange_s` less `slower_nodes_s`, averaged over steps and nodes: the time of all steps
is the sum of the slowest node's blocks, plus this, plus the update. The number of trips is its slope over the delay.
"""

import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptune_dist.bench.quality import Result, document_parser, measure_and_fill, render_rows
from ptune_dist.bench.report import describe_where
from ptune_dist.errors import UserError
from tests.cluster.slow_network import SlowNetwork, find_obstacle, wait_until
from tests.conftest import write_config
from tests.processes import process_env

RATE = "10mbit"
RATE_BYTES_PER_S = 10e6 / 8
DELAY_S = 0.05
SHORTER_DELAYS_S = (0.025, 0.0)  # for the slope
CORES = 0.2  # of a node; 8 of them leave the rest of 2 cores to the relay
NUM_NODES = (1, 2, 4, 8)
WARM_UP_STEPS = 5  # nodes measure their speed
SETTLE_STEPS = 2  # after a change of the delay
MOST_S = 900.0
BATCH_SIZE = 512
NUM_BLOCKS = 16
PROMPTS = {
    "10 vectors": {"num_virtual_tokens": 10},
    # As many bytes as 20 vectors of width 4,096.
    "as 20 of width 4,096": {"method": "prefix_tuning", "num_virtual_tokens": 51},
}
SMALL, LARGE = PROMPTS
ONE_WORLD_ZERO = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_param_persistence_threshold": 0}
Lines = dict[str, list[dict[str, Any]]]  # of metrics.jsonl, by host


class Run:
    """The nodes of one run, started."""

    def __init__(self, folder: Path, network: SlowNetwork, nodes: str, prompt: dict[str, Any]):
        folder.mkdir()
        train = {"max_steps": 1000, "batch_size": BATCH_SIZE, "micro_batch_tokens": 8192, "nodes": nodes}
        if nodes == "replicas":
            train |= {"num_blocks": NUM_BLOCKS, "min_nodes": len(network.hosts), "max_nodes": len(network.hosts)}
        sections = {} if nodes == "replicas" else {"deepspeed": {"zero_optimization": ONE_WORLD_ZERO}}
        self.folder = folder
        self.network = network
        self.is_one_world = nodes == "one_world"
        self._config = write_config(folder / "config.json", train=train, prompt=prompt, **sections)
        self._processes = [self._start(i, host) for i, host in enumerate(network.hosts)]
        if self.is_one_world:
            self._writers = network.hosts[:1]
        else:
            self._writers = network.hosts

    def _start(self, index: int, host: str) -> Any:
        hosts = self.network.hosts
        env = {"PTUNE_NODE_NAME": host, "PTUNE_NODE_ADDRESS": f"{host}:29500", "PTUNE_RENDEZVOUS": f"{hosts[0]}:29400"}
        env |= {"PTUNE_SECRET": "links between namespaces", "GLOO_SOCKET_IFNAME": "eth0"}
        if self.is_one_world:
            env |= {"RANK": str(index), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            env |= {"MASTER_ADDR": hosts[0], "MASTER_PORT": "29600"}
        out = self.folder / (hosts[0] if self.is_one_world else host)
        command = [sys.executable, "-m", "ptune_dist", "train", str(self._config), f"output_dir={out}"]
        return self.network.start(host, command, process_env(env), self.folder / f"{host}.log")

    def lines(self, host: str) -> list[dict[str, Any]]:
        path = self.folder / host / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def all_lines(self) -> Lines:
        return {host: self.lines(host) for host in self._writers}

    def num_steps(self) -> int:
        """That all nodes have logged."""
        return min(len(self.lines(host)) for host in self._writers)

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            for host, process in zip(self.network.hosts, self._processes, strict=True):
                if process.poll() is not None:
                    log = (self.folder / f"{host}.log").read_text()[-2000:]
                    raise RuntimeError(f"{host} has ended with {process.returncode}: {log}")
            return self.num_steps() >= step

        wait_until(is_there, MOST_S, f"step {step}")

    def measure(self, delay_s: float, settle_steps: int, num_steps: int) -> dict[str, Any]:
        """Of the next steps at a delay: which these are, and what the links sent meanwhile."""
        network = self.network
        network.set_delay(delay_s)
        first = self.num_steps() + settle_steps
        self.wait_for_step(first)
        before = [network.bytes_sent(host) for host in network.hosts]
        self.wait_for_step(first + num_steps)
        after = [network.bytes_sent(host) for host in network.hosts]
        sent = [b - a for a, b in zip(before, after, strict=True)]
        return {"delay_s": delay_s, "first": first + 1, "num_steps": num_steps, "bytes_sent": sent}


def run(
    folder: Path, nodes: str, num_nodes: int, prompt: str, plan: Callable[[Run], list[dict[str, Any]]]
) -> dict[str, Any]:
    """A run whose `plan` measures it; what it measured, with the lines of metrics.jsonl."""
    hosts = [f"n{i}" for i in range(num_nodes)]
    with SlowNetwork(hosts, RATE, 0.0) as network:
        started = Run(folder / f"{nodes}-{num_nodes}-{len(PROMPTS[prompt])}", network, nodes, PROMPTS[prompt])
        started.wait_for_step(1)  # imports would take minutes at the quota
        for host in hosts:
            network.set_quota(host, CORES)
        phases = plan(started)
        lines = started.all_lines()
    found = [phase | summarize(phase, lines) for phase in phases]
    losses = [line["loss"] for line in lines[hosts[0]]]
    result = {"nodes": nodes, "num_nodes": num_nodes, "prompt": prompt, "phases": found, "losses": losses}
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}), flush=True)
    return result


def summarize(phase: dict[str, Any], lines: Lines) -> dict[str, float]:
    """Means over the steps of a phase and over nodes."""
    chosen = {
        host: found[phase["first"] - 2 : phase["first"] - 1 + phase["num_steps"]] for host, found in lines.items()
    }
    num_steps = phase["num_steps"]
    rows = [line for found in chosen.values() for line in found[1:]]
    summary = {
        "step_s": statistics.mean((found[-1]["time_s"] - found[0]["time_s"]) / num_steps for found in chosen.values()),
        "sent_bytes": statistics.mean(phase["bytes_sent"]) / num_steps,
    }
    if "exchange_s" in rows[0]:
        of_steps = [
            statistics.mean(line["exchange_s"] - line["slower_nodes_s"] for line in same)
            for same in zip(*(found[1:] for found in chosen.values()), strict=True)
        ]
        summary |= {
            "exchange_s": statistics.mean(of_steps),
            "exchange_s_of_steps": of_steps,
            "slower_nodes_s": statistics.mean(line["slower_nodes_s"] for line in rows),
            "payload_bytes": statistics.mean(line["exchange_bytes"] for line in rows),
        }
    return summary


def measure_all(folder: Path, num_steps: int) -> list[dict[str, Any]]:
    def with_slope(started: Run) -> list[dict[str, Any]]:
        phases = [started.measure(DELAY_S, WARM_UP_STEPS, num_steps)]
        return phases + [started.measure(delay_s, SETTLE_STEPS, max(2, num_steps // 2)) for delay_s in SHORTER_DELAYS_S]

    def without(started: Run) -> list[dict[str, Any]]:
        return [started.measure(DELAY_S, WARM_UP_STEPS, num_steps)]

    runs = [run(folder, "replicas", n, SMALL, with_slope if n > 1 else without) for n in NUM_NODES]
    runs += [run(folder, "replicas", n, LARGE, without) for n in (2, 8)]
    return [*runs, run(folder, "one_world", 2, SMALL, lambda started: [started.measure(DELAY_S, 1, 2)])]


def compare_losses(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs over the small prompt: those of 2 and more replicas with those of one, and one world's."""
    alone, *others = [one["losses"] for one in runs if one["nodes"] == "replicas" and one["prompt"] == SMALL]
    pairs = [(a, b) for losses in others for a, b in zip(alone, losses, strict=False)]
    num_equal = sum(a == b for a, b in pairs)
    world = next(one["losses"] for one in runs if one["nodes"] == "one_world")
    difference = max(abs(a - b) / abs(a) for a, b in zip(alone, world, strict=False))
    return {"compared_losses": len(pairs), "equal_losses": num_equal, "one_world_difference": difference}


def count_trips(one: dict[str, Any]) -> float | None:
    """One-way trips in sequence of a step: by how many delays the exchange is longer."""
    points = [(phase["delay_s"], phase["exchange_s"]) for phase in one["phases"] if "exchange_s" in phase]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def render(content: dict[str, Any]) -> str:
    header = ["", "a step", "exchange", "of the step", "one-way trips", "sent by a node", "waiting for slower nodes"]
    rows = [header, *map(render_row, content["runs"])]
    same = content["agreement"]
    notes = (
        f"{same['equal_losses']} of {same['compared_losses']} losses of 2 to 8 replicas equal those of one to the bit. "
        f"Those of one world differ by {same['one_world_difference']:.0e} at most."
    )
    return f"{describe_where(content)}\n\n{render_rows(rows)}\n\n{notes}"


def render_row(one: dict[str, Any]) -> list[str]:
    phase = one["phases"][0]
    num_nodes = one["num_nodes"]
    name = f"{num_nodes} replica{'s' * (num_nodes > 1)}"
    if one["nodes"] == "one_world":
        name = f"one world of {num_nodes} nodes"
    if one["prompt"] != SMALL:
        name += f", sums of {phase['payload_bytes'] / (num_nodes - 1) / 1e3:.0f} kB"
    sent = f"{phase['sent_bytes'] / 1e3:,.0f} kB"
    row = [name, f"{phase['step_s']:.2f} s"]
    if num_nodes == 1 or "exchange_s" not in phase:
        return [*row, "", "", "", sent, ""]
    trips = count_trips(one)
    row += [f"{1000 * phase['exchange_s']:.0f} ms", f"{phase['exchange_s'] / phase['step_s']:.1%}"]
    return [*row, "" if trips is None else f"{trips:.1f}", sent, f"{1000 * phase['slower_nodes_s']:.0f} ms"]


def main() -> int:
    parser = document_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    def measure(folder: Path) -> Result:
        if obstacle := find_obstacle():
            raise UserError(f"no slow network here: {obstacle}")
        runs = measure_all(folder, args.steps)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return {"name": "slow_links", "date": date, "agreement": compare_losses(runs), "runs": runs}

    return measure_and_fill(args, "slow links", measure, render)


if __name__ == "__main__":
    sys.exit(main())
