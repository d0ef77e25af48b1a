"""Measure five tasks with default hyper-parameters on a real base, beside written prompts; the table of the tutorial.

    python -m ptune_dist.bench.five_tasks --base DIR --data DIR --out docs/benchmarks/five_tasks.json \
        --document docs/tutorial.md [--minutes 60]

configs/bench/five_tasks.yaml says what is run. Each task is a `train` and an `evaluate --baselines`, with the result
written at once. What --out has already is not run again, and a run that was stopped is resumed, so the same command
continues. --minutes ends before a task that would not fit.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptune_dist.bench.machine import describe_machine
from ptune_dist.bench.methods_plan import Builder, Unit, load_plan, put, write_config
from ptune_dist.bench.quality import fill_block, measurement_parser, render_rows
from ptune_dist.cluster.outcome import STOPPED, Outcome
from ptune_dist.common.files import replace_file
from ptune_dist.errors import UserError
from ptune_dist.run.metrics_log import read_metrics

PLAN = Path("configs/bench/five_tasks.yaml")
WORK = Path("runs/bench/five_tasks")
SHOTS = 4
# keys of `evaluate --baselines` and what stands above their column
COLUMNS = {
    "template": "template alone",
    "hard_prompt": "hard prompt",
    "shots": f"{SHOTS} examples",
    "untrained": "untrained prompt",
    "trained": "trained prompt",
}


@dataclass(frozen=True)
class Measurement:
    """The results so far, by task, and where they are written. work: the folder of unfinished runs."""

    builder: Builder
    out: Path
    work: Path
    tasks: dict[str, Any]

    def unit(self, task: str) -> Unit:
        """The one run of a task: the plan's only method."""
        config = self.builder.config(task)
        put(config, self.builder.keys(task, next(iter(self.builder.plan.methods))))
        return Unit(task, "score", config, {task: ""})

    def run(self, task: str) -> int:
        """Train and evaluate, or continue, and write the result; returns the exit status."""
        unit = self.unit(task)
        folder = self.work / unit.digest
        folder.mkdir(parents=True, exist_ok=True)
        file = write_config(self.builder.place(unit, folder), folder)
        if not (folder / "run/summary.json").exists():
            status = call("train", str(file))
            if status:
                return status
        seconds = read_metrics(folder / "run")[-1]["time_s"]  # of training, without the evaluations
        found = folder / "baselines.json"
        status = call("evaluate", str(folder / "run"), "--baselines", "--shots", str(SHOTS), "--output", str(found))
        if status:
            return status
        rows = json.loads(found.read_text(encoding="utf-8"))["baselines"]
        steps = unit.config["train"]["max_steps"]
        self.tasks[task] = {"config": unit.digest, "train_s": seconds, "steps": steps, "rows": rows}
        content = {"name": "five_tasks", "plan": PLAN.name, "tasks": self.tasks} | describe_machine()
        replace_file(self.out, (json.dumps(content, indent=1) + "\n").encode())
        shutil.rmtree(folder)
        return 0


def call(*arguments: str) -> int:
    """Run a command of ptune-dist; returns its exit status."""
    return subprocess.run([sys.executable, "-m", "ptune_dist", *arguments]).returncode


def measure(measurement: Measurement, minutes: float) -> int:
    """Run what is missing; returns an exit status."""
    began = time.monotonic()
    longest_s = 0.0
    for task in measurement.builder.plan.tasks:
        if measurement.tasks.get(task, {}).get("config") == measurement.unit(task).digest:
            continue
        task_began = time.monotonic()
        if task_began - began + longest_s > 60 * minutes:
            print(f"{minutes:g} minutes are over: the same command continues with {task}")
            return Outcome(STOPPED).exit_status
        print(f"task {task}", flush=True)
        status = measurement.run(task)
        if status:
            return status
        longest_s = max(longest_s, time.monotonic() - task_began)
    return 0


def render_table(measurement: Measurement) -> str:
    """A row for each task that was measured: its metric by each prompt, with 95% intervals."""
    rows = [["", *COLUMNS.values(), "rows", "steps", "minutes"]]
    for task, found in measurement.tasks.items():
        metric = measurement.builder.plan.tasks[task].metric
        cells = [show(found["rows"].get(key), metric) for key in COLUMNS]
        num_rows = found["rows"]["trained"]["num_rows"]
        rows.append([f"{task}: {metric}", *cells, str(num_rows), str(found["steps"]), f"{found['train_s'] / 60:.1f}"])
    return render_rows(rows) if measurement.tasks else "Not measured yet."


def show(row: dict[str, Any] | None, metric: str) -> str:
    """A score and its interval; a dash where a prompt was left out."""
    if row is None:
        return "-"
    value = row["metrics"][metric]
    digits = 1 if value > 1 else 3
    bounds = row["intervals_95"].get(metric)
    return f"{value:.{digits}f}" + (f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else "")


def main(arguments: list[str] | None = None) -> int:
    parser = measurement_parser(__doc__, WORK)
    parser.add_argument("--plan", type=Path, default=PLAN)
    args = parser.parse_args(arguments)
    try:
        builder = Builder(load_plan(args.plan), args.base, args.data)
        tasks = json.loads(args.out.read_text(encoding="utf-8"))["tasks"] if args.out.exists() else {}
        measurement = Measurement(builder, args.out, args.work, tasks)
        status = 0 if args.again else measure(measurement, args.minutes)
        if args.document:
            fill_block(args.document, "five tasks", render_table(measurement))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
