"""Measure how long commands take before any work: `--help`, `validate` of the quickstart, and what `train` imports.

    python -m ptune_dist.bench.start_up [--before FOLDER] [--repeats 5] --out docs/benchmarks/start_up_cpu.json

FOLDER holds another version of the repository, for comparison; its runs and ours take turns. Each run is a new Python.
Both the time by the clock and the CPU time are measured: only the first depends on what else the machine does.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from ptune_dist.bench.machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]
IMPORT = """
try:
    from ptune_dist.common.imports import without_garbage_collection as importing
except ImportError:  # an older version
    from contextlib import nullcontext as importing
with importing():
    import ptune_dist.run.resolve, ptune_dist.loop
"""
COMMANDS = {
    "--help": ["-m", "ptune_dist", "--help"],
    "validate of the quickstart": ["-m", "ptune_dist", "validate", "configs/quickstart.yaml"],
    "imports of train": ["-c", IMPORT],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    roots = {"now": ROOT}
    if parsed.before:
        roots = {"before": parsed.before.resolve(), "now": ROOT}
    cases = [measure_case(name, arguments, roots, parsed.repeats) for name, arguments in COMMANDS.items()]
    result = {
        "name": "start_up_cpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        "before": commit_of(parsed.before) if parsed.before else None,
        "matrix": {"baseline": "before"},
        "cases": cases,
    }
    parsed.out.write_text(json.dumps(result, indent=1) + "\n")


def commit_of(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure_case(name: str, arguments: list[str], roots: dict[str, Path], repeats: int) -> dict[str, object]:
    """One command in each version; the first run of each, which fills the disk cache, does not count."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in roots}
    for _ in range(repeats + 1):
        for side, root in roots.items():
            times[side].append(run_once(arguments, root))
    sides = {}
    for side, found in times.items():
        seconds, cpu_seconds = zip(*found[1:], strict=True)
        sides[side] = {"seconds": summarize(seconds), "cpu_seconds": summarize(cpu_seconds)}
    ratios = {"now": compare(times["now"][1:], times["before"][1:])} if "before" in times else {}
    about = f"{repeats} new processes" if repeats > 1 else "one new process"
    return {"name": name, "about": about, "sides": sides, "ratios": ratios, "agreement": None, "runs": []}


def compare(now: list[tuple[float, float]], before: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Ratios of the runs that took turns."""
    pairs = list(zip(now, before, strict=True))
    return {
        measure: summarize(tuple(one[i] / other[i] for one, other in pairs))
        for i, measure in enumerate(("seconds", "cpu_seconds"))
    }


def run_once(arguments: list[str], root: Path) -> tuple[float, float]:
    """Seconds by the clock and of CPU time."""
    env = os.environ | {"PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as folder:
        more = [f"output_dir={folder}/run"] if "validate" in arguments else []
        cpu_began = children_seconds()
        began = time.perf_counter()
        command = [sys.executable, *arguments, *more]
        subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)
        return time.perf_counter() - began, children_seconds() - cpu_began


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summarize(values: tuple[float, ...]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
