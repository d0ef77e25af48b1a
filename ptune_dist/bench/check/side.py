"""Run our side of a benchmark as a process and read its log: for parts that ask the log, not only the figures."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptune_dist.bench.arguments import side_parser
from ptune_dist.bench.check.folder import write_json


def run_logged(words: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
    """Exit status and lines of a command. What it prints is passed on while it runs."""
    process = subprocess.Popen(
        words,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None  # it is a pipe
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    return process.wait(), lines


def side_command(num_ranks: int, arguments: list[str]) -> list[str]:
    """Our side of a benchmark on this machine's ranks."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    return [sys.executable, *ranks, "-m", "ptune_dist.bench.ours", *arguments]


def run_side(
    description: str | None, environment: dict[str, str], read_log: Callable[[list[str]], dict[str, Any]]
) -> int:
    """The `main` of a part: run our side with this process's arguments; its result gets what `read_log` finds."""
    parser = side_parser(description)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "result.json"
        command = side_command(args.ranks, [args.config, *args.overrides, "--result", str(own)])
        status, lines = run_logged(command, environment)
        if status:
            return status
        found = json.loads(own.read_text(encoding="utf-8"))
    write_json(Path(args.result), found | read_log(lines))
    return 0
