"""What share of their time machines train, where nodes fail: replicas beside one world that is restarted as a whole.

    python -m ptune_dist.bench.useful_share --results docs/benchmarks --document docs/clusters.md

Arithmetic on measured times. A node fails at a constant rate; a lost node is replaced at once.

One world: each failure of any node stops all of them for T = detection + restart + loading the base + the steps since
the last checkpoint, half of the interval on average. Of the time that includes this, 1 / (1 + N f T) is useful with N
nodes that fail f times per second each.

Replicas: the others pause for P, until they have computed again what the lost node had not delivered. The node that
replaces it is away for A = its start + loading the base. So (1 / (1 + N f P)) * (1 - f A) is useful.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ptune_dist.bench.quality import fill_block, render_rows
from ptune_dist.errors import UserError

FAILURES_PER_GPU_S = 1 / (1000 * 3 * 3600)  # one every 3 hours per 1,000 GPUs
GPUS_PER_NODE = 8
NUM_NODES = (1, 64, 1024)
BASE_GB = {"8B in bfloat16": 16.0, "70B in int8": 70.0}
CHECKPOINT_S = 60.0  # between two checkpoints; saving one takes milliseconds
STEP_S = 5.0  # of a step, which a loss may make the others compute once more


@dataclass(frozen=True)
class Times:
    """Measured seconds."""

    detection: float  # of a rank's death in one world, until all ranks have ended
    restart: float  # from then to the next step, over a tiny base
    silence: float  # the pause of replicas that lose a node which falls silent, with steps that take no time
    start: float  # of a replica until it computes, over a tiny base
    load_per_gb: float  # of a base


def read_times(folder: Path) -> Times:
    """From the results of the benchmarks. Raises UserError where one is missing."""
    start = read_sides(folder / "start_times.json", "start_times")
    pauses = read_sides(folder / "node_pauses.json", "node_pauses")
    loading = read_sides(folder / "base_loading_cpu.json", "same_base")["ours"]
    detection = start["kill -9 of a rank to all ranks ended"]["seconds"]["median"]
    return Times(
        detection=detection,
        restart=start["kill -9 of a rank to the next step"]["seconds"]["median"] - detection,
        silence=pauses["frozen: pause of the others"]["seconds"]["median"],
        start=pauses["started again: until it computes"]["seconds"]["median"],
        load_per_gb=loading["load_s"]["median"] / (loading["base_bytes"]["median"] / 1e9),
    )


def read_sides(path: Path, case: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--results: {path}: {error.strerror}") from None
    return next(found["sides"] for found in content["cases"] if found["name"] == case)


def share_of_one_world(num_nodes: int, times: Times, base_gb: float) -> float:
    lost = times.detection + times.restart + times.load_per_gb * base_gb + CHECKPOINT_S / 2
    return 1 / (1 + num_nodes * GPUS_PER_NODE * FAILURES_PER_GPU_S * lost)


def share_of_replicas(num_nodes: int, times: Times, base_gb: float) -> float:
    """A single node has no others: it is restarted from its checkpoint."""
    if num_nodes == 1:
        return share_of_one_world(1, times, base_gb)
    failures_per_s = GPUS_PER_NODE * FAILURES_PER_GPU_S
    away = times.start + times.load_per_gb * base_gb
    return (1 - failures_per_s * away) / (1 + num_nodes * failures_per_s * (times.silence + STEP_S))


def render(times: Times) -> str:
    rows = [["base", "nodes of 8 GPUs", "failures a day", "one world", "replicas"]]
    for base, gigabytes in BASE_GB.items():
        for num_nodes in NUM_NODES:
            failures = num_nodes * GPUS_PER_NODE * FAILURES_PER_GPU_S * 86400
            shares = (share(num_nodes, times, gigabytes) for share in (share_of_one_world, share_of_replicas))
            rows.append([base, f"{num_nodes:,}", f"{failures:.3g}", *(f"{100 * share:.2f}%" for share in shares)])
    facts = (
        f"Measured: {times.detection:.1f} s to notice a dead rank and end the others, {times.restart:.1f} s from there "
        f"to the next step over a tiny base; {times.silence:.1f} s of pause where a replica falls silent, and "
        f"{times.start:.1f} s until one that is started computes; {times.load_per_gb:.2f} s to load a gigabyte of a "
        f"base from this machine's disk. Assumed: steps of {STEP_S:g} s and a checkpoint every {CHECKPOINT_S:g} s."
    )
    return f"{facts}\n\n{render_rows(rows)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the folder of the benchmarks' results")
    parser.add_argument("--document", type=Path, required=True, help="the page with the table")
    args = parser.parse_args(arguments)
    try:
        fill_block(args.document, "useful share", render(read_times(args.results)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
