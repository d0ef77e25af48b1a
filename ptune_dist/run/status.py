"""`status.json` of a run: what it does or why it ended, for people and for whoever submits it again.

Floor 1. Keys: state (starting | running | stopped | failed | done), step (of the newest checkpoint when this was
written), reason, kind (of `signs.KINDS`), node, rank, restarts (starts after the run's first), idle_starts (the last
starts in a row that came to no later checkpoint), started_at_step, job_id, time. The head node's launcher writes it,
and rank 0 when it begins to train and when it ends.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from ptune_dist.cluster.signs import DONE, STOPPED, End
from ptune_dist.common.files import fault_on_failed_write, replace_file
from ptune_dist.errors import RunFault
from ptune_dist.run.folder import list_checkpoints


def read_status(run_dir: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        found = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def update_status(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Replace the keys that are named. Raises RunFault where it cannot be written. One process calls."""
    status = {"restarts": 0, "idle_starts": 0} | read_status(run_dir) | changes
    status["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with fault_on_failed_write(run_dir / "status.json"):
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(run_dir / "status.json", (json.dumps(status, indent=2) + "\n").encode())
    return status


def begin_status(run_dir: Path, job_id: str, *, in_place: bool) -> dict[str, Any]:
    """A launcher is about to start the ranks, `in_place` again after a fault: count it. Raises RunFault."""
    before, step = read_status(run_dir), last_step(run_dir)
    status = {"state": "starting", "step": step, "reason": "", "kind": "", "node": "", "rank": None, "job_id": job_id}
    if before:
        status["restarts"] = before.get("restarts", 0) + 1
    if not in_place:
        is_idle = before.get("started_at_step") == step
        status |= {"idle_starts": before.get("idle_starts", 0) + 1 if is_idle else 0, "started_at_step": step}
    return update_status(run_dir, **status)


def say_training(run_dir: Path) -> None:
    """Raises RunFault."""
    update_status(run_dir, state="running", step=last_step(run_dir), reason="", kind="", node="", rank=None)


def end_status(run_dir: Path, end: End) -> None:
    """How the job ended. A disk that is full is written over in place, and is no fault of its own."""
    state = {DONE: "done", STOPPED: "stopped"}.get(end.kind, "failed")
    where = {"node": end.node, "rank": end.rank} if state == "failed" else {"node": "", "rank": None}
    changes = {"state": state, "step": last_step(run_dir), "kind": end.kind, "reason": end.reason, **where}
    try:
        update_status(run_dir, **changes)
    except RunFault:
        with contextlib.suppress(OSError):
            overwrite_status(run_dir, read_status(run_dir) | changes)


def overwrite_status(run_dir: Path, status: dict[str, Any]) -> None:
    """In the blocks that the file has already, since a full disk has no others to give."""
    with open(run_dir / "status.json", "r+b") as file:
        file.write((json.dumps(status, indent=2) + "\n").encode())
        file.truncate()


def last_step(run_dir: Path) -> int:
    """Of the newest checkpoint, 0 without one."""
    found = list_checkpoints(run_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0
