"""What each scheduler tells a launcher about its job: one reader per scheduler.

Each reader returns a Placement, and raises UserError, in one line that names the variable, if one is missing or wrong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ptune_dist.cluster.environment import Environment
from ptune_dist.cluster.host_lists import expand_hostlist, first_host
from ptune_dist.errors import UserError

Variables = Mapping[str, str]

LOCAL_HEAD = "127.0.0.1"
FIRST_SPECIAL_STEP = 0xFFFFFFFA  # Slurm's step ids from here on are not srun's: salloc's shell, the batch script, ...
HOSTFILES = ("OMPI_MCA_orte_default_hostfile", "OMPI_MCA_prte_default_hostfile", "PRTE_MCA_prte_default_hostfile")


@dataclass(frozen=True)
class Placement:
    """One node of a job, as a scheduler describes it. Topology explains the fields."""

    source: str
    num_nodes: int
    node_rank: int
    job_id: str = ""
    head: str | None = None
    head_variable: str = "PTUNE_HEAD_ADDRESS"  # the one to set if several nodes have no head
    port: int | None = None
    node_names: tuple[str, ...] = ()
    num_procs: int | None = None
    num_restarts: int = 0


def read_variables(variables: Variables) -> Placement:
    """The variables of ssh.sh, else the customary ones."""
    env = Environment(variables, "variables")
    count_name = env.first_set("PTUNE_NUM_NODES", "NNODES", "NUM_NODES")
    num_nodes = env.number(count_name, minimum=1)
    names = tuple(name.strip() for name in variables.get("PTUNE_NODE_NAMES", "").split(",") if name.strip())
    if names and len(names) != num_nodes:
        raise UserError(f"PTUNE_NODE_NAMES ({env.source}): {len(names)} names, but {count_name}={num_nodes}")
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=env.node_rank(env.first_set("PTUNE_NODE_RANK", "NODE_RANK"), num_nodes),
        head=env.find_text("MASTER_ADDR"),
        head_variable="PTUNE_HEAD_ADDRESS or MASTER_ADDR",
        port=env.find_port("MASTER_PORT"),
        node_names=names,
    )


def read_skypilot(variables: Variables) -> Placement:
    """SkyPilot: docs.skypilot.co, running-jobs/environment-variables.

    The task's id stays the same when a job is recovered; no variable counts the recoveries.
    """
    env = Environment(variables, "skypilot")
    addresses = tuple(env.text("SKYPILOT_NODE_IPS").split())
    num_nodes = env.find_number("SKYPILOT_NUM_NODES", minimum=1) or len(addresses)
    if num_nodes != len(addresses):
        raise UserError(
            f"SKYPILOT_NODE_IPS ({env.source}): {len(addresses)} addresses, but SKYPILOT_NUM_NODES={num_nodes}"
        )
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=env.node_rank("SKYPILOT_NODE_RANK", num_nodes),
        job_id=env.find_text("SKYPILOT_TASK_ID") or "",
        head=addresses[0],
        node_names=addresses,
        num_procs=env.find_number("SKYPILOT_NUM_GPUS_PER_NODE"),  # 0 for a task without GPUs
    )


def read_aws_batch(variables: Variables) -> Placement:
    """AWS Batch user guide, mnp-env-vars and job_env_vars. The main node becomes node 0; those before it move up."""
    env = Environment(variables, "aws batch")
    num_nodes = env.find_number("AWS_BATCH_JOB_NUM_NODES", minimum=1) or 1  # set for multi-node jobs only
    rank = env.node_rank("AWS_BATCH_JOB_NODE_INDEX", num_nodes)
    main = env.node_rank("AWS_BATCH_JOB_MAIN_NODE_INDEX", num_nodes)
    if rank == main:
        rank = 0
    elif rank < main:
        rank += 1
    head_variable = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"
    head = env.find_text(head_variable)
    if head is None and rank == 0:  # the main node does not get its own address, and need not know it
        head = LOCAL_HEAD
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=rank,
        job_id=env.text("AWS_BATCH_JOB_ID").partition("#")[0],  # a node's id ends in #INDEX
        head=head,
        head_variable=head_variable,
        num_restarts=(env.find_number("AWS_BATCH_JOB_ATTEMPT", minimum=1) or 1) - 1,
    )


def read_azure_ml(variables: Variables) -> Placement:
    """Azure ML: learn.microsoft.com, how-to-train-distributed-gpu.

    WORLD_SIZE counts processes, so there must be one per node.
    """
    env = Environment(variables, "azure ml")
    job_id = env.text("AZUREML_RUN_ID")
    if "WORLD_SIZE" not in env:
        count = env.find_number("OMPI_COMM_WORLD_SIZE") or env.find_number("AZUREML_NODE_COUNT")
        if (count or 1) > 1:
            raise UserError("WORLD_SIZE (azure ml) is not set: several nodes need distribution type pytorch")
        return Placement(source=env.source, num_nodes=1, node_rank=0, job_id=job_id)
    num_procs = env.number("WORLD_SIZE", minimum=1)
    num_nodes = env.find_number("AZUREML_NODE_COUNT", minimum=1) or num_procs
    node_rank = env.node_rank("NODE_RANK", num_nodes)
    # If the number of nodes is unknown, only the second process of a node can tell that there are too many.
    is_second = bool(env.find_number("LOCAL_RANK")) or variables.get("RANK", str(node_rank)) != str(node_rank)
    if num_procs != num_nodes or is_second:
        raise UserError("WORLD_SIZE (azure ml) counts several processes per node: set process_count_per_instance to 1")
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=node_rank,
        job_id=job_id,
        head=env.find_text("MASTER_ADDR"),
        head_variable="MASTER_ADDR",
        port=env.find_port("MASTER_PORT"),
    )


def read_kubeflow(variables: Variables) -> Placement:
    """Kubeflow Trainer, pkg/runtime/framework/plugins/torch/torch.go; PyTorchJob uses the same names."""
    env = Environment(variables, "kubernetes")
    num_nodes = env.number("PET_NNODES", minimum=1)
    num_procs = None
    if env.find_text("PET_NPROC_PER_NODE") not in ("auto", "gpu", "cpu"):  # values that torchrun defines
        num_procs = env.find_number("PET_NPROC_PER_NODE", minimum=1)
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=env.node_rank(env.first_set("PET_NODE_RANK", "JOB_COMPLETION_INDEX"), num_nodes),
        job_id=env.find_text("PET_MASTER_ADDR") or "",  # contains the job's name, which has no variable of its own
        head=env.find_text("PET_MASTER_ADDR"),
        head_variable="PET_MASTER_ADDR",
        port=env.find_port("PET_MASTER_PORT"),
        num_procs=num_procs,
    )


def read_jobset(variables: Variables) -> Placement:
    """JobSet: jobset.sigs.k8s.io, concepts. A pod of a single replicated job is JOBSET-REPLICATEDJOB-0-INDEX.JOBSET.

    launch/kubernetes sets all of these variables but JOB_COMPLETION_INDEX, which Kubernetes sets for Indexed Jobs.
    """
    env = Environment(variables, "jobset")
    jobset = env.text("JOBSET_NAME")
    pods = f"{jobset}-{env.text('REPLICATED_JOB_NAME')}-0"
    num_nodes = env.number("PTUNE_NUM_NODES", minimum=1)
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=env.node_rank("JOB_COMPLETION_INDEX", num_nodes),
        job_id=jobset,
        head=f"{pods}-0.{jobset}",
        node_names=tuple(f"{pods}-{index}" for index in range(num_nodes)),
        num_restarts=env.find_number("JOBSET_RESTART_ATTEMPT") or 0,
    )


def read_openmpi(variables: Variables, read_text: Callable[[str], str]) -> Placement:
    """mpirun's ranks. Rank 0 is on the first host of the hostfile if every host has one rank."""
    env = Environment(variables, "openmpi")
    num_nodes = env.number("OMPI_COMM_WORLD_SIZE", minimum=1)
    node_rank = env.node_rank("OMPI_COMM_WORLD_RANK", num_nodes)
    num_local = env.number("OMPI_COMM_WORLD_LOCAL_SIZE", minimum=1)
    if num_local > 1:
        raise UserError(f"OMPI_COMM_WORLD_LOCAL_SIZE={num_local} (openmpi): pass --map-by ppr:1:node to mpirun")
    head = env.find_text("MASTER_ADDR")
    if head is None and num_nodes > 1 and "PTUNE_HEAD_ADDRESS" not in env:
        head = read_first_host(env, read_text)
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=node_rank,
        job_id=env.find_text("PMIX_NAMESPACE") or env.find_text("OMPI_MCA_ess_base_jobid") or "",
        head=head,
        port=env.find_port("MASTER_PORT"),
    )


def read_first_host(env: Environment, read_text: Callable[[str], str]) -> str:
    """The first host of Open MPI's default hostfile."""
    name = env.first_set(*HOSTFILES)
    host = None
    if name in env:
        try:
            host = first_host(read_text(env.text(name)))
        except OSError:  # the file may exist only on mpirun's machine
            pass
    if host is None:
        raise UserError(
            f"MASTER_ADDR is not set and {name} (openmpi) names no host: pass -x MASTER_ADDR=HOST to mpirun"
        )
    return host


def read_slurm(variables: Variables) -> Placement:
    """Slurm: slurm.schedmd.com, srun, "output environment variables". Describes the step if srun started us."""
    env = Environment(variables, "slurm")
    step = env.find_number("SLURM_STEP_ID")
    # A batch script also has SLURM_PROCID and SLURM_NODEID, both 0. Only the step's id tells that srun started us.
    in_step = step is not None and step < FIRST_SPECIAL_STEP
    num_groups = env.find_number("SLURM_HET_SIZE") or 1  # components of a heterogeneous job
    count_name = env.first_set("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if in_step else "SLURM_NNODES"
    num_nodes = env.number(count_name, minimum=1)
    job_id = env.text("SLURM_JOB_ID")
    if in_step:
        # Steps of one job may run side by side, and a later one must not meet what an earlier one left behind.
        job_id = f"{job_id}.{step}"
        num_tasks = env.number(env.first_set("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), minimum=1)
        if num_tasks > num_nodes:
            raise UserError(f"SLURM_NTASKS={num_tasks} on {num_nodes} nodes (slurm): add --ntasks-per-node=1 to srun")
    elif num_groups > 1:
        groups = f"--het-group=0-{num_groups - 1}"
        raise UserError(
            f"SLURM_HET_SIZE={num_groups} (slurm) outside srun: start it with srun {groups} --ntasks-per-node=1"
        )
    elif num_nodes > 1:
        raise UserError(f"SLURM_NNODES={num_nodes} (slurm) outside srun: start it with srun --ntasks-per-node=1")
    list_name = env.first_set("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    names = tuple(expand_hostlist(env.text(list_name), list_name))
    if len(names) != num_nodes:
        raise UserError(f"{list_name} ({env.source}): {len(names)} nodes, but {count_name}={num_nodes}")
    return Placement(
        source=env.source,
        num_nodes=num_nodes,
        node_rank=env.node_rank("SLURM_NODEID", num_nodes),
        job_id=job_id,
        head=names[0],
        node_names=names,
        num_procs=env.find_number("SLURM_GPUS_ON_NODE"),
        num_restarts=env.find_number("SLURM_RESTART_COUNT") or 0,
    )
