"""A soak test: random faults, one after another, against one job of two nodes, which must leave no trace.

    python -m tests.cluster.soak --faults 40 --seed 0 --out docs/benchmarks/soak.json

All kinds of faults occur equally often, in random order; the node, the moment and what is damaged are random too. In
the end the run is compared with an undisturbed one: every step has one line, all losses, the final prompt and the
optimizer are bitwise the same, and each start resumed from the newest intact checkpoint. All processes share this
machine's cores, and importing torch at each start takes most of their time.
"""

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptune_dist.bench.machine import describe_machine
from ptune_dist.run.checkpoint import load_newest_checkpoint
from ptune_dist.run.folder import list_checkpoints
from tests.cluster.runs import HANG_TIMEOUT_S, MOMENTS, PATIENCE_S, SABOTEUR, Run, damage, wait_until_gone
from tests.cluster.slurm import ROOT, Cluster
from tests.processes import python_path

KINDS = (
    "USR2",
    "scontrol requeue",
    "kill -9 of a rank",
    "kill -9 of torchrun",
    "kill -9 of a launcher",
    "kill -9 of slurmstepd",
    "SIGSTOP of a rank",
    "cut link",
    "damaged checkpoint",
    "kill -9 inside a save",
)
EVERY = 10
STEPS_PER_FAULT = 15
STEPS_AFTER = 40


class Soak:
    """One job, and the faults that it has survived."""

    def __init__(self, cluster: Cluster, folder: Path, *, num_faults: int, seed: int):
        self.cluster = cluster
        self.random = random.Random(seed)
        kinds = list(KINDS) * -(-num_faults // len(KINDS))
        self.random.shuffle(kinds)
        self.kinds = kinds[:num_faults]
        self.faults: list[dict[str, Any]] = []
        self.num_steps = STEPS_PER_FAULT * num_faults + STEPS_AFTER
        sections = {"train": {"max_steps": self.num_steps}, "checkpoint": {"every": EVERY, "keep": 3}}
        self.undisturbed = Run(cluster, folder / "undisturbed", **sections)
        self.run = Run(cluster, folder / "disturbed", **sections)
        self.plan = folder / "kill"

    def run_all(self, max_s: float, report: Callable[[str], None] = print) -> None:
        """Inject all faults, or as many as the time allows, and compare. Raises AssertionError."""
        self.undisturbed.submit()
        self.undisturbed.wait_for_end("COMPLETED", timeout=PATIENCE_S + self.num_steps)
        self.run.submit(
            PTUNE_MAX_RESTARTS=1000,
            PTUNE_MAX_IDLE_STARTS=1000,
            PTUNE_MAX_REQUEUES=1000,
            PYTHONPATH=python_path(SABOTEUR, ROOT),
            PTUNE_TEST_KILL=self.plan,
        )
        began = time.monotonic()
        steps_before = 0
        for kind in self.kinds:
            if time.monotonic() - began > max_s:
                break
            step = steps_before + self.random.randint(1, STEPS_PER_FAULT // 2)
            self.run.wait_for_step(step, restarts=len(self.faults), timeout=PATIENCE_S)
            self.faults.append(self.inject(kind))
            steps_before = self.faults[-1]["resumed_from"]
            report(json.dumps(self.faults[-1]))
        self.run.wait_for_end("COMPLETED", timeout=PATIENCE_S + self.num_steps)
        self.run.assert_bitwise(self.undisturbed, self.num_steps)
        assert self.run.starts == [0, *(fault["resumed_from"] for fault in self.faults)]

    def inject(self, kind: str) -> dict[str, Any]:
        """Inject one fault and wait until the job trains again; returns what it was and how long that took."""
        run = self.run
        number = len(self.faults)
        node = self.random.choice(["n0", "n1"])
        processes = run.attempt()
        what = self.strike(kind, node)  # returns when the fault has happened
        began = time.monotonic()
        step = run.num_lines
        intact_then = self.newest_intact()
        run.wait_for(lambda: self.is_found(number), PATIENCE_S, f"{kind} found")
        found_s = time.monotonic() - began
        wait_until_gone(processes)
        if run.cluster.network.cuts:
            run.cluster.heal("n0", "n1")
        if kind == "damaged checkpoint":
            run.wait_for_requeue(PATIENCE_S)
            what += self.damage_newest()
        intact = self.newest_intact()
        assert kind == "damaged checkpoint" or intact >= intact_then
        run.wait_for(lambda: len(run.starts) == number + 2, PATIENCE_S, f"a start after {kind}")
        resumed = run.starts[-1]
        assert resumed == intact, f"{kind}: resumed from step {resumed}, but the checkpoint of {intact} is intact"
        run.wait_for(lambda: run.num_lines > resumed, PATIENCE_S, f"a step after {kind}")
        return {
            "kind": kind,
            "what": what,
            "step": step,
            "resumed_from": resumed,
            "steps_to_repeat": max(0, step - resumed),
            "steps_lost_beyond_checkpoint": intact - resumed,
            "found_s": round(found_s, 2),
            "back_s": round(time.monotonic() - began, 2),
        }

    def strike(self, kind: str, node: str) -> str:
        """Cause the fault; returns where."""
        run = self.run
        cluster = self.cluster
        if kind == "USR2":
            cluster.cancel(run.job, "USR2")
            return ""
        if kind == "scontrol requeue":
            cluster.requeue(run.job)
            return ""
        if kind == "cut link":
            cluster.cut("n0", "n1")
            return "n0 and n1"
        if kind == "kill -9 inside a save":
            moment = self.random.choice(MOMENTS)
            self.plan.write_text(moment)
            run.wait_for(lambda: not self.plan.exists(), PATIENCE_S, f"a save with {moment}")
            return moment
        if kind == "kill -9 of slurmstepd":
            (victim,) = cluster.stepd(node, run.job, "0")
        else:
            victims = {"kill -9 of torchrun": "torchrun", "kill -9 of a launcher": "launcher"}
            (victim,) = run.processes("launcher" if kind == "damaged checkpoint" else victims.get(kind, "rank"), node)
        victim.send_signal(signal.SIGSTOP if kind == "SIGSTOP of a rank" else signal.SIGKILL)
        return node

    def is_found(self, number: int) -> bool:
        status = self.run.status
        return status["state"] not in ("starting", "running") or status["restarts"] > number

    def damage_newest(self) -> str:
        newest = list_checkpoints(self.run.dir / "checkpoints")[-1]
        file = newest / self.random.choice(["prompt.safetensors", "optimizer.safetensors", "state.json"])
        is_truncated = self.random.random() < 0.5
        damage(file, is_truncated=is_truncated)
        return f", {'truncated' if is_truncated else 'one bit flipped in'} {newest.name}/{file.name}"

    def newest_intact(self) -> int:
        folder = self.run.dir / "checkpoints"
        found = load_newest_checkpoint(folder, lambda _: None) if list_checkpoints(folder) else None
        return found.step if found else 0


def describe(soak: Soak, *, seed: int, wall_s: float) -> dict[str, Any]:
    """The result, in the format of the other benchmarks, with every fault."""
    sides = {}
    for kind in KINDS:
        faults = [fault for fault in soak.faults if fault["kind"] == kind]
        if faults:
            sides[f"{kind} ({len(faults)})"] = {
                "found_s": spread([fault["found_s"] for fault in faults]),
                "seconds": spread([fault["back_s"] for fault in faults]),
                "steps_to_repeat": spread([fault["steps_to_repeat"] for fault in faults]),
            }
    num_moments = len({fault["what"] for fault in soak.faults if fault["what"] in MOMENTS})
    about = (
        f"{len(soak.faults)} random faults (seed {seed}) against one job of {soak.num_steps} steps on 2 nodes of one "
        f"rank that share the cores of one machine; a checkpoint every {EVERY} steps, train.hang_timeout_s "
        f"{HANG_TIMEOUT_S}; seconds from the fault to the next step; the final prompt, optimizer and every step's loss "
        "are bitwise those of the undisturbed run, and no step was lost beyond the newest intact checkpoint"
    )
    case = {"name": "soak", "about": about, "sides": sides, "ratios": {}, "agreement": None, "runs": []}
    return {
        "name": "soak",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        "matrix": {"baseline": None},
        "seed": seed,
        "num_steps": soak.num_steps,
        "num_faults": len(soak.faults),
        "is_bitwise": True,
        "num_moments_in_saves": num_moments,
        "wall_s": round(wall_s),
        "load_average_of_15_min": round(os.getloadavg()[2], 1),
        "cases": [case],
        "faults": soak.faults,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-minutes", type=float, default=45)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root, Cluster(Path(root), num_nodes=2) as cluster:
        soak = Soak(cluster, Path(root), num_faults=args.faults, seed=args.seed)
        soak.run_all(args.max_minutes * 60, report=lambda line: print(line, flush=True))
    content = describe(soak, seed=args.seed, wall_s=time.monotonic() - began)
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(soak.faults)} faults survived in {content['wall_s']} s", flush=True)


if __name__ == "__main__":
    main()
