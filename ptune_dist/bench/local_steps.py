"""What `train.sync_every` costs in quality: the shipped base, at equal steps, for several periods and workers.

    python -m ptune_dist.bench.local_steps --out docs/benchmarks/local_steps.json --document docs/clusters.md

`--document` fills the block of the document between its marks; with `--again`, from an earlier --out. The task is the
quickstart's. One node computes all workers, since the result does not depend on the number of nodes; what nodes send is
counted by two nodes, which train for as many steps as the longest period has.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ptune_dist.bench.machine import describe_machine
from ptune_dist.bench.probe import write_result
from ptune_dist.bench.quality import CONFIG, fill_block, render_rows
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.loop import train
from ptune_dist.run.metrics_log import read_metrics

PERIODS = (4, 16, 64)
NUM_WORKERS = (2, 4)
# name in the table -> outer_lr and outer_momentum
OUTER = {"mean": (1.0, 0.0), "Nesterov 0.7, 0.9": (0.7, 0.9)}
BATCH_SIZE = 16
NUMBERS = ("loss", "exact_match")
COMMON = (
    "train.nodes=replicas",
    "evaluate.every=0",
    "evaluate.num_samples=0",
    "checkpoint.every=0",
    "deepspeed=configs/deepspeed/zero0_fp32.json",
)


def list_settings() -> dict[str, list[str]]:
    """What is compared, by name: overrides of the config."""
    found = {"every step": ["train.sync_every=1"]}
    for outer, (rate, momentum) in OUTER.items():
        for num_workers in NUM_WORKERS:
            for period in PERIODS:
                found[name_of(period, num_workers, outer)] = [
                    f"train.sync_every={period}",
                    f"train.num_workers={num_workers}",
                    f"train.outer_lr={rate}",
                    f"train.outer_momentum={momentum}",
                ]
    return found


def name_of(period: int, num_workers: int, outer: str) -> str:
    return f"{period} steps, {num_workers} workers, {outer}"


def measure(folder: Path, overrides: list[str], num_steps: int, seed: int) -> dict[str, float]:
    """Train once; returns the numbers of the last prompt on the validation rows."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    own = [
        f"output_dir={out}",
        f"seed={seed}",
        f"train.max_steps={num_steps}",
        f"train.batch_size={BATCH_SIZE}",
        *COMMON,
        *overrides,
    ]
    assert train(load_config(CONFIG, own)) == 0
    summary = json.loads((out / "summary.json").read_text())
    return {name: summary["validation"][name] for name in NUMBERS}


def count_bytes(folder: Path, period: int) -> float:
    """What each of two nodes sends in a step, in the mean. Raises UserError where one of them fails."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    num_steps = max(PERIODS)
    sizes = [f"train.max_steps={num_steps}", "train.batch_size=4", f"train.sync_every={period}", "train.num_workers=2"]
    common = [f"output_dir={out}", *COMMON, *sizes, "train.min_nodes=2", "evaluate.max_examples=4"]
    command = [sys.executable, "-m", "ptune_dist", "train", str(CONFIG), *common]
    nodes = [
        subprocess.Popen(command, env=os.environ | {"PTUNE_NODE_NAME": name}, stdout=subprocess.DEVNULL)
        for name in ("first", "second")
    ]
    if any([node.wait() for node in nodes]):
        raise UserError(f"a node has failed: {' '.join(command)}")
    return sum(line.get("exchange_bytes", 0) for line in read_metrics(out)) / num_steps


def render(content: dict) -> str:
    """A row for each period and number of workers: means over seeds, with the lowest and highest."""
    header = ["steps of a period", "workers", "bytes sent in a step"]
    rows = [[*header, *(f"{outer}: {name.replace('_', ' ')}" for outer in OUTER for name in NUMBERS)]]
    single = describe(content["runs"]["every step"])
    rows.append(["1", "-", describe_bytes(content, 1), *(single * len(OUTER))])
    for num_workers in NUM_WORKERS:
        for period in PERIODS:
            cells = [describe(content["runs"][name_of(period, num_workers, outer)]) for outer in OUTER]
            own = [cell for some in cells for cell in some]
            rows.append([str(period), str(num_workers), describe_bytes(content, period), *own])
    num_seeds = len(content["runs"]["every step"])
    facts = (
        f"The quickstart's task, {content['steps']} steps of {BATCH_SIZE} rows, {num_seeds} seeds: validation loss and "
        "exact match of the last prompt, the mean and, in brackets, the lowest and highest. Bytes are those that each "
        "of two nodes sends."
    )
    return f"{facts}\n\n{render_rows(rows)}"


def describe(runs: list[dict[str, float]]) -> list[str]:
    cells = []
    for name in NUMBERS:
        values = [run[name] for run in runs]
        cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
    return cells


def describe_bytes(content: dict, period: int) -> str:
    return f"{content['bytes_per_step'][str(period)]:,.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--document", type=Path)
    parser.add_argument("--again", action="store_true", help="only fill the document, from an existing --out")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args(arguments)
    try:
        if not args.again:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                runs = {
                    name: [measure(folder, overrides, args.steps, seed) for seed in range(args.seeds)]
                    for name, overrides in list_settings().items()
                }
                sent = {str(period): count_bytes(folder, period) for period in (1, *PERIODS)}
            content = {"name": "local_steps", "steps": args.steps, "runs": runs, "bytes_per_step": sent}
            write_result(str(args.out), content | describe_machine())
        if args.document:
            fill_block(args.document, "local steps", render(json.loads(args.out.read_text())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
