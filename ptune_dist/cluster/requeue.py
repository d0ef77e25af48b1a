"""Whether the scheduler should start this job again. slurm/*.sbatch ask after srun, whose exit status does not tell."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptune_dist.cluster.record import read_node_statuses
from ptune_dist.run.status import last_step, read_status

REQUEUE = 75
MISTAKE = 2


@dataclass(frozen=True)
class RequeueLimits:
    """How often a job may be requeued, and how often it has been."""

    num_requeues: int
    max_requeues: int
    max_idle_starts: int  # in a row, without a step gained


def decide_requeue(status: dict[str, Any], step: int, limits: RequeueLimits) -> tuple[int, str]:
    """The exit status of the batch script (75 to requeue) and the reason.

    `status` is the content of status.json, `step` the one of the newest checkpoint.
    """
    state = status.get("state", "")
    kind = status.get("kind", "")
    reason = status.get("reason", "")
    if state == "done":
        return 0, "done"
    if kind == "mistake":
        return MISTAKE, reason
    if kind == "fault":
        return 1, f"{reason}: it would happen again"
    num_idle = status.get("idle_starts", 0) + 1 if step == status.get("started_at_step", step) else 0
    if num_idle >= limits.max_idle_starts:
        return 1, f"{num_idle} starts in a row have gained no step: {reason or 'the reason is unknown'}"
    if limits.num_requeues >= limits.max_requeues:
        return 1, f"requeued {limits.num_requeues} times, which is the limit: {reason}"
    return REQUEUE, reason or "ended without reporting an outcome"


def is_of_job(status: dict[str, Any], job_id: str) -> bool:
    return str(status.get("job_id", "")).partition(".")[0] == job_id


def may_requeue(run_dir: Path, srun_status: int, job_id: str, limits: RequeueLimits) -> int:
    """The exit status of the batch script, after printing the decision.

    srun's own status counts if it is a user's mistake, or if status.json is missing or was written by another job: this
    one then failed before it could write its own. Of nodes that train as replicas, each has a status: until the run is
    done, the last one of this job to end counts.
    """
    status = read_status(run_dir)
    own_nodes = [found for found in read_node_statuses(run_dir) if is_of_job(found, job_id)]
    if own_nodes and status.get("state") == "done":
        srun_status = 0  # other nodes have finished what the lost ones had begun
    elif own_nodes:
        status = max(own_nodes, key=lambda found: str(found.get("time")))
    if srun_status == MISTAKE or not (own_nodes or is_of_job(status, job_id)):
        return srun_status
    code, reason = decide_requeue(status, last_step(run_dir), limits)
    print(f"launcher: {'requeueing' if code == REQUEUE else 'not requeueing'}: {reason}", flush=True)
    return code
