"""Try mutants one after another in a copy of the repository, the folder that this runs in.

The slow imports are made once; each mutant's tests run in a fork. Reads jobs as JSON lines, writes an outcome for each.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OURS = ("ptune_dist", "tests")
LEARNED = Path("imported.json")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imported modules print, too
    for line in sys.stdin:
        job = json.loads(line)
        file = Path(job["path"])
        original = file.read_text(encoding="utf-8")
        file.write_text(job["code"], encoding="utf-8")
        try:
            outcome = try_tests(job["tests"], job["timeout_s"])
        finally:
            file.write_text(original, encoding="utf-8")
        preload()
        print(json.dumps({"name": job["name"], **outcome}), file=answers, flush=True)


def preload() -> None:
    """Import what the tests have imported, but for our own modules: later forks have it from the start."""
    if not LEARNED.exists():
        return
    for name in json.loads(LEARNED.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    LEARNED.unlink()


def try_tests(tests: list[str], timeout_s: float) -> dict[str, object]:
    """Whether the tests fail, and after how many seconds; tests that take too long have failed."""
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        run_tests(tests)
    found, status = 0, 0
    while not found and time.monotonic() - began < timeout_s:
        time.sleep(0.02)
        found, status = os.waitpid(process, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # the tests that took too long, and what others have left running
    if not found:
        os.waitpid(process, 0)
    seconds = round(time.monotonic() - began, 1)
    return {"is_killed": not found or os.waitstatus_to_exitcode(status) != 0, "seconds": seconds}


def run_tests(tests: list[str]) -> None:
    """In a fork: never returns."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    before = set(sys.modules)
    status = 1
    try:
        import pytest

        from tests import commands

        commands.Forker.__init__ = start_forker
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        if status == 0:
            imported = [name for name in sys.modules if name not in before and name.partition(".")[0] not in OURS]
            LEARNED.write_text(json.dumps(imported))
    finally:
        os._exit(status)


def start_forker(self: Any, *imports: str, env: dict[str, str] | None = None) -> None:
    """In place of `tests.commands.Forker`'s own: the process that forks is a fork itself, so it imports nothing."""
    from tests.commands import serve
    from tests.processes import process_env

    requests = os.pipe()
    answers = os.pipe()
    if os.fork() == 0:
        os.dup2(requests[0], 0)
        os.dup2(answers[1], 1)
        os.close(requests[1])
        os.environ.update(process_env(env))
        sys.stdin = open(0)
        sys.stdout = open(1, "w")
        serve(list(imports))
        os._exit(0)
    self.extra = env
    self.process = SimpleNamespace(stdin=os.fdopen(requests[1], "w"), stdout=os.fdopen(answers[0]))


if __name__ == "__main__":
    main()
