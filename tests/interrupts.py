"""Interrupt commands at random moments. `python -m tests.interrupts NUM_TRIES SEED [LONGEST_S]` prints what was wrong.

A moment is an amount of CPU time of the process, which does not depend on how busy the machine is.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.launcher.nodes import RUN as RUN_SH
from tests.launcher.nodes import build_env
from tests.processes import ROOT, command_line, process_env

MOST_LINES = 2  # what is being done, and how it ended
MAX_S = 120
SECONDS_TO_VANISH = 5.0
CPU_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CONFIG = "configs/quickstart.yaml"
LONG = ["train.max_steps=100000", "evaluate.every=0", "checkpoint.every=50", "checkpoint.keep=2"]
SHORT = ["train.max_steps=2", "evaluate.every=0"]
INPUTS = "configs/tiny/data/validation.jsonl"
WITHOUT_RUN = ("train", "train", "validate", "env", "launch/run.sh")
WITH_RUN = (*WITHOUT_RUN, "evaluate", "generate", "export")


@dataclass(frozen=True)
class Try:
    """One command and the moment of its signal, CPU seconds after the first line of our code could run."""

    command: str
    number: signal.Signals
    after_s: float

    @property
    def is_launcher(self) -> bool:
        return self.command == "launch/run.sh"


def choose_tries(count: int, seed: int, longest_s: float, commands: tuple[str, ...]) -> list[Try]:
    """Commands, signals and moments."""
    chosen = random.Random(seed)
    numbers = (signal.SIGINT, signal.SIGTERM)
    return [Try(chosen.choice(commands), chosen.choice(numbers), chosen.uniform(0, longest_s)) for _ in range(count)]


def build_command(one: Try, folder: Path, trained: Path) -> list[str]:
    """The command line of a try that writes into `folder`; `trained` is a run."""
    run_dir = f"output_dir={folder / 'run'}"
    if one.is_launcher:
        return [RUN_SH, CONFIG, *LONG, run_dir]
    arguments = {
        "train": [CONFIG, *LONG, run_dir],
        "validate": [CONFIG, run_dir],
        "env": [],
        "evaluate": [str(trained)],
        "generate": [str(trained), "--input-file", INPUTS, "--output", str(folder / "answers.jsonl")],
        "export": [str(trained), "--to", "peft", "--out", str(folder / "peft")],
    }
    return command_line("ptune_dist", one.command, *arguments[one.command])


def find_fault(one: Try, trained: Path) -> str:
    """What was wrong with how the command ended; empty where nothing was."""
    with tempfile.TemporaryDirectory(prefix="ptune-interrupt-") as name:
        folder = Path(name)
        process = subprocess.Popen(
            build_command(one, folder, trained),
            cwd=ROOT,
            env=build_env({"PTUNE_PROCS": 2}) if one.is_launcher else process_env(),
            preexec_fn=accept_interrupts,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_handlers(process)
        wait_for_moment(process, one)
        process.send_signal(one.number)
        try:
            _, errors = process.communicate(timeout=MAX_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return describe(one, [f"did not end within {MAX_S} s"])
        return describe(one, find_faults_of(one, process.returncode, errors, folder))


def accept_interrupts() -> None:
    """A shell starts its background jobs, such as a test run, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_handlers(process: subprocess.Popen) -> None:
    """Wait until the process handles TERM: before, it is Python that starts, not our code."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)


def wait_for_moment(process: subprocess.Popen, one: Try) -> None:
    """By the clock for the launcher, which mostly waits."""
    if one.is_launcher:
        time.sleep(one.after_s)
        return
    first = cpu_seconds(process.pid)
    while process.poll() is None and cpu_seconds(process.pid) - first < one.after_s:
        time.sleep(0.002)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CPU_TICKS_PER_S


def find_faults_of(one: Try, status: int, errors: str, folder: Path) -> list[str]:
    """Check the exit status, the lines on stderr, that no file is half written, and that no process is left."""
    allowed = {0, 75, 130} if one.number == signal.SIGINT else {0, 75, 143, -signal.SIGTERM}
    lines = [line for line in errors.splitlines() if not line.endswith(" so far")]  # progress, on a busy machine
    wrong = []
    if status not in allowed:
        wrong.append(f"status {status}: {errors[-1500:]}")
    is_long = len(lines) > MOST_LINES and not one.is_launcher
    if is_long or "Traceback" in errors or "Error" in errors:
        wrong.append(f"{len(lines)} lines: {errors[-1500:]}")
    wrong += [f"left {path}" for path in folder.rglob("*.tmp*")]
    answers = folder / "answers.jsonl"
    if answers.exists() and answers.read_text() and not answers.read_text().endswith("}\n"):
        wrong.append("half a line in the answers")
    give_up_at = time.monotonic() + SECONDS_TO_VANISH
    while is_anyone_in(folder) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    if is_anyone_in(folder):
        wrong.append("left a process")
    return wrong


def is_anyone_in(folder: Path) -> bool:
    """Whether a process has the folder on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def describe(one: Try, wrong: list[str]) -> str:
    return f"{one.command} {one.number.name} after {one.after_s:.3f} s: {'; '.join(wrong)}" if wrong else ""


def find_faults(count: int, seed: int, longest_s: float, *, with_run: bool = False) -> list[str]:
    """All that was wrong in `count` tries; `with_run`: also of the commands that need a trained run."""
    with (
        tempfile.TemporaryDirectory(prefix="ptune-interrupt-") as name,
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):
        trained = Path(name) / "run"
        if with_run:
            command = command_line("ptune_dist", "train", CONFIG, *SHORT, f"output_dir={trained}")
            subprocess.run(command, cwd=ROOT, env=process_env(), check=True, capture_output=True)
        tries = choose_tries(count, seed, longest_s, WITH_RUN if with_run else WITHOUT_RUN)
        return [fault for fault in pool.map(lambda one: find_fault(one, trained), tries) if fault]


if __name__ == "__main__":
    found = find_faults(
        int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 8.0, with_run=True
    )
    print("\n".join(found) or f"{sys.argv[1]} tries: nothing was wrong")
    sys.exit(bool(found))
