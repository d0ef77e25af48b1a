"""Schedulers that list a job's hosts and number none of its launchers: PBS, LSF, Grid Engine; and MPI's ranks.

A node finds itself in the list by its host name. What starts one process on each host (pbsdsh, blaunch, qrsh, mpiexec)
often copies the environment of the job's script, so a variable that numbers the nodes may be the script's own on all of
them; it counts only where the host name is not in the list.
"""

from collections.abc import Callable
from typing import NamedTuple

from ptune_dist.cluster.environment import Environment
from ptune_dist.cluster.host_lists import is_same_host, list_hosts, unique_hosts
from ptune_dist.cluster.schedulers import Placement, Variables
from ptune_dist.errors import UserError

ReadText = Callable[[str], str]  # a file's text by its path; raises OSError

OWN_SETTINGS = "PTUNE_NUM_NODES, PTUNE_NODE_RANK and PTUNE_HEAD_ADDRESS"


class Ranks(NamedTuple):
    """The variables of one kind of mpiexec; `local_size` counts its processes on this host, `num_hosts` its hosts."""

    rank: str
    size: str
    local_size: str
    num_hosts: str = ""


MPI_RANKS = (
    Ranks("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH's Hydra, Intel MPI
    Ranks("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_SIZE"),  # HPE Cray
    Ranks("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),  # MVAPICH2
    Ranks("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_SIZE"),  # LSF's jsrun
    Ranks("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_SIZE", "FLUX_JOB_NNODES"),  # Flux sets no local size
)


def read_pbs(variables: Variables, read_text: ReadText, host_name: str) -> Placement:
    """OpenPBS, PBS Professional and Torque: man qsub, "environment variables"; man pbsdsh.

    PBS_NODEFILE names a file with one line for each slot. PBS_TASKNUM is 1 for the job's script.
    """
    env = Environment(variables, "pbs")
    hosts = read_host_file(env, "PBS_NODEFILE", read_text)
    is_script = env.find_text("PBS_TASKNUM") == "1" and find_ranks(variables) is None
    if is_script and len(hosts) > 1 and is_same_host(host_name, hosts[0]):
        raise UserError(
            f"PBS_NODEFILE (pbs) lists {len(hosts)} nodes, but this is the job's script on the first: start it on each "
            f"with pbsdsh or mpiexec, or set {OWN_SETTINGS}"
        )
    number = env.find_number("PBS_NODENUM")
    return place_host(env, "PBS_NODEFILE", hosts, host_name, number, job_id=env.text("PBS_JOBID"))


def read_lsf(variables: Variables, read_text: ReadText, host_name: str) -> Placement:
    """IBM Spectrum LSF: "environment variables set for job execution". LSB_HOSTS is not set for very many slots."""
    env = Environment(variables, "lsf")
    job_id = env.text("LSB_JOBID")
    index = env.find_text("LSB_JOBINDEX")
    if index and index != "0":  # of a job array
        job_id = f"{job_id}[{index}]"
    name = env.first_set("LSB_MCPU_HOSTS", "LSB_HOSTS", "LSB_DJOB_HOSTFILE")
    if name == "LSB_DJOB_HOSTFILE":
        hosts = read_host_file(env, name, read_text)
    else:
        words = env.text(name).split()
        hosts = unique_hosts(words[::2] if name == "LSB_MCPU_HOSTS" else words)
    return place_host(env, name, hosts, host_name, None, job_id=job_id)


def read_grid_engine(variables: Variables, read_text: ReadText, host_name: str) -> Placement:
    """Grid Engine of Sun, Univa or Altair: man qsub, man sge_pe. Lines of PE_HOSTFILE are HOST SLOTS QUEUE RANGE."""
    env = Environment(variables, "grid engine")
    job_id = env.text("JOB_ID")
    task = env.find_text("SGE_TASK_ID")
    if task and task != "undefined":  # of an array job
        job_id = f"{job_id}.{task}"
    if env.find_number("NHOSTS", minimum=1) == 1:
        return Placement(source=env.source, num_nodes=1, node_rank=0, job_id=job_id)
    hosts = read_host_file(env, "PE_HOSTFILE", read_text)
    return place_host(env, "PE_HOSTFILE", hosts, host_name, None, job_id=job_id)


def read_mpi(variables: Variables, ranks: Ranks) -> Placement:
    """The ranks of an mpiexec that no scheduler's list explains: the head must be named."""
    env = Environment(variables, "mpi")
    num_nodes = env.number(ranks.size, minimum=1)
    refuse_several_per_host(env, ranks)
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=env.node_rank(ranks.rank, num_nodes),
        job_id=env.find_text("PALS_APID") or env.find_text("FLUX_JOB_ID") or "",
        head=env.find_text("MASTER_ADDR"),
        head_variable="PTUNE_HEAD_ADDRESS or MASTER_ADDR",
        port=env.find_port("MASTER_PORT"),
    )


def find_ranks(variables: Variables) -> Ranks | None:
    """The kind of mpiexec that has started this process, if any."""
    return next((ranks for ranks in MPI_RANKS if ranks.rank in variables and ranks.size in variables), None)


def refuse_several_per_host(env: Environment, ranks: Ranks) -> None:
    """Raise UserError where mpiexec has started several launchers on this host."""
    count = env.find_number(ranks.local_size) or 1
    if count > 1:
        raise UserError(f"{ranks.local_size}={count} ({env.source}): start one process on each host, as with -ppn 1")
    size = env.number(ranks.size, minimum=1)
    num_hosts = env.find_number(ranks.num_hosts, minimum=1) if ranks.num_hosts else None
    if num_hosts is not None and size > num_hosts:
        raise UserError(
            f"{ranks.size}={size} ({env.source}) on {num_hosts} hosts: start one process on each, as with "
            f"-N{num_hosts} -n{num_hosts}"
        )


def read_host_file(env: Environment, variable: str, read_text: ReadText) -> list[str]:
    """The hosts that begin the lines of a file, each once. Raises UserError."""
    path = env.text(variable)
    try:
        hosts = list_hosts(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"{variable} ({env.source}) names {path}, which cannot be read here ({reason}): set {OWN_SETTINGS} on each "
            "node, or PTUNE_NUM_NODES=1 PTUNE_NODE_RANK=0 for one"
        ) from None
    if not hosts:
        raise UserError(f"{variable} ({env.source}) names {path}, which lists no host: set {OWN_SETTINGS} on each node")
    return hosts


def place_host(
    env: Environment, variable: str, hosts: list[str], host_name: str, number: int | None, *, job_id: str
) -> Placement:
    """The node that this host is. `number`: what the scheduler takes it for. Raises UserError."""
    ranks = find_ranks(env.variables)
    found = find_host(host_name, hosts)
    if found is not None:
        number = found
    if len(hosts) == 1:
        number = 0
    if ranks is not None:
        refuse_several_per_host(env, ranks)
        hosts = find_hosts_of_ranks(env, ranks, variable, hosts, number)
        number = find_host(host_name, hosts) if found is not None else number
    if number is None or number >= len(hosts):
        shown = ", ".join(hosts[:5]) + (", ..." if len(hosts) > 5 else "")
        raise UserError(
            f"{variable} ({env.source}) lists the hosts {shown}, and none of them is this one, {host_name}: set "
            f"{OWN_SETTINGS} on each node"
        )
    return Placement(
        source=env.source,
        num_nodes=len(hosts),
        node_rank=number,
        job_id=job_id,
        head=hosts[0],
        port=env.find_port("MASTER_PORT"),
        node_names=tuple(hosts),
    )


def find_host(host_name: str, hosts: list[str]) -> int | None:
    """Where a host stands in a list; None where it does not, or more than once."""
    found = [index for index, host in enumerate(hosts) if is_same_host(host_name, host)]
    return found[0] if len(found) == 1 else None


def find_hosts_of_ranks(
    env: Environment, ranks: Ranks, variable: str, hosts: list[str], number: int | None
) -> list[str]:
    """Those of a job's hosts that mpiexec uses. Raises UserError where that cannot be told.

    They may be the first ones, or all after the first, on which LSF runs only the script that calls jsrun.
    """
    size = env.number(ranks.size, minimum=1)
    if size == len(hosts):
        return hosts
    first = -1 if number is None else number - env.node_rank(ranks.rank, size)
    if size > len(hosts) or first < 0 or first + size > len(hosts):
        raise UserError(
            f"{ranks.size}={size} ({env.source}), but {variable} lists {len(hosts)} hosts: start one process on each, "
            f"or set {OWN_SETTINGS} on each node"
        )
    return hosts[first : first + size]
