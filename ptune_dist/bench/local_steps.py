"""What `train.sync_every` costs in quality: the shipped base, at equal steps, for several periods and workers.

    python -m ptune_dist.bench.local_steps --out docs/benchmarks/local_steps.json --document docs/clusters.md

`--document` fills the block of the document between its marks; with `--again`, from an earlier --out. The task is the
quickstart's. One node computes all workers, since the result does not depend on the number of nodes; what nodes send is
counted by two nodes, which train for as many steps as the longest period has.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ptune_dist.bench.quality import CONFIG, Result, document_parser, measure_and_fill, render_rows
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.loop import train
from ptune_dist.run.metrics_log import read_metrics

MEAN = (1.0, 0.0)  # outer_lr and outer_momentum: prompts move to the workers' mean
OF_THE_PAPER = (0.7, 0.9)
# Steps of a period, workers, outer_lr and outer_momentum.
SETTINGS = (
    (1, 1, MEAN),
    *((period, num_workers, MEAN) for num_workers in (2, 4) for period in (4, 16, 64)),
    *((period, 4, OF_THE_PAPER) for period in (4, 16, 64)),
)
PERIODS = sorted({period for period, *_ in SETTINGS})
BATCH_SIZE = 16
NUMBERS = ("loss", "exact_match")
COMMON = (
    "train.nodes=replicas",
    "evaluate.every=0",
    "evaluate.num_samples=0",
    "checkpoint.every=0",
    "deepspeed=configs/deepspeed/zero0_fp32.json",
)


def name_of(period: int, num_workers: int, outer: tuple[float, float]) -> str:
    return f"{period} steps, {num_workers} workers, {outer[0]:g}, {outer[1]:g}"


def measure(
    folder: Path, period: int, num_workers: int, outer: tuple[float, float], *, num_steps: int, seed: int
) -> dict[str, float]:
    """Train once; returns the numbers of the last prompt on the validation rows."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    own = [
        *COMMON,
        f"output_dir={out}",
        f"seed={seed}",
        f"train.max_steps={num_steps}",
        f"train.batch_size={BATCH_SIZE}",
        f"train.sync_every={period}",
        f"train.num_workers={num_workers}",
        f"train.outer_lr={outer[0]}",
        f"train.outer_momentum={outer[1]}",
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
    """A row for each setting: means over seeds, with the lowest and highest."""
    header = ["steps of a period", "workers", "`outer_lr`, `outer_momentum`", "bytes sent in a step"]
    rows = [[*header, *(name.replace("_", " ") for name in NUMBERS)]]
    for period, num_workers, outer in SETTINGS:
        cells = ["1", "-", "-"] if period == 1 else [str(period), str(num_workers), f"{outer[0]:g}, {outer[1]:g}"]
        sent = f"{content['bytes_per_step'][str(period)]:,.0f}"
        rows.append([*cells, sent, *describe(content["runs"][name_of(period, num_workers, outer)])])
    num_seeds = len(next(iter(content["runs"].values())))
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


def main(arguments: list[str] | None = None) -> int:
    parser = document_parser(__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args(arguments)

    def measure_all(folder: Path) -> Result:
        runs = {
            name_of(*setting): [
                measure(folder, *setting, num_steps=args.steps, seed=seed) for seed in range(args.seeds)
            ]
            for setting in SETTINGS
        }
        sent = {str(period): count_bytes(folder, period) for period in PERIODS}
        return {"name": "local_steps", "steps": args.steps, "runs": runs, "bytes_per_step": sent}

    return measure_and_fill(args, "local steps", measure_all, render)


if __name__ == "__main__":
    sys.exit(main())
