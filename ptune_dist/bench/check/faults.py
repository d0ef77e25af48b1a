"""Kill a rank, then suspend one, in a job of launch/run.sh: how soon it is found, and how soon steps are done again.

    python -m ptune_dist.bench.check.faults CONFIG [key.path=value ...] --result FILE

The job restarts in place after each fault. In the end it is asked to stop, which must save and exit with status 75.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ptune_dist.bench.arguments import side_parser
from ptune_dist.bench.check.folder import write_json
from ptune_dist.cluster.processes import is_dead
from ptune_dist.config.load import load_config
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.status import last_step, read_status

FAULTS = {"kill_9": signal.SIGKILL, "sigstop": signal.SIGSTOP}
STOPPED = 75
PATIENCE_S = 180.0
STEPS_BETWEEN = 6


class Job:
    """A job of launch/run.sh on this machine."""

    def __init__(self, config: str, overrides: list[str], run_dir: Path):
        self.run_dir = run_dir
        self.began = time.monotonic()
        environment = os.environ | {"PTUNE_PYTHON": sys.executable}
        command = ["bash", "launch/run.sh", "--max-restarts", str(len(FAULTS)), config, *overrides]
        self.process = subprocess.Popen(command, env=environment)

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if "ptune_dist" in words and "train" in words and "torch.distributed.run" not in words:
                    found.append(process)
        return found

    def num_steps(self) -> int:
        """The last step with a line of metrics."""
        try:
            lines = list(read_metrics(self.run_dir))
        except (OSError, ValueError):  # not begun, or a line that is being written
            return 0
        return lines[-1]["step"] if lines else 0

    def wait(self, holds: Callable[[], bool], what: str) -> float:
        """Seconds until something holds. Raises RunFault if the job ends or it takes too long."""
        began = time.monotonic()
        while not holds():
            if self.process.poll() is not None:
                raise RunFault(f"the job ended with status {self.process.returncode} before {what}")
            if time.monotonic() - began > PATIENCE_S:
                raise RunFault(f"{what}: not after {PATIENCE_S:.0f} s")
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_for_steps(self, restarts: int, what: str) -> float:
        """Seconds until the job runs after so many restarts and has done steps that no earlier start has done."""
        target = self.num_steps() + STEPS_BETWEEN

        def is_reached() -> bool:
            status = read_status(self.run_dir)
            runs = status.get("state") == "running" and status.get("restarts") == restarts
            return runs and self.num_steps() >= target

        return self.wait(is_reached, what)


def cause(job: Job, name: str, number: int, restarts: int) -> dict[str, Any]:
    """Send a signal to a rank of a running job and time what follows. Raises RunFault."""
    ranks = job.ranks()
    if not ranks:
        raise RunFault("the job has no rank")
    done = job.num_steps()
    ranks[-1].send_signal(number)
    pids = [rank.pid for rank in ranks]
    found_s = job.wait(lambda: all(is_dead(pid) for pid in pids), f"all ranks end after {name}")
    saved = last_step(job.run_dir)
    running_s = found_s + job.wait_for_steps(restarts, f"the job runs again after {name}")
    return {"found_s": found_s, "running_again_s": running_s, "steps_to_repeat": max(0, done - saved)}


def disturb(job: Job) -> dict[str, Any]:
    """Cause every fault, then stop the job. Raises RunFault."""
    result: dict[str, Any] = {"start_s": job.wait_for_steps(0, "the first steps")}
    for restarts, (name, number) in enumerate(FAULTS.items(), 1):
        result |= {f"{name}_{key}": value for key, value in cause(job, name, number, restarts).items()}
    began = time.monotonic()
    job.process.terminate()
    status = job.process.wait(timeout=PATIENCE_S)
    result |= {"stop_s": time.monotonic() - began, "stop_status": status}
    if status != STOPPED:
        raise RunFault(f"a job that is asked to stop must exit with {STOPPED}, not {status}")
    return result


def main() -> int:
    args = side_parser(__doc__).parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides)
        job = Job(args.config, args.overrides, Path(config.output_dir))
        try:
            result = disturb(job)
        finally:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()
    except (UserError, RunFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(Path(args.result), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
