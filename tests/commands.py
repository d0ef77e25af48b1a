"""Many processes for the price of one import: a process that has imported the package forks once for each.

Each is a process of its own that runs the real module, with its own streams, environment, exit status and signals;
what it does not repeat is the 5 s of importing torch. In go lines of JSON, {"module", "argv", "env", "out", "err",
"most_s"}, {"wait": pid} or {"wait_all": pids}; out comes the process id, its exit status, or a list of those.
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

from tests.processes import ROOT, command_line, free_port, process_env

MOST_S = 120  # a command that hangs is killed
SECONDS_FOR_OTHERS = 5.0  # for the ranks beside one that has failed


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


class Forker:
    """The process that forks; it ends with the one that started it. `imports` are modules that it loads first."""

    def __init__(self, *imports: str, env: dict[str, str] | None = None):
        self.extra = env
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.commands", *imports], cwd=ROOT, env=process_env(env), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, module: str, argv: list[str], out: Path, env: dict[str, str], most_s: float = MOST_S) -> Started:
        """A module, or a script by its path, whose streams go to OUT.out and OUT.err."""
        streams = [out.with_name(f"{out.name}.{name}") for name in ("out", "err")]
        names = dict(zip(("out", "err"), map(str, streams), strict=True))
        return Started(self.ask(module=module, argv=argv, env=env, most_s=most_s, **names), *streams)


@functools.cache
def shared_forker() -> Forker:
    return Forker()


class Commands:
    """ptune-dist commands; what they say is kept in a folder."""

    def __init__(self, folder: Path, forker: Forker | None = None):
        self.folder, self.forker, self.number = folder, forker or shared_forker(), 0

    def start(self, *argv: object) -> Started:
        self.number += 1
        out, env = self.folder / str(self.number), process_env(self.forker.extra)
        return self.forker.start("ptune_dist", [str(a) for a in argv], out, env)

    def finish(self, started: Started) -> Finished:
        code = self.forker.ask(wait=started.pid)
        return Finished(code, started.out.read_text(), started.err.read_text())

    def run(self, *argv: object) -> Finished:
        return self.finish(self.start(*argv))


def run_command(*arguments: str, num_ranks: int = 1, **how) -> subprocess.CompletedProcess:
    """Run `python -m ptune_dist ARGUMENTS`, in a process of its own or as so many ranks. `how`: as in `run_module`."""
    return run_module("ptune_dist", *arguments, num_ranks=num_ranks, **how)


def run_commands(commands: list[list[str]]) -> None:
    """Several ptune-dist commands, one after another."""
    for command in commands:
        done = run_command(*command)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def run_module(
    module: str, *arguments: str, num_ranks: int = 1, timeout: float = 300, env: dict[str, str] | None = None,
    fresh: bool = False, num_nodes: int = 1,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run a module or a script (a path ending in .py). fresh, or with variables of its own: by a new Python, with
    torchrun where there are several ranks; else forked, as ranks of so many nodes."""
    argv = [str(argument) for argument in arguments]
    if not (fresh or env):
        with tempfile.TemporaryDirectory() as folder:
            return run_forks(module, argv, Path(folder), num_ranks, num_nodes, timeout)
    command = command_line(module, *argv, num_ranks=num_ranks)
    return subprocess.run(command, cwd=ROOT, env=process_env(env), capture_output=True, text=True, timeout=timeout)


def run_forks(
    module: str, argv: list[str], folder: Path, num_ranks: int, num_nodes: int, timeout: float
) -> subprocess.CompletedProcess:
    """As torchrun starts ranks and ends them: where one fails the others are ended, and the status is 1."""
    forker, port, started, num_local = shared_forker(), str(free_port()), [], num_ranks // num_nodes
    for rank in range(num_ranks):
        place = {
            "RANK": rank, "LOCAL_RANK": rank % num_local, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_local
        }  # fmt: skip
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = process_env({name: str(value) for name, value in place.items()} if num_ranks > 1 else None)
        started.append(forker.start(module, argv, folder / f"rank-{rank}", env, timeout))
    codes = forker.ask(wait_all=[each.pid for each in started])
    code = codes[0] if num_ranks == 1 else int(any(codes))
    out, err = ("".join(getattr(each, name).read_text() for each in started) for name in ("out", "err"))
    return subprocess.CompletedProcess([module, *argv], code, out, err)


def run_forked(module: str, argv: list[str], env: dict[str, str], out: str, err: str, most_s: float) -> None:
    """In the child: as `python -m MODULE` or `python SCRIPT.py` runs it."""
    signal.alarm(int(most_s))
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
    """Their statuses, in order; those beside one that has failed are given a while, then ended."""
    codes: dict[int, int] = {}
    give_up = None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if give_up is None and any(codes.values()):
            give_up = time.monotonic() + SECONDS_FOR_OTHERS
        if give_up is not None and time.monotonic() > give_up:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def serve(imports: list[str]) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401  imported once, here

    import ptune_dist.evaluation.validate  # noqa: F401

    for name in imports:
        __import__(name)
    gc.freeze()  # a child's collections need not look at all that again, nor copy its pages
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
