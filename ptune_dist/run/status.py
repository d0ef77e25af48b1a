"""`status.json` of a run: what it is doing, or why it ended, for people and for whoever submits it again.

Keys: state (starting | running | waiting | stopped | failed | done; waiting is for nodes), step (of the newest
checkpoint when this was written), reason, kind (one of `outcome.KINDS`), node, rank, restarts (starts after the run's
first), idle_starts (the most recent starts in a row that led to no new checkpoint), started_at_step, job_id, time. The
head node's launcher writes it, and rank 0 when it begins to train and when it ends. Where nodes train as replicas each
also has a status of its own (`cluster.record`).
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome
from ptune_dist.cluster.rank_files import NODE_NAME, node_folder, to_file_name
from ptune_dist.common.files import fault_on_failed_write, make_folder, replace_file
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.folder import list_checkpoints

LAUNCHERS = "launchers"  # in it a folder for each node that trains as a replica
BLAMELESS = {"reason": "", "kind": "", "node": "", "rank": None}


def read_status(run_dir: Path) -> dict[str, Any]:
    """Empty if the file is missing or cannot be read."""
    try:
        found = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def update_status(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Replace the given keys. Called by one process. Raises RunFault if the file cannot be written."""
    status = {"restarts": 0, "idle_starts": 0} | read_status(run_dir) | changes
    status["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with fault_on_failed_write(run_dir / "status.json"):
        make_folder(run_dir)
        replace_file(run_dir / "status.json", render_status(status))
    return status


def render_status(status: dict[str, Any]) -> bytes:
    return (json.dumps(status, indent=2) + "\n").encode()


def begin_status(run_dir: Path, job_id: str, *, in_place: bool, of_node: Path | None = None) -> dict[str, Any]:
    """Count a start of the ranks that is about to happen, `in_place` if it follows a fault. Raises RunFault.

    of_node: the folder with the status of a node that trains as a replica, in place of the run's.
    """
    folder = of_node or run_dir
    before = read_status(folder)
    step = last_step(run_dir)
    changes = {"state": "starting", "step": step, **BLAMELESS, "job_id": job_id}
    if before:
        changes["restarts"] = before.get("restarts", 0) + 1
    if not in_place:
        is_idle = before.get("started_at_step") == step
        changes["idle_starts"] = before.get("idle_starts", 0) + 1 if is_idle else 0
        changes["started_at_step"] = step
    return update_status(folder, **changes)


def mark_running(run_dir: Path) -> None:
    """Raises RunFault."""
    update_status(run_dir, state="running", step=last_step(run_dir), **BLAMELESS)


def mark_node_running(run_dir: Path) -> None:
    """In the status of this rank's node, which its launcher has begun, if there is one. Raises RunFault."""
    folder = run_dir / LAUNCHERS / to_file_name(os.environ.get(NODE_NAME, ""))
    if node_folder() is not None and (folder / "status.json").exists():
        update_status(folder, state="running", step=last_step(run_dir), **BLAMELESS)


def end_status(run_dir: Path, outcome: Outcome, *, of_node: Path | None = None) -> None:
    """Record how the job ended, or as a replica a node: `of_node` is as in `begin_status`.

    On a full disk the old file is overwritten in place; that is not a fault of its own.
    """
    folder = of_node or run_dir
    state = {DONE: "done", STOPPED: "stopped"}.get(outcome.kind, "failed")
    changes: dict[str, Any] = {"state": state, "kind": outcome.kind, "reason": outcome.reason}
    with contextlib.suppress(UserError):  # the checkpoints cannot be seen
        changes["step"] = last_step(run_dir)
    changes["node"] = outcome.node if state == "failed" else ""
    changes["rank"] = outcome.rank if state == "failed" else None
    try:
        update_status(folder, **changes)
    except RunFault:
        with contextlib.suppress(OSError):
            overwrite_status(folder, read_status(folder) | changes)


def overwrite_status(run_dir: Path, status: dict[str, Any]) -> None:
    """Write into the blocks that the file already has, since a full disk has no others."""
    with open(run_dir / "status.json", "r+b") as file:
        file.write(render_status(status))
        file.truncate()


def last_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none. Raises UserError where they cannot be seen."""
    found = list_checkpoints(run_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0
