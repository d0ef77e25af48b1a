"""Many commands for the price of one import: a process that has imported the package forks once for each command.

Each command is a process of its own that calls the real `main`, with its own streams, exit status and signals; what it
does not repeat is the 5 s of importing torch. In go lines of JSON, {"argv", "out", "err"} or {"wait": pid}; out comes
a number for each, the process id or the exit status.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT, process_env

MOST_S = 120  # a command that hangs is killed


@dataclass
class Finished:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The messages said on stderr."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Started:
    pid: int
    out: Path
    err: Path

    def wait_for(self, file: Path, num_lines: int) -> None:
        """Until a file that the command writes has so many lines."""
        until = time.monotonic() + MOST_S
        while not file.exists() or file.read_text().count("\n") < num_lines:
            assert time.monotonic() < until, f"{file} never got {num_lines} lines: {self.err.read_text()}"
            time.sleep(0.01)


class Commands:
    """The process that forks. Use as a context manager."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0

    def __enter__(self) -> "Commands":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.commands"], cwd=ROOT, env=process_env(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=MOST_S)

    def ask(self, **request) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *argv: object) -> Started:
        self.number += 1
        out, err = (self.folder / f"{self.number}.{name}" for name in ("out", "err"))
        return Started(self.ask(argv=[str(a) for a in argv], out=str(out), err=str(err)), out, err)

    def finish(self, started: Started) -> Finished:
        code = self.ask(wait=started.pid)
        return Finished(code, started.out.read_text(), started.err.read_text())

    def run(self, *argv: object) -> Finished:
        return self.finish(self.start(*argv))


def run_forked(argv: list[str], out: str, err: str) -> None:
    """In the child: one command, as `python -m ptune_dist` runs it."""
    import signal

    from ptune_dist.cli import main

    signal.alarm(MOST_S)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 1
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401  imported once, here

    import ptune_dist.train
    import ptune_dist.validate  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                run_forked(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
