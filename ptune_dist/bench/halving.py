"""Run a command with as many rows at a time as fit the memory: half as many after each out-of-memory error.

    python -m ptune_dist.bench.halving --rows 32 [--remember FILE] -- COMMAND ... --micro-batch-size ROWS ...

ROWS in the command is replaced by the number. Each try is a process of its own, since a GPU's memory is not all free
after such an error. With --remember, later calls begin with the number that has worked.
"""

import argparse
import sys
from pathlib import Path

from ptune_dist.bench.check.side import run_logged

PLACEHOLDER = "ROWS"
SIGNS = ("out of memory", "OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED")


def run_fitting(command: list[str], rows: int) -> tuple[int, int]:
    """The exit status, and the number of rows of the last try."""
    while True:
        status, lines = run_logged([word.replace(PLACEHOLDER, str(rows)) for word in command], {})
        if status == 0 or rows == 1 or not any(sign in line for line in lines for sign in SIGNS):
            return status, rows
        print(f"out of memory with {rows} rows: trying {rows // 2}", flush=True)
        rows //= 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True, help="rows at a time in the first try")
    parser.add_argument("--remember", type=Path, help="file with the number of rows that has worked")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    rows = args.rows
    if args.remember and args.remember.exists():
        rows = min(rows, int(args.remember.read_text()))
    status, rows = run_fitting(command, rows)
    if args.remember and status == 0:
        args.remember.write_text(str(rows))
    return status


if __name__ == "__main__":
    sys.exit(main())
