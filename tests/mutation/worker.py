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

PRELOADED = ("torch", "transformers", "deepspeed", "datasets", "pytest", "peft", "sklearn", "sacrebleu", "numpy")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported prints, too
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        file = Path(job["path"])
        original = file.read_text(encoding="utf-8")
        file.write_text(job["code"], encoding="utf-8")
        try:
            outcome = try_tests(job["tests"], job["timeout_s"])
        finally:
            file.write_text(original, encoding="utf-8")
        print(json.dumps({"name": job["name"], **outcome}), file=answers, flush=True)


def try_tests(tests: list[str], timeout_s: float) -> dict[str, object]:
    """Whether the tests fail, and after how many seconds; tests that take too long have failed."""
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        run_tests(tests)
    while time.monotonic() - began < timeout_s:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            failed = os.waitstatus_to_exitcode(status) != 0
            return {"is_killed": failed, "seconds": round(time.monotonic() - began, 1)}
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return {"is_killed": True, "seconds": round(time.monotonic() - began, 1), "took_too_long": True}


def run_tests(tests: list[str]) -> None:
    """In a fork: never returns."""
    import pytest

    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    status = 1
    try:
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
