"""Interrupt commands at random moments. `python -m tests.interrupts NUM_TRIES SEED` prints what was wrong."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT, process_env

MOST_LINES = 2  # what is being done, and how it ended
RUN = ["configs/quickstart.yaml", "train.max_steps=100000", "evaluate.every=0", "checkpoint.every=0"]


@dataclass(frozen=True)
class Try:
    """One command and the moment of its signal, seconds after the first line of our code could run."""

    command: list[str]
    number: signal.Signals
    after_s: float


def choose_tries(count: int, seed: int, longest_s: float) -> list[Try]:
    """Commands, signals and moments."""
    chosen = random.Random(seed)
    commands = [
        [sys.executable, "-m", "ptune_dist", "train", *RUN],
        [sys.executable, "-m", "ptune_dist", "train", *RUN],
        [sys.executable, "-m", "ptune_dist", "validate", *RUN],
        [sys.executable, "-m", "ptune_dist", "env"],
    ]
    numbers = (signal.SIGINT, signal.SIGTERM)
    return [Try(chosen.choice(commands), chosen.choice(numbers), chosen.uniform(0, longest_s)) for _ in range(count)]


def find_fault(one: Try) -> str:
    """What was wrong with how the command ended; empty where nothing was."""
    folder = tempfile.mkdtemp(prefix="ptune-interrupt-")
    command = [*one.command, f"output_dir={folder}/run"] if one.command[-1] != "env" else one.command
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=process_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for_handlers(process)
        time.sleep(one.after_s)
        process.send_signal(one.number)
        _, errors = process.communicate(timeout=120)
        return describe_fault(one, process.returncode, errors, Path(folder) / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_handlers(process: subprocess.Popen) -> None:
    """Wait until the process handles TERM: before, it is Python that starts, not our code."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)


def describe_fault(one: Try, status: int, errors: str, run_dir: Path) -> str:
    """Check the exit status, the lines on stderr, and that no file is half written."""
    allowed = {0, 75, 130} if one.number == signal.SIGINT else {0, 75, -signal.SIGTERM}
    lines = errors.splitlines()
    wrong = []
    if status not in allowed:
        wrong.append(f"status {status}")
    if len(lines) > MOST_LINES or "Traceback" in errors:
        wrong.append(f"{len(lines)} lines: {errors[-1500:]}")
    if run_dir.exists():
        wrong += [f"left {path}" for path in run_dir.rglob("*.tmp*")]
    return f"{one.command[3:5]} {one.number.name} after {one.after_s:.3f} s: {'; '.join(wrong)}" if wrong else ""


def find_faults(count: int, seed: int, longest_s: float) -> list[str]:
    """All that was wrong in `count` tries."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [fault for fault in pool.map(find_fault, choose_tries(count, seed, longest_s)) if fault]


if __name__ == "__main__":
    found = find_faults(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 12.0)
    print("\n".join(found) or "nothing was wrong")
    sys.exit(bool(found))
