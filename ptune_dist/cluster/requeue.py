"""May the scheduler start this job again? Asked by slurm/*.sbatch after srun, whose exit statuses do not tell.

Floor 6.
"""

from pathlib import Path
from typing import Any

from ptune_dist.run.status import last_step, read_status

REQUEUE, MISTAKE = 75, 2


def decide(
    status: dict[str, Any], step: int, *, num_requeues: int, max_requeues: int, max_idle: int
) -> tuple[int, str]:
    """The batch script's exit status, 75 to go on, and the reason. `status`: status.json's; `step`: newest saved."""
    state, kind, reason = (status.get(key, "") for key in ("state", "kind", "reason"))
    if state == "done":
        return 0, "done"
    if kind == "mistake":
        return 2, reason
    if kind == "fault":
        return 1, f"{reason}: the same would come again"
    num_idle = status.get("idle_starts", 0) + 1 if step == status.get("started_at_step", step) else 0
    if num_idle >= max_idle:
        return 1, f"{num_idle} starts in a row have gained no step: {reason or 'no reason is known'}"
    if num_requeues >= max_requeues:
        return 1, f"requeued {num_requeues} times, the most that is allowed: {reason}"
    return REQUEUE, reason or "ended without a word"


def may_requeue(
    run_dir: Path, srun_status: int, job_id: str, *, num_requeues: int, max_requeues: int, max_idle: int
) -> int:
    """`decide` for a run, said in a line.

    srun's own status counts where it tells of a mistake, and where `status.json` is of another job, or there is none:
    this one has not come so far as to write it.
    """
    status = read_status(run_dir)
    is_ours = str(status.get("job_id", "")).partition(".")[0] == job_id
    if srun_status == MISTAKE or not is_ours:
        return srun_status
    found, reason = decide(
        status, last_step(run_dir), num_requeues=num_requeues, max_requeues=max_requeues, max_idle=max_idle
    )
    print(f"launcher: {'may go on' if found == REQUEUE else 'ends'}: {reason}", flush=True)
    return found
