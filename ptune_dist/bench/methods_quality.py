"""Measure what the methods learn on a real base: scores, seconds a step and memory, and the table of docs/methods.md.

    python -m ptune_dist.bench.methods_quality --base DIR --data DIR --out docs/benchmarks/methods_quality.json \
        --document docs/methods.md [--part NAME ...] [--minutes 60]

configs/bench/methods_quality.yaml says what is run, in parts. Every result is written at once. What --out has already
is not run again, and a run that was stopped is resumed, so the same command continues. --minutes ends before a run
that would not fit. Scores are those of evaluations in the training runs; seconds are those of part `time`, to be run
where nothing else runs.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptune_dist.bench.machine import describe_machine
from ptune_dist.bench.methods_plan import NUM_TIMED_STEPS, Builder, Part, Unit, load_plan, write_config
from ptune_dist.bench.methods_table import fill_tables, steps_in_time
from ptune_dist.bench.quality import measurement_parser
from ptune_dist.cluster.outcome import STOPPED, Outcome
from ptune_dist.common.files import replace_file
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.loop import train
from ptune_dist.run.resolve import resolve

PLAN = Path("configs/bench/methods_quality.yaml")
WORK = Path("runs/bench/methods_quality")
EVALUATION = re.compile(r"  step (\d+)  validation  (.*)$")
VALUE = re.compile(r"(\w+) (-?[\d.]+|inf|nan)$")


@dataclass
class Measurement:
    """The results so far, and where they are written. work: the folder of unfinished runs."""

    builder: Builder
    out: Path
    work: Path
    content: dict[str, Any]

    def has(self, unit: Unit) -> bool:
        found = self.content["times" if unit.kind == "time" else "cells"]
        return all(found.get(name, {}).get("config") == unit.digest for name in unit.cells)

    def run(self, unit: Unit) -> int:
        """Run or resume, and write the result; returns the exit status."""
        folder = self.work / unit.digest
        if unit.kind == "time" and folder.exists():  # stopped: its steps of before cannot be timed any more
            shutil.rmtree(folder)
        file = self.write_config(unit, folder)
        status = run_timed(file) if unit.kind == "time" else train(load_config(file, resolve=resolve))
        if status == 0:
            latest = read_content(self.out, self.content)  # another part may be measured at the same time
            self.content |= {key: latest[key] for key in ("cells", "times")}
            self.read(unit, folder)
            self.content |= describe_machine()
            write(self)
            shutil.rmtree(folder)
        return status

    def take_unfinished(self, unit: Unit) -> None:
        """Take over the evaluations of a run that was stopped; it counts as missing until it is finished."""
        run_dir = self.work / unit.digest / "run"
        if unit.kind != "score" or self.has(unit) or not (run_dir / "train.log").exists():
            return
        for name, member in unit.cells.items():
            curve = read_curve(run_dir, member)
            if curve:
                self.content["cells"][name] = {"config": None, "curve": curve}

    def write_config(self, unit: Unit, folder: Path) -> Path:
        """The unit's config with its folders, as a file. What is timed reads as many rows as half of its steps take."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.builder.place(unit, folder)
        if unit.kind == "time":
            num_rows = unit.config["train"]["batch_size"] * NUM_TIMED_STEPS // 2
            rows = Path(config["data"]["train"]).read_text(encoding="utf-8").splitlines(keepends=True)[:num_rows]
            (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
            config["data"]["train"] = str(folder / "rows.jsonl")
        return write_config(config, folder)

    def read(self, unit: Unit, folder: Path) -> None:
        """Take a finished run's results over."""
        own: dict[str, Any] = {"config": unit.digest}
        if unit.kind == "time":
            self.content["times"] |= {name: own | read_times(folder / "result.json") for name in unit.cells}
            return
        summary = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
        bare = own | {"curve": [{"step": 0, **summary["base_without_prompt"]}]}
        for name, member in unit.cells.items():
            self.content["cells"][name] = bare
            if unit.kind == "score":
                self.content["cells"][name] = own | {"curve": read_curve(folder / "run", member)}
        if unit.kind == "score" and summary["base_without_prompt"]:
            self.content["cells"].setdefault(f"{unit.task}/bare/0", bare)


def write(measurement: Measurement) -> None:
    """Replace --out."""
    replace_file(measurement.out, (json.dumps(measurement.content, indent=1) + "\n").encode())


def read_curve(run_dir: Path, member: str) -> list[dict[str, float]]:
    """A prompt's evaluations in the order of their steps, from the run's log; a resumed run may have repeated one."""
    found: dict[int, dict[str, float]] = {}
    for line in (run_dir / "train.log").read_text(encoding="utf-8").splitlines():
        match = EVALUATION.search(line)
        if match and (not member or match[2].endswith(f"  {member}")):
            values = (VALUE.fullmatch(part) for part in match[2].removesuffix(f"  {member}").split("  "))
            found[int(match[1])] = {value[1]: float(value[2]) for value in values if value}
    return [{"step": step, **found[step]} for step in sorted(found)]


def run_timed(config: Path) -> int:
    """Train in a process of its own with a probe, which writes result.json beside the config; returns the exit status.

    Threads that wait do not spin: CPU seconds are those of work.
    """
    result = config.with_name("result.json")
    command = [sys.executable, "-m", "ptune_dist.bench.ours", str(config), "--result", str(result)]
    command += ["--warm-up-steps", str(NUM_TIMED_STEPS // 2)]
    not_of_parent = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in not_of_parent}
    return subprocess.run(command, env=environment | {"OMP_WAIT_POLICY": "PASSIVE"}).returncode


def read_times(result: Path) -> dict[str, float]:
    """Seconds a step of the second epoch, which finds what a cache has kept of the first, and memory."""
    found = json.loads(result.read_text(encoding="utf-8"))
    num_steps = found["steps"] - NUM_TIMED_STEPS // 2
    cpu_s = found["cpu_s_per_1000_tokens"] * found["tokens_timed"] / 1000 / num_steps
    return {"step_s": found["step_s"], "cpu_s": cpu_s, "peak_memory_bytes": found["peak_memory_bytes"]}


def measure(measurement: Measurement, parts: list[str], minutes: float) -> int:
    """Run what is missing of some parts; returns an exit status."""
    began = time.monotonic()
    longest_s: dict[str, float] = {}  # by kind
    for name in parts:
        part = measurement.builder.plan.parts[name]
        for unit in units_of(measurement, part):
            if measurement.has(unit):
                continue
            unit_began = time.monotonic()
            if unit_began - began + longest_s.get(unit.kind, 0) > 60 * minutes:
                print(f"{minutes:g} minutes are over: the same command continues with {', '.join(unit.cells)}")
                return Outcome(STOPPED).exit_status
            print(f"part {name}: {', '.join(unit.cells)}", flush=True)
            status = measurement.run(unit)
            if status:
                measurement.take_unfinished(unit)
                write(measurement)
                return status
            longest_s[unit.kind] = max(longest_s.get(unit.kind, 0), time.monotonic() - unit_began)
    return 0


def units_of(measurement: Measurement, part: Part) -> Iterator[Unit]:
    """The part's runs."""
    builder = measurement.builder
    steps = functools.partial(steps_in_time, measurement.content, builder.plan, methods=part.methods)
    return builder.units(part, steps)


def read_content(out: Path, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier call, if there is one."""
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else otherwise


def main(arguments: list[str] | None = None) -> int:
    parser = measurement_parser(__doc__, WORK)
    parser.add_argument("--part", action="append", help="only this part of the plan; may be repeated")
    parser.add_argument("--plan", type=Path, default=PLAN)
    args = parser.parse_args(arguments)
    try:
        plan = load_plan(args.plan)
        parts = args.part or list(plan.parts)
        for name in parts:
            if name not in plan.parts:
                raise UserError(f"--part: {name} is none of {', '.join(plan.parts)}")
        content = read_content(args.out, {"name": "methods_quality", "plan": args.plan.name, "cells": {}, "times": {}})
        measurement = Measurement(Builder(plan, args.base, args.data), args.out, args.work, content)
        if args.again:
            for name in parts:
                for unit in units_of(measurement, plan.parts[name]):
                    measurement.take_unfinished(unit)
            write(measurement)
        status = 0 if args.again else measure(measurement, parts, args.minutes)
        if args.document:
            fill_tables(args.document, content, measurement.builder.plan)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
