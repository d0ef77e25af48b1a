"""Tries mutants: workers with the slow imports done, each in a copy of the repository."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.mutation.areas import Area
from tests.mutation.mutants import Mutant, replace_text, sample_mutants
from tests.mutation.survivors import load_survivors
from tests.processes import ROOT, process_env, python_path

COPIED = ("ptune_dist", "tests", "configs", "launch", "slurm", "docs", "pyproject.toml", "README.md")
UNCHANGED_TIMEOUT_S = 300.0


def build_mutants(area: Area, count: int, seed: int) -> list[Mutant]:
    """The area's mutants, spread over its files by their length, and those that it lists."""
    code = {path: (ROOT / path).read_text() for name in area.code for path in list_code(name)}
    sizes = {path: len(text.splitlines()) for path, text in code.items()}
    mutants: list[Mutant] = []
    for path, size in sizes.items():
        share = max(1, round(count * size / sum(sizes.values())))
        mutants += sample_mutants(path, code[path], share, seed)
    return mutants + [replace_text(path, code[path], old, new) for path, old, new in area.given]


def list_code(name: str) -> list[str]:
    """The files that a path of an area stands for."""
    if not name.endswith("/"):
        return [name]
    files = sorted((ROOT / name).glob("*.py"))
    return [str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py"]


def try_area(
    tests: tuple[str, ...], mutants: list[Mutant], before: list[dict[str, Any]], workers: "Workers"
) -> list[dict[str, Any]]:
    """The outcome of each mutant; where `before` has one as killed, that is not tried again.

    Raises RuntimeError where the tests fail on the code as it is.
    """
    known = load_survivors()
    kept = {outcome["name"]: outcome for outcome in before if outcome["outcome"] == "killed"}
    found: dict[str, dict[str, Any]] = {}
    jobs = []
    for mutant in mutants:
        entry = {"path": mutant.path, "name": mutant.name, "difference": mutant.difference}
        listed = known.get((mutant.path, mutant.difference))
        if listed is not None and listed.kind == "equivalent":
            found[mutant.name] = entry | {"outcome": "equivalent"}
        elif mutant.name in kept:
            found[mutant.name] = kept[mutant.name]
        else:
            found[mutant.name] = entry
            jobs.append({"path": mutant.path, "name": mutant.name, "code": mutant.code})
    for outcome in workers.run(jobs, tests) if jobs else []:
        found[outcome["name"]] |= {"outcome": "killed" if outcome["is_killed"] else "survived"}
    return list(found.values())


class Workers:
    """Worker processes, which are started for each list of jobs; their copies of the repository stay."""

    def __init__(self, folder: Path, count: int):
        self._folder = folder
        self._count = count

    def run(self, jobs: list[dict[str, Any]], tests: tuple[str, ...]) -> list[dict[str, Any]]:
        """An outcome for each job. Raises RuntimeError where the tests fail on the code as it is."""
        queue: Queue = Queue()
        for job in jobs:
            queue.put(job)
        outcomes: list[dict[str, Any]] = []
        failures: list[str] = []

        def work(number: int) -> None:
            try:
                self._work(self._folder / str(number), queue, tests, outcomes)
            except RuntimeError as error:
                failures.append(str(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise RuntimeError(failures[0])
        return outcomes

    def _work(self, copy: Path, queue: Queue, tests: tuple[str, ...], outcomes: list[dict[str, Any]]) -> None:
        """Send jobs to one worker process until none is left."""
        copy_repository(copy)
        env = process_env({"PYTHONPATH": python_path(copy), "PYTHONDONTWRITEBYTECODE": "1"})
        command = [sys.executable, "-m", "tests.mutation.worker"]
        with subprocess.Popen(
            command, cwd=copy, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as worker:

            def ask(job: dict[str, Any]) -> dict[str, Any]:
                assert worker.stdin and worker.stdout
                worker.stdin.write(json.dumps(job | {"tests": tests}).encode() + b"\n")
                worker.stdin.flush()
                return json.loads(worker.stdout.readline())

            path = queue.queue[0]["path"] if queue.queue else "ptune_dist/__init__.py"
            unchanged = {"path": path, "name": "unchanged", "code": (copy / path).read_text()}
            for _ in range(2):  # the second time with the imports done
                outcome = ask(unchanged | {"timeout_s": UNCHANGED_TIMEOUT_S})
                if outcome["is_killed"]:
                    raise RuntimeError(f"the tests {' '.join(tests)} fail on the unchanged code")
            timeout_s = 3 * outcome["seconds"] + 15
            print(f"unchanged: {outcome['seconds']} s", flush=True)
            while True:
                try:
                    job = queue.get_nowait()
                except Empty:
                    break
                outcome = ask(job | {"timeout_s": timeout_s})
                outcomes.append(outcome)
                print(
                    f"{'killed' if outcome['is_killed'] else 'SURVIVED'} {job['name']} {outcome['seconds']} s",
                    flush=True,
                )
            assert worker.stdin
            worker.stdin.close()


def copy_repository(copy: Path) -> None:
    if copy.exists():
        return
    copy.mkdir(parents=True)
    for name in COPIED:
        kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        kind(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
