"""How many hosts a scheduler has given to a job, also where nothing tells which of them this one is.

For two mistakes: `ptune-dist train` without the launcher in a job of several hosts, which trains on one of them; and
the launcher under a scheduler that it cannot read. Pure, like topology.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ptune_dist.cluster.environment import Environment
from ptune_dist.cluster.host_lists import list_hosts, unique_hosts
from ptune_dist.cluster.schedulers import FIRST_SPECIAL_STEP, Variables
from ptune_dist.errors import UserError

# Schedulers whose hosts the launcher cannot number: variables of their jobs, by what they hold.
UNKNOWN = {
    "OAR_NODEFILE": ("OAR", "file"),
    "OAR_JOB_ID": ("OAR", ""),
    "PJM_NODE": ("PJM", "number"),
    "PJM_NODEINF": ("PJM", "file"),
    "PJM_O_NODEINF": ("PJM", "file"),
    "PJM_JOBID": ("PJM", ""),
    "LOADL_PROCESSOR_LIST": ("LoadLeveler", "list"),
    "LOADL_HOSTFILE": ("LoadLeveler", "file"),
    "LOADL_STEP_ID": ("LoadLeveler", ""),
}
KNOWN = {
    "PBS_NODEFILE": ("PBS", "file"),
    "LSB_MCPU_HOSTS": ("LSF", "pairs"),
    "LSB_HOSTS": ("LSF", "list"),
    "LSB_DJOB_HOSTFILE": ("LSF", "file"),
    "PE_HOSTFILE": ("Grid Engine", "file"),
    "NHOSTS": ("Grid Engine", "number"),
}


@dataclass(frozen=True)
class Allocation:
    """The hosts of a job. `num_hosts` is None where the scheduler's variables do not tell."""

    scheduler: str
    variable: str
    num_hosts: int | None


def find_allocation(variables: Variables, read_text: Callable[[str], str]) -> Allocation | None:
    """What the scheduler's variables tell, of Slurm those of the step where srun has started this process."""
    env = Environment(variables, "environment")
    if "SLURM_JOB_ID" in env:
        step = count(env, "SLURM_STEP_ID", "number", read_text)
        in_step = step is not None and step < FIRST_SPECIAL_STEP
        name = env.first_set(*(["SLURM_STEP_NUM_NODES"] if in_step else []), "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
        return Allocation("Slurm", name, count(env, name, "number", read_text))
    return first_of(env, KNOWN, read_text) or find_unknown(variables, read_text)


def find_unknown(variables: Variables, read_text: Callable[[str], str]) -> Allocation | None:
    """The job of a scheduler that the launcher cannot read, if it is in one."""
    return first_of(Environment(variables, "environment"), UNKNOWN, read_text)


def first_of(env: Environment, kinds: dict[str, tuple[str, str]], read_text: Callable[[str], str]) -> Allocation | None:
    """The first variable that tells how many hosts there are, else the first that is set."""
    given = {name: kind for name, kind in kinds.items() if name in env}
    found = [Allocation(who, name, count(env, name, kind, read_text)) for name, (who, kind) in given.items()]
    return next((one for one in found if one.num_hosts is not None), found[0] if found else None)


def count(env: Environment, name: str, kind: str, read_text: Callable[[str], str]) -> int | None:
    """The number that a variable holds, or the hosts in its list or its file; None where it cannot be read."""
    try:
        if kind == "number":
            return env.find_number(name)
        text = env.text(name)
        if kind == "file":
            return len(list_hosts(read_text(text))) or None
        if kind in ("list", "pairs"):
            words = text.split()
            return len(unique_hosts(words[::2] if kind == "pairs" else words)) or None
    except (UserError, OSError, ValueError):
        pass
    return None


def describe_idle_hosts(variables: Variables, read_text: Callable[[str], str]) -> str:
    """A warning for `train` without the launcher in a job of several hosts; "" where nothing is wrong.

    Silent where torchrun has ranks on other hosts, and with PTUNE_NUM_NODES, by which one host may be asked for.
    """
    env = Environment(variables, "environment")
    size = count(env, "WORLD_SIZE", "number", read_text) or 1
    local_size = count(env, "LOCAL_WORLD_SIZE", "number", read_text) or 1
    found = find_allocation(variables, read_text)
    if found is None or found.num_hosts == 1 or size > local_size or "PTUNE_NUM_NODES" in env:
        return ""
    if found.num_hosts is None:
        return f"{found.variable} ({found.scheduler}): how many hosts this job has is not known, and this trains on one"
    return (
        f"{found.variable} ({found.scheduler}): this job has {found.num_hosts} hosts, and this command trains on one: "
        "launch/run.sh, started once on each, trains on all (PTUNE_NUM_NODES=1 where one is meant)"
    )
