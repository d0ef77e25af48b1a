"""How long a job takes to its first step, and to its next step after a fault, measured on the test cluster.

    python -m tests.cluster.start_times --repeats 5 --out docs/benchmarks/start_times.json

Seconds from sbatch, from a requeued job's start and from a rank's death to the next step in metrics.jsonl, for the
included base on 2 nodes of one rank. All processes share this machine's cores, and importing torch takes most of their
time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from ptune_dist.bench.machine import describe_machine
from tests.cluster.slurm import Cluster
from tests.conftest import write_config
from tests.processes import process_env

MAX_S = 120.0


def num_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + MAX_S
    while num_lines(run) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def step_of(run: Path) -> int:
    return json.loads((run / "status.json").read_text())["step"]


def measure(cluster: Cluster, folder: Path) -> dict[str, float]:
    """The times of one job that is started, stopped and requeued, and of which a rank is killed."""
    config = write_config(
        folder / "config.json",
        train={"max_steps": 100_000},
        checkpoint={"every": 10},
        deepspeed={"zero_optimization": {"stage": 3}},
    )
    run = folder / "run"
    env = process_env({"PTUNE_PYTHON": sys.executable})
    found: dict[str, float] = {}
    began = time.monotonic()
    job = cluster.submit("slurm/train.sbatch", str(config), options=["--nodes=2"], env=env)
    wait_for_step(run, 1)
    found["sbatch to first step"] = time.monotonic() - began

    wait_for_step(run, 15)
    began = time.monotonic()
    cluster.cancel(job, "USR2")
    cluster.wait(job, ["PENDING"], MAX_S)
    found["USR2 to saved and queued again"] = time.monotonic() - began
    cluster.wait(job, ["RUNNING"], MAX_S)
    began = time.monotonic()
    step = step_of(run)
    wait_for_step(run, step + 1)
    found["requeued job's start to its first step"] = time.monotonic() - began

    wait_for_step(run, step + 15)
    ranks = [p for p in cluster.processes("n1", job) if "ptune_dist" in p.cmdline() and "train" in p.cmdline()]
    rank = next(p for p in ranks if "torch.distributed.run" not in p.cmdline())
    before = (run / "metrics.jsonl").stat().st_ino
    began = time.monotonic()
    rank.kill()
    while "restart 1" not in cluster.log(job):
        time.sleep(0.02)
    found["kill -9 of a rank to all ranks ended"] = time.monotonic() - began
    step = step_of(run)
    while (run / "metrics.jsonl").stat().st_ino == before:  # a new attempt removes the lines after its checkpoint
        time.sleep(0.02)
    wait_for_step(run, step + 1)
    found["kill -9 of a rank to the next step"] = time.monotonic() - began
    cluster.cancel(job)
    cluster.wait(job, ["CANCELLED"], MAX_S)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as root, Cluster(Path(root), num_nodes=2) as cluster:
        for repeat in range(args.repeats):
            folder = Path(root) / f"job-{repeat}"
            folder.mkdir()
            runs.append(measure(cluster, folder))
            print(runs[-1], flush=True)
    sides = {name: {"seconds": spread([run[name] for run in runs])} for name in runs[0]}
    about = f"included base, ZeRO-3, 2 nodes of one rank that share the cores of one machine, {args.repeats} jobs"
    case = {"name": "start_times", "about": about, "sides": sides, "ratios": {}, "agreement": None, "runs": []}
    content = {
        "name": "start_times",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        "matrix": {"baseline": None},
        "cases": [case],
        "runs": runs,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
