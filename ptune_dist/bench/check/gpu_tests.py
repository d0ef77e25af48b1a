"""Run the tests that need a GPU and count how they end.

    python -m ptune_dist.bench.check.gpu_tests --result FILE [--before FILE] [--tests FOLDER] [PYTEST ARGUMENT ...]

Only files that use the mark `gpu` are collected: others may import packages that a bare machine lacks. The result is
written after every test. Given as --before, that of a run that was cut off saves repeating what has passed.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ptune_dist.bench.check.folder import write_json

NOTHING_COLLECTED = 5  # an exit status of pytest
LINE = re.compile(r"^(?P<test>\S+::.+?) (?P<end>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def find_files(folder: Path) -> list[Path]:
    """Test files that use the mark."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def count_ends(ends: dict[str, str]) -> dict[str, Any]:
    """The result: a number of tests for each end, and the names of those that did not pass."""
    kinds = list(ends.values())
    failed = sorted(test for test, end in ends.items() if end in ("FAILED", "ERROR"))
    passed = sorted(test for test, end in ends.items() if end == "PASSED")
    counts = {"passed": len(passed), "skipped": kinds.count("SKIPPED"), "failed": len(failed)}
    return counts | {"failed_tests": failed, "passed_tests": passed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="the result of a run that was cut off")
    parser.add_argument("--tests", type=Path, default=Path("tests"))
    args, more = parser.parse_known_args()
    files = find_files(args.tests)
    if not files:
        print(f"error: {args.tests}: no test uses the mark gpu", file=sys.stderr)
        return 2
    before = json.loads(args.before.read_text(encoding="utf-8")) if args.before else {}
    ends = dict.fromkeys(before.get("passed_tests", []), "PASSED")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    command += ["-p", "ptune_dist.bench.check.print_failures"]
    command += [f"--deselect={test}" for test in ends]
    status = run_pytest([*command, *map(str, files), *more], ends, args.result)
    if status == NOTHING_COLLECTED and ends:
        status = 0  # all had passed before
    write_json(args.result, count_ends(ends) | {"exit_status": status})
    return status


def run_pytest(command: list[str], ends: dict[str, str], result: Path) -> int:
    """Run pytest, and add how each test ends to `ends` and to the result; returns the exit status."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None  # it is a pipe
    for line in process.stdout:
        print(line, end="", flush=True)
        found = LINE.match(line)
        if found:
            ends[found["test"]] = found["end"]
            write_json(result, count_ends(ends))
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
