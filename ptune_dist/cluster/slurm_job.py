"""What replicas do for their Slurm job when the node of its batch script is lost.

With --no-kill the job continues on the other nodes, but nothing remains that could end it or queue it again: it would
last until its time limit. So the last launcher queues it again. The job then either finds the run finished, or
continues it.
"""

import re
import subprocess
from collections.abc import Callable

from ptune_dist.cluster.host_lists import expand_hostlist
from ptune_dist.cluster.schedulers import Variables
from ptune_dist.errors import UserError

SECONDS_FOR_SLURM = 60.0


def requeue_orphaned_job(variables: Variables, announce: Callable[[str], None]) -> None:
    """Queue this process's job again if its batch script is lost."""
    job = variables.get("SLURM_JOB_ID", "")
    host = find_lost_host(ask_slurm("scontrol", "--oneliner", "show", "job", job))
    if host:
        announce(f"node {host}, on which the batch script ran, is lost: queueing job {job} again")
        problem = ask_slurm("scontrol", "requeue", job)
        if problem:
            announce(problem)


def find_lost_host(facts: str) -> str:
    """The host of the batch script if the job has lost it, else "". `facts`: what scontrol shows of the job."""
    found = dict(re.findall(r"\b(BatchHost|NodeList)=(\S+)", facts))
    host = found.get("BatchHost", "")
    try:
        is_there = host in expand_hostlist(found.get("NodeList", ""), "NodeList")
    except UserError:
        return ""
    return "" if is_there else host


def ask_slurm(*command: str) -> str:
    """What a command of Slurm prints, errors included; "" where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_SLURM)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).strip()
