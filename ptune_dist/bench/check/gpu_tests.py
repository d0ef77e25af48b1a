"""Run the tests that need a GPU and count how they end.

    python -m ptune_dist.bench.check.gpu_tests --result FILE [--tests FOLDER] [PYTEST ARGUMENT ...]

Only files that use the mark `gpu` are collected: others may import packages that a bare machine lacks. The result is
written after every test, so that a run that is cut off still says what has passed.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from ptune_dist.bench.check.folder import write_json

LINE = re.compile(r"^(?P<test>\S+::.+?) (?P<end>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def find_files(folder: Path) -> list[Path]:
    """Test files that use the mark."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def count_ends(ends: dict[str, str]) -> dict[str, object]:
    """The result: a number of tests for each end, and the names of those that did not pass."""
    kinds = list(ends.values())
    failed = sorted(test for test, end in ends.items() if end in ("FAILED", "ERROR"))
    counts = {name: kinds.count(end) for name, end in (("passed", "PASSED"), ("skipped", "SKIPPED"))}
    return counts | {"failed": len(failed), "failed_tests": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--tests", type=Path, default=Path("tests"))
    args, more = parser.parse_known_args()
    files = find_files(args.tests)
    if not files:
        print(f"error: {args.tests}: no test uses the mark gpu", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *map(str, files), *more]
    ends: dict[str, str] = {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None  # it is a pipe
    for line in process.stdout:
        print(line, end="", flush=True)
        found = LINE.match(line)
        if found:
            ends[found["test"]] = found["end"]
            write_json(args.result, count_ends(ends))
    status = process.wait()
    write_json(args.result, count_ends(ends) | {"exit_status": status})
    return status


if __name__ == "__main__":
    sys.exit(main())
