"""Run the sides of a matrix in turn (A B A B ...), collect their measures, compare them, and write one result JSON.

Sides alternate so that drift (heat, other load) affects both sides of a pair equally; ratios are taken within a pair.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from ptune_dist.bench.finished_runs import FinishedRuns
from ptune_dist.bench.machine import OtherLoad, describe_machine, wait_until_quiet
from ptune_dist.bench.matrix import Case, Matrix, built_in_values, fill_command, load_matrix
from ptune_dist.bench.report import render_tables
from ptune_dist.common.files import replace_file
from ptune_dist.common.interrupts import before_end, forget
from ptune_dist.errors import RunFault, UserError

NUM_LAST_LINES = 3


def run_matrix(path: str, out: str | None, *, resumes: bool = False) -> int:
    """Run a benchmark; returns 0, or 1 if sides that must agree do not. Raises UserError and RunFault.

    result.json, runs.jsonl and logs/ are written to `out`, by default runs/bench/NAME. The result is written after
    every case, and a line after every run. With `resumes`, runs that have a line already are not repeated.
    """
    matrix = load_matrix(path)
    folder = Path(out or f"runs/bench/{matrix.name}").absolute()
    make_folder(folder / "logs")
    done = FinishedRuns(folder / "runs.jsonl", matrix, resumes=resumes)
    content = {
        "name": matrix.name,
        "about": matrix.about,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        "matrix": matrix.model_dump(mode="json"),
        "cases": [],
    }
    console = Console()
    for number, command in enumerate(matrix.prepare):
        values = built_in_values(result=None, work=folder, shared=folder, repeat=0)
        words = fill_command(command, values, f"{path}: prepare")
        run_command(words, folder / "logs" / f"prepare-{number}.log", matrix)
    for case in matrix.cases:
        content["cases"].append(run_case(matrix, case, folder, console, done))
        replace_file(folder / "result.json", (json.dumps(content, indent=1) + "\n").encode())
    for table in render_tables(content):
        console.print(table)
    console.print(f"result: {folder / 'result.json'}", highlight=False, soft_wrap=True)
    agreements = [case["agreement"] for case in content["cases"] if case["agreement"] is not None]
    return 0 if all(agreement["agrees"] for agreement in agreements) else 1


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder}: {error.strerror}") from None


def run_case(matrix: Matrix, case: Case, folder: Path, console: Console, done: FinishedRuns) -> dict[str, Any]:
    """All runs of one case and their comparison."""
    warm_up = matrix.warm_up if case.warm_up is None else case.warm_up
    repeats = case.repeats or matrix.repeats
    sides = matrix.sides_of(case)
    runs = []
    for repeat in range(-warm_up, repeats):
        for side in sides:
            run = done.find(case.name, side, repeat)
            if run is None:
                run = run_side(matrix, case, side, repeat, folder)
                done.add(case.name, run)
            console.print(f"{case.name}  {side}  {describe_run(run, repeat)}", highlight=False, soft_wrap=True)
            if repeat >= 0:
                runs.append(run)
    return {
        "name": case.name,
        "about": case.about,
        "sides": {side: summarize([run["result"] for run in runs if run["side"] == side]) for side in sides},
        "ratios": compare_sides(runs, matrix.baseline) if matrix.baseline in sides else {},
        "agreement": check_agreement(case, runs),
        "runs": runs,
    }


def run_side(matrix: Matrix, case: Case, side: str, repeat: int, folder: Path) -> dict[str, Any]:
    """One run of one side. Raises RunFault if it fails or leaves no result."""
    number = str(repeat) if repeat >= 0 else f"warm-up{-repeat}"
    name = f"{case.name}-{side}-{number}"
    # A new folder every time: a run that is already finished would measure nothing.
    work = folder / "work" / f"{name}-{os.getpid()}"
    make_folder(work)
    result = work / "result.json"
    values = case.values | built_in_values(result=result, work=work, shared=folder, repeat=max(repeat, 0))
    words = fill_command(matrix.sides[side], values, f"case {case.name}: sides.{side}")
    wait_until_quiet(matrix.quiet_wait_s)
    other_load = OtherLoad.start()
    load_before = os.getloadavg()[0]
    began = time.monotonic()
    run_command(words, folder / "logs" / f"{name}.log", matrix)
    wall_s = time.monotonic() - began
    others_share = other_load.share()
    return {
        "side": side,
        "repeat": repeat,
        "command": ["python" if word == sys.executable else word for word in words],
        "wall_s": round(wall_s, 2),
        "load_before": round(load_before, 2),
        "others_cpu_share": None if others_share is None else round(others_share, 3),
        "result": read_result(result, words),
    }


def run_command(words: list[str], log: Path, matrix: Matrix) -> None:
    """Run a command with its output in `log`. Raises UserError for a missing program, RunFault if it fails or hangs."""
    shown = " ".join(words)
    with open(log, "wb") as stream:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | matrix.environment,
            )
        except OSError as error:
            raise UserError(f"cannot run {words[0]}: {error.strerror}: {shown}") from None
        end = functools.partial(end_process, process)
        before_end(end)  # an interrupt must not leave ranks behind either
        try:
            status = process.wait(timeout=matrix.timeout_s)
        except subprocess.TimeoutExpired:
            end()
            raise RunFault(f"not finished after {matrix.timeout_s} s: {shown}: {last_lines(log)}") from None
        finally:
            forget(end)
    if status:
        raise RunFault(f"exit status {status}: {shown}: {last_lines(log)} ({log})")


def end_process(process: subprocess.Popen) -> None:
    """Terminate a process; after 45 s, more than the 30 s that torchrun gives its ranks, kill it."""
    process.terminate()
    try:
        process.wait(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_lines(log: Path) -> str:
    """The last lines of a log in one line, without torchrun's, which follow the reason that its ranks print."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    of_torchrun = [i for i, line in enumerate(lines) if "torch/distributed/elastic" in line]
    if of_torchrun and of_torchrun[0] > 0:
        lines = lines[: of_torchrun[0]]
    return " | ".join(lines[-NUM_LAST_LINES:]) or "it printed nothing"


def read_result(path: Path, words: list[str]) -> dict[str, Any]:
    """The measures of a side. Raises RunFault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFault(f"no result JSON at {path}: {error}: {' '.join(words)}") from None
    if not isinstance(content, dict):
        raise RunFault(f"the result at {path} is not a JSON object: {' '.join(words)}")
    return content


def measures_of(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result."""
    return {k: v for k, v in result.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def summarize(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of every measure that all results have."""
    tables = [measures_of(result) for result in results]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    columns = {name: [table[name] for table in tables] for name in names}
    return {
        name: {"median": statistics.median(column), "min": min(column), "max": max(column)}
        for name, column in columns.items()
    }


def compare_sides(runs: list[dict[str, Any]], baseline: str) -> dict[str, dict[str, dict[str, Any]]]:
    """side -> measure -> {pairs, median}: the side's figure divided by that of the baseline in the same repeat."""
    by_side: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        by_side.setdefault(run["side"], {})[run["repeat"]] = measures_of(run["result"])
    base = by_side.pop(baseline)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for side, tables in by_side.items():
        names = [name for name in base[0] if all(name in tables[i] and base[i].get(name) for i in base)]
        ratios = {name: [tables[i][name] / base[i][name] for i in sorted(base)] for name in names}
        found[side] = {name: {"median": statistics.median(pairs), "pairs": pairs} for name, pairs in ratios.items()}
    return found


def check_agreement(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Whether all runs report the same `agree.measure` within its tolerance; None if the case does not ask."""
    if case.agree is None:
        return None
    name = case.agree.measure
    reported = [run["result"].get(name) for run in runs]
    curves = [value if isinstance(value, list) else [value] for value in reported]
    if any(None in curve or len(curve) != len(curves[0]) for curve in curves):
        difference = None  # a value is missing, or the curves have different lengths
    else:
        difference = max(max(values) - min(values) for values in zip(*curves, strict=True))
    return {
        "measure": name,
        "tolerance": case.agree.tolerance,
        "largest_difference": difference,
        "agrees": difference is not None and difference <= case.agree.tolerance,
    }


def describe_run(run: dict[str, Any], repeat: int) -> str:
    """A line about a finished run."""
    speed = run["result"].get("samples_per_s")
    parts = [
        "warm-up" if repeat < 0 else f"run {repeat + 1}",
        f"{speed:.3f} samples/s" if speed else "",
        f"{run['wall_s']:.0f} s",
        "" if run["others_cpu_share"] is None else f"other work took {run['others_cpu_share']:.0%} of the machine",
    ]
    return "  ".join(part for part in parts if part)
