"""How many faults do the tests find? Makes faulty versions of the code, one fault each, and runs the tests on each.

    python -m tests.mutation [--areas files,head] [--sample 20] [--seed 0] [--jobs 2] [--out FILE.json]

A mutant is killed when a test fails on it. Survivors are printed with their difference. Needs `pip install cosmic-ray`.
Takes minutes to hours: it runs on request only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.mutation.areas import AREAS, Area
from tests.mutation.mutants import sample_mutants
from tests.processes import ROOT, process_env, python_path

COPIED = ("ptune_dist", "tests", "configs", "launch", "slurm", "docs", "pyproject.toml", "README.md")
TIMEOUT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("--areas", default=",".join(AREAS))
    parser.add_argument("--sample", type=int, default=20, help="mutants of each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: try_area(AREAS[name], parsed.sample, parsed.seed, parsed.jobs, Path(folder))
            for name in parsed.areas.split(",")
        }
    summary = {name: summarize(outcomes) for name, outcomes in results.items()}
    print(json.dumps(summary, indent=1))
    if parsed.out:
        content = {"sample": parsed.sample, "seed": parsed.seed, "areas": summary, "mutants": results}
        parsed.out.write_text(json.dumps(content, indent=1) + "\n")


def summarize(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    num_killed = sum(outcome["is_killed"] for outcome in outcomes)
    return {"mutants": len(outcomes), "killed": num_killed, "share": round(num_killed / max(1, len(outcomes)), 3)}


def try_area(area: Area, count: int, seed: int, num_jobs: int, folder: Path) -> list[dict[str, Any]]:
    """The outcome of each mutant; raises RuntimeError if the tests fail on the code as it is."""
    jobs = build_jobs(area, count, seed)
    first = jobs[0] | {"code": (ROOT / jobs[0]["path"]).read_text(), "name": "unchanged"}
    queue: Queue = Queue()
    queue.put(first)
    (unchanged,) = run_jobs(queue, 1, folder)
    if unchanged["is_killed"]:
        raise RuntimeError(f"the tests {' '.join(area.tests)} fail on the unchanged code")
    for job in jobs:
        queue.put(job | {"timeout_s": 3 * unchanged["seconds"] + 20})
    outcomes = run_jobs(queue, num_jobs, folder)
    differences = {job["name"]: job["difference"] for job in jobs}
    found = [outcome | {"difference": differences[outcome["name"]]} for outcome in outcomes]
    for outcome in found:
        if not outcome["is_killed"]:
            print(f"survived: {outcome['name']}\n{outcome['difference']}\n", flush=True)
    return sorted(found, key=lambda outcome: outcome["name"])


def build_jobs(area: Area, count: int, seed: int) -> list[dict[str, Any]]:
    """The area's mutants, spread over its files by their length."""
    paths = [path for name in area.code for path in list_code(name)]
    sizes = [len((ROOT / path).read_text().splitlines()) for path in paths]
    jobs = []
    for path, size in zip(paths, sizes, strict=True):
        share = max(1, round(count * size / sum(sizes)))
        for mutant in sample_mutants(path, (ROOT / path).read_text(), share, seed):
            jobs.append(vars(mutant) | {"tests": list(area.tests), "timeout_s": TIMEOUT_S})
    return jobs


def list_code(name: str) -> list[str]:
    """The files that a path of an area stands for."""
    if not name.endswith("/"):
        return [name]
    files = sorted((ROOT / name).glob("*.py"))
    return [str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py"]


def run_jobs(queue: Queue, num_jobs: int, folder: Path) -> list[dict[str, Any]]:
    outcomes: list[dict[str, Any]] = []
    threads = [threading.Thread(target=run_worker, args=(queue, outcomes, folder / str(i))) for i in range(num_jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def run_worker(queue: Queue, outcomes: list[dict[str, Any]], copy: Path) -> None:
    """Send jobs to one worker process until none is left."""
    if not copy.exists():
        copy.mkdir(parents=True)
        for name in COPIED:
            kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            kind(ROOT / name, copy / name)
        (copy / ".venv").symlink_to(sys.prefix)
    env = process_env({"PYTHONPATH": python_path(copy), "PYTHONDONTWRITEBYTECODE": "1"})
    command = [sys.executable, "-m", "tests.mutation.worker"]
    with subprocess.Popen(
        command, cwd=copy, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdin and worker.stdout
        while True:
            try:
                job = queue.get_nowait()
            except Empty:
                break
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            outcomes.append(json.loads(worker.stdout.readline()))
            print(f"{'killed' if outcomes[-1]['is_killed'] else 'SURVIVED'} {job['name']}", flush=True)
        worker.stdin.close()


if __name__ == "__main__":
    main()
