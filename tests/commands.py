"""Many processes for the price of one import: a process that has imported the package forks one for each.

Each runs the real module in its own process, with its own streams, environment, exit status and signals. It only skips
the 5 s of importing torch. Requests are lines of JSON: {"module", "argv", "env", "out", "err", "max_s"}, {"wait": pid}
or {"wait_all": pids}. Answers are the process id, its exit status, or a list of those.
"""

import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import ROOT, command_line, free_port, process_env

MAX_S = 120  # a command that hangs is killed
SECONDS_FOR_OTHERS = 5.0  # for the other ranks after one has failed


@dataclass
class Finished:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error messages on stderr."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Started:
    pid: int
    out: Path
    err: Path

    def wait_for(self, file: Path, num_lines: int) -> None:
        """Wait until a file that the command writes has `num_lines` lines."""
        give_up_at = time.monotonic() + MAX_S
        while not file.exists() or file.read_text().count("\n") < num_lines:
            assert time.monotonic() < give_up_at, f"{file} never got {num_lines} lines: {self.err.read_text()}"
            time.sleep(0.01)


class Forker:
    """The process that forks. It ends with the process that started it. `imports` are more modules to preload."""

    def __init__(self, *imports: str, env: dict[str, str] | None = None):
        self.extra = env
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.commands", *imports],
            cwd=ROOT,
            env=process_env(env),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, module: str, argv: list[str], path: Path, env: dict[str, str], max_s: float = MAX_S) -> Started:
        """Start a module, or a script by its path, whose output goes to PATH.out and PATH.err."""
        out = path.with_name(f"{path.name}.out")
        err = path.with_name(f"{path.name}.err")
        return Started(self.ask(module=module, argv=argv, env=env, out=str(out), err=str(err), max_s=max_s), out, err)


@functools.cache
def shared_forker() -> Forker:
    return Forker()


class Commands:
    """ptune-dist commands whose output is kept in a folder."""

    def __init__(self, folder: Path, forker: Forker | None = None):
        self.folder = folder
        self.forker = forker or shared_forker()
        self.number = 0

    def start(self, *argv: object) -> Started:
        self.number += 1
        path = self.folder / str(self.number)
        arguments = [str(argument) for argument in argv]
        return self.forker.start("ptune_dist", arguments, path, process_env(self.forker.extra))

    def finish(self, started: Started) -> Finished:
        code = self.forker.ask(wait=started.pid)
        return Finished(code, started.out.read_text(), started.err.read_text())

    def run(self, *argv: object) -> Finished:
        return self.finish(self.start(*argv))


def run_command(*arguments: str, num_ranks: int = 1, **how: Any) -> subprocess.CompletedProcess:
    """Run `python -m ptune_dist ARGUMENTS` in as many ranks. `how`: as in `run_module`."""
    return run_module("ptune_dist", *arguments, num_ranks=num_ranks, **how)


def run_commands(commands: list[list[str]]) -> None:
    """Run several ptune-dist commands, one after another."""
    for command in commands:
        done = run_command(*command)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def run_module(
    module: str,
    *arguments: str,
    num_ranks: int = 1,
    timeout: float = 300,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    num_nodes: int = 1,
) -> subprocess.CompletedProcess:
    """Run a module or a script (a path ending in .py), forked as ranks of `num_nodes` nodes.

    If `fresh`, or with variables in `env`, it runs in a new Python instead, under torchrun if there are several ranks.
    """
    argv = [str(argument) for argument in arguments]
    if not (fresh or env):
        with tempfile.TemporaryDirectory() as folder:
            return run_forks(module, argv, Path(folder), num_ranks, num_nodes, timeout)
    command = command_line(module, *argv, num_ranks=num_ranks)
    return subprocess.run(command, cwd=ROOT, env=process_env(env), capture_output=True, text=True, timeout=timeout)


def run_forks(
    module: str, argv: list[str], folder: Path, num_ranks: int, num_nodes: int, timeout: float
) -> subprocess.CompletedProcess:
    """Run ranks as torchrun does: if one fails, the others are ended and the status is 1."""
    started = start_ranks(module, argv, folder, num_ranks, num_nodes, timeout)
    codes = wait_for_ranks(started)
    code = codes[0] if num_ranks == 1 else int(any(codes))
    out = "".join(each.out.read_text() for each in started)
    err = "".join(each.err.read_text() for each in started)
    return subprocess.CompletedProcess([module, *argv], code, out, err)


def start_ranks(
    module: str,
    argv: list[str],
    folder: Path,
    num_ranks: int,
    num_nodes: int = 1,
    timeout: float = MAX_S,
    env: dict[str, str] | None = None,
) -> list[Started]:
    """Fork the ranks of one job; their output goes to files in `folder`. `env`: more variables."""
    port = free_port()
    num_local = num_ranks // num_nodes
    started = []
    for rank in range(num_ranks):
        place: dict[str, object] = {}
        if num_ranks > 1:
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank % num_local,
                "WORLD_SIZE": num_ranks,
                "LOCAL_WORLD_SIZE": num_local,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        own = process_env({name: str(value) for name, value in place.items()} | (env or {}))
        started.append(shared_forker().start(module, argv, folder / f"rank-{rank}", own, timeout))
    return started


def wait_for_ranks(started: list[Started]) -> list[int]:
    """Their exit statuses."""
    return shared_forker().ask(wait_all=[each.pid for each in started])


def run_forked(module: str, argv: list[str], env: dict[str, str], out: str, err: str, max_s: float) -> None:
    """In the child: run the module as `python -m MODULE`, or the script as `python SCRIPT.py`."""
    signal.alarm(int(max_s))
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *argv]
    code = 1
    try:
        if module.endswith(".py"):
            sys.path.insert(0, str(Path(module).parent))
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_all(pids: list[int]) -> list[int]:
    """The exit statuses, in order. After one has failed, the others get some time, and are then killed."""
    codes: dict[int, int] = {}
    give_up_at: float | None = None
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if give_up_at is None and any(codes.values()):
            give_up_at = time.monotonic() + SECONDS_FOR_OTHERS
        if give_up_at is not None and time.monotonic() > give_up_at:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def serve(imports: list[str]) -> None:
    gc.disable()  # collections during the imports would find nothing
    import torch.utils.tensorboard  # noqa: F401  # every run imports it
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import ptune_dist.evaluation.validate  # noqa: F401

    get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns once for all runs
    for name in imports:
        __import__(name)
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # DeepSpeed must not compile its all-reduce for CPUs, which takes a minute
    gc.freeze()  # collections in the children would only traverse all of that, and copy its pages
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif "wait_all" in request:
            answer = wait_for_all(request["wait_all"])
        else:
            answer = os.fork()
            if not answer:
                run_forked(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
