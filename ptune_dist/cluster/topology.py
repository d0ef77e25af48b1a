"""Which nodes run this job, which of them this one is, and where the head listens, from a scheduler's variables.

Pure: no torch and no socket. The files that may be needed, lists of hosts, are read through `read_text`. Each node's
launcher calls it once, before it starts the node's ranks.

Environments are tried from the most deliberate to the least:
1. PTUNE_NODE_RANK: set for this launcher, by a person or by ssh.sh.
2. SkyPilot, AWS Batch, Azure ML: they rent machines on which variables of another scheduler may be set as well.
3. Kubeflow's PET_ variables, then a plain JobSet: pods have no Slurm, but Kubeflow Trainer's pods belong to a JobSet.
4. Open MPI, then Flux, then Slurm: mpirun or Flux inside an allocation leaves both, and Slurm's variables are then
   those of the allocation's first node, on every node.
5. NODE_RANK, with NNODES, MASTER_ADDR and MASTER_PORT: late, because batch scripts export them for all nodes alike.
6. PBS, LSF, Grid Engine, which list hosts; then the ranks of other kinds of mpiexec.
7. NNODES without NODE_RANK, which is a mistake unless it is 1.
8. Nothing: one node, unless a variable that is not read here counts several.
PTUNE_HEAD_ADDRESS, PTUNE_PORT, PTUNE_PROCS and PTUNE_JOB_ID win in all of them. An empty variable counts as unset.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from ptune_dist.cluster.allocation import find_unknown
from ptune_dist.cluster.environment import Environment
from ptune_dist.cluster.host_schedulers import (
    OWN_SETTINGS,
    ReadText,
    find_ranks,
    read_grid_engine,
    read_lsf,
    read_mpi,
    read_pbs,
)
from ptune_dist.cluster.schedulers import (
    LOCAL_HEAD,
    Placement,
    Variables,
    read_aws_batch,
    read_azure_ml,
    read_jobset,
    read_kubeflow,
    read_openmpi,
    read_skypilot,
    read_slurm,
    read_variables,
)
from ptune_dist.errors import UserError

# What launchers that are not read here count: PyTorchJob without PET_ variables, Volcano, Cobalt, Horovod, SageMaker.
COUNTS = (
    *("WORLD_SIZE", "VC_WORKER_NUM", "COBALT_JOBSIZE", "HOROVOD_SIZE", "PMI_SIZE", "FLUX_JOB_NNODES", "NHOSTS"),
    *("SM_HOSTS", "PALS_LOCAL_SIZE", "JSM_NAMESPACE_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Topology:
    """The nodes of a job as seen from one of them. Only `node_rank` and, on AWS Batch, `head` differ between nodes."""

    source: str  # slurm, pbs, lsf, grid engine, kubernetes, jobset, skypilot, aws batch, azure ml, openmpi, ...
    job_id: str  # the same on every node of a job and different for another job; "" if nothing names it
    num_nodes: int
    node_rank: int
    head: str  # name or address of node 0; 127.0.0.1 for one node and on the main node of AWS Batch
    port: int | None  # of the head, named by the environment or derived from job_id; None: one node, any free port
    node_names: tuple[str, ...]  # one per node, "1", "2", ... if only their number is known
    num_procs: int | None  # processes per node, as the environment requests; None if it does not
    num_restarts: int  # how often the scheduler has restarted this job, 0 if it does not tell

    @property
    def node_name(self) -> str:
        return self.node_names[self.node_rank]


def stand_alone(topology: Topology, task: str, name: str = "") -> Topology:
    """This node as the only one of its job: as a replica it has a head of its own.

    task: number of this job in an array, "" outside of one; two jobs may have got the same host. name: what its user
    calls it, "" for the host's.
    """
    name = name or (f"{topology.node_name}-{task}" if task else topology.node_name)
    return replace(topology, num_nodes=1, node_rank=0, head=LOCAL_HEAD, port=None, node_names=(name,))


def read_file(path: str) -> str:
    return Path(path).read_text()


def find_topology(variables: Variables, read_text: ReadText = read_file, host_name: str = "localhost") -> Topology:
    """The topology that a launcher's environment describes.

    `read_text` returns the text of a file of hosts by its path, or raises OSError if this node does not have it.
    `host_name` is this node's. Raises UserError, in one line that names the variable, if a variable is missing or
    wrong, or if the launcher was not started once per node.
    """
    variables = {name: value.strip() for name, value in variables.items() if value.strip()}
    refuse_torchrun(variables)
    return complete(find_placement(variables, read_text, host_name), variables)


def find_placement(variables: Variables, read_text: ReadText, host_name: str) -> Placement:
    """What the most deliberate of the environments says. Raises UserError."""

    def has_any(*names: str) -> bool:
        return any(name in variables for name in names)

    if has_any("PTUNE_NODE_RANK"):
        return read_variables(variables)
    if has_any("SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"):
        return read_skypilot(variables)
    if has_any("AWS_BATCH_JOB_ID", "AWS_BATCH_JOB_NUM_NODES"):
        return read_aws_batch(variables)
    if has_any("AZUREML_RUN_ID"):
        return read_azure_ml(variables)
    if has_any("PET_NNODES"):
        return read_kubeflow(variables)
    if has_any("JOBSET_NAME", "REPLICATED_JOB_NAME"):
        return read_jobset(variables)
    if has_any("OMPI_COMM_WORLD_SIZE"):
        return read_openmpi(variables, read_text)
    ranks = find_ranks(variables)
    if ranks is not None and ranks.rank.startswith("FLUX_"):
        return read_mpi(variables, ranks)
    if has_any("SLURM_JOB_ID"):
        return read_slurm(variables)
    if has_any("NODE_RANK"):
        return read_variables(variables)
    if has_any("PBS_JOBID"):
        return read_pbs(variables, read_text, host_name)
    if has_any("LSB_JOBID"):
        return read_lsf(variables, read_text, host_name)
    if has_any("PE_HOSTFILE") or ("JOB_ID" in variables and "NHOSTS" in variables):
        return read_grid_engine(variables, read_text, host_name)
    if ranks is not None:
        return read_mpi(variables, ranks)
    if has_any("PTUNE_NUM_NODES", "NNODES", "NUM_NODES"):
        return read_variables(variables)
    refuse_uncounted_nodes(variables)
    refuse_unknown_scheduler(variables, read_text)
    return Placement(source="one node", num_nodes=1, node_rank=0)


def refuse_uncounted_nodes(variables: Variables) -> None:
    """Raise UserError where a variable of some other launcher counts several processes or hosts.

    Each of them would take itself for the only node.
    """
    env = Environment(variables, "environment")
    for name in COUNTS:
        value = env.find_text(name) or ""
        if value.startswith("["):  # SageMaker's list of hosts
            value = str(value.count(",") + 1)
        if value.isdecimal() and int(value) > 1:
            raise UserError(
                f"{name}={value} ({env.source}), but no variable tells which node this is: set {OWN_SETTINGS} on each "
                "node, or PTUNE_NUM_NODES=1 PTUNE_NODE_RANK=0 for one"
            )


def refuse_unknown_scheduler(variables: Variables, read_text: ReadText) -> None:
    """Raise UserError where a scheduler that is not read here has given the job several hosts."""
    found = find_unknown(variables, read_text)
    if found is not None and (found.num_hosts or 1) > 1:
        raise UserError(
            f"{found.variable} ({found.scheduler}): this job has {found.num_hosts} hosts, and how this scheduler "
            f"numbers them is not known here: set {OWN_SETTINGS} on each node, or PTUNE_NUM_NODES=1 PTUNE_NODE_RANK=0 "
            "for one"
        )


def describe_unknown_scheduler(variables: Variables, read_text: ReadText = read_file) -> str:
    """A warning where such a scheduler does not tell how many hosts there are; "" elsewhere."""
    found = find_unknown(variables, read_text)
    if found is None or found.num_hosts is not None:
        return ""
    return (
        f"{found.variable} ({found.scheduler}): how many hosts this job has is not known here, and this launcher "
        f"trains on one: for several, set {OWN_SETTINGS} on each node"
    )


def complete(placement: Placement, variables: Variables) -> Topology:
    """A placement with the settings that win over it, and with defaults for what is still missing. Raises UserError."""
    env = Environment(variables, placement.source)
    num_nodes = placement.num_nodes
    job_id = env.find_text("PTUNE_JOB_ID") or placement.job_id
    head = env.find_text("PTUNE_HEAD_ADDRESS") or placement.head
    if num_nodes == 1:  # needs no name that would first have to resolve, such as a pod's
        head = env.find_text("PTUNE_HEAD_ADDRESS") or LOCAL_HEAD
    if head is None:
        raise UserError(f"{placement.head_variable} ({env.source}) is not set, which {num_nodes} nodes need")
    port = env.find_port("PTUNE_PORT") or placement.port
    if port is None and num_nodes > 1:
        port = derive_port(job_id)
    return Topology(
        source=placement.source,
        job_id=job_id,
        num_nodes=num_nodes,
        node_rank=placement.node_rank,
        head=head,
        port=port,
        node_names=placement.node_names or tuple(str(number) for number in range(1, num_nodes + 1)),
        num_procs=env.find_number("PTUNE_PROCS", minimum=1) or placement.num_procs or None,
        num_restarts=placement.num_restarts,
    )


def derive_port(job_id: str) -> int:
    """An even port in 10000..29998, below Linux's ephemeral ports: jobs that share a node rarely get the same one."""
    return 10000 + 2 * (zlib.crc32(job_id.encode()) % 10000)


def refuse_torchrun(variables: Variables) -> None:
    """Raise UserError if this process already is one of many ranks. Azure ML sets RANK for launchers as well."""
    is_rank = "RANK" in variables and "LOCAL_RANK" in variables and "AZUREML_RUN_ID" not in variables
    if is_rank or "TORCHELASTIC_RUN_ID" in variables:
        what = "TORCHELASTIC_RUN_ID is" if "TORCHELASTIC_RUN_ID" in variables else "RANK and LOCAL_RANK are"
        raise UserError(f"run.sh starts torchrun itself: start it once per node, not under torchrun ({what} set)")
