"""Which nodes run this job, which of them this is, and where the first one listens: read from a scheduler's variables.

Floor 0. Pure: no torch, no socket, and the one file that may be needed, an MPI hostfile, comes through `read_text`.
It is called once on each node, by the launcher that then starts the ranks of the node.

Environments are tried from the most deliberate word to the least:
1. PTUNE_NODE_RANK: someone, or ssh.sh, said it for this launcher.
2. SkyPilot, AWS Batch, Azure ML: they rent machines on which another scheduler's variables may stand too.
3. Kubeflow's PET_ variables, then a plain JobSet: pods have no Slurm, but Trainer's pods are a JobSet's.
4. Open MPI, then Slurm: mpirun inside an allocation leaves both, and only mpirun's ranks are this job's.
5. NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: last, because batch scripts export them for all nodes alike.
6. Nothing: one node.
PTUNE_HEAD_ADDRESS, PTUNE_PORT, PTUNE_PROCS and PTUNE_JOB_ID win in all of them. An empty variable counts as unset.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ptune_dist.errors import UserError

Env = Mapping[str, str]

LOCAL_HEAD = "127.0.0.1"
FIRST_SPECIAL_STEP = 0xFFFFFFFA  # Slurm's ids from here on are no srun's: the shell of salloc, the batch script, ...
MAX_HOSTS_IN_RANGE = 65536  # Slurm's own limit
HOSTFILES = ("OMPI_MCA_orte_default_hostfile", "OMPI_MCA_prte_default_hostfile", "PRTE_MCA_prte_default_hostfile")


@dataclass(frozen=True)
class Topology:
    """The nodes of a job as one of them sees them; all but `node_rank` and, on AWS Batch, `head` is equal on all."""

    source: str  # slurm, kubernetes, jobset, skypilot, aws batch, azure ml, openmpi, variables, one node
    job_id: str  # the same on every node of a job, another one for another job; "" where nothing names it
    num_nodes: int
    node_rank: int
    head: str  # name or address of node 0; 127.0.0.1 for one node, and on AWS Batch's main node, which has no other
    port: int | None  # of the head, named by the environment or derived from job_id; None: one node, any free port
    node_names: tuple[str, ...]  # one per node, "1" where only the count is known
    num_procs: int | None  # processes per node that the environment asks for; None where it says nothing
    num_restarts: int  # how often the scheduler has started this job again, 0 where it does not tell

    @property
    def node_name(self) -> str:
        return self.node_names[self.node_rank]


def find_topology(env: Env, read_text: Callable[[str], str] = lambda path: Path(path).read_text()) -> Topology:
    """The topology that a launcher's environment describes.

    read_text: gives the text of an MPI hostfile by its path; an OSError means that this node has not got it. Raises
    UserError, in one line that names the variable, where a variable is missing or wrong or the launcher is started in
    another way than once per node.
    """
    env = {name: value.strip() for name, value in env.items() if value.strip()}
    refuse_torchrun(env)
    if "PTUNE_NODE_RANK" in env:
        return read_variables(env)
    if "SKYPILOT_NODE_RANK" in env or "SKYPILOT_NODE_IPS" in env:
        return read_skypilot(env)
    if "AWS_BATCH_JOB_ID" in env or "AWS_BATCH_JOB_NUM_NODES" in env:
        return read_aws_batch(env)
    if "AZUREML_RUN_ID" in env:
        return read_azure_ml(env)
    if "PET_NNODES" in env:
        return read_kubeflow(env)
    if "JOBSET_NAME" in env or "REPLICATED_JOB_NAME" in env:
        return read_jobset(env)
    if "OMPI_COMM_WORLD_SIZE" in env:
        return read_openmpi(env, read_text)
    if "SLURM_JOB_ID" in env:
        return read_slurm(env)
    if any(name in env for name in ("PTUNE_NUM_NODES", "NNODES", "NUM_NODES", "NODE_RANK")):
        return read_variables(env)
    return build_topology(env, "one node", num_nodes=1, node_rank=0)


def build_topology(
    env: Env, source: str, num_nodes: int, node_rank: int, *, job_id: str = "", head: str | None = None,
    head_name: str = "PTUNE_HEAD_ADDRESS", port: int | None = None, node_names: tuple[str, ...] = (),
    num_procs: int | None = None, num_restarts: int = 0,
) -> Topology:  # fmt: skip
    """What a reader found, with what wins over it. head_name: the variable to name where several nodes have no head."""
    job_id = env.get("PTUNE_JOB_ID", job_id)
    # One node needs no name that must first resolve, such as a pod's.
    head = env.get("PTUNE_HEAD_ADDRESS") or (LOCAL_HEAD if num_nodes == 1 else head)
    if head is None:
        raise UserError(f"{head_name} ({source}) is not set, which {num_nodes} nodes need")
    port = read_port(env, "PTUNE_PORT", source) or port
    if port is None and num_nodes > 1:
        port = derive_port(job_id)
    node_names = node_names or tuple(str(number) for number in range(1, num_nodes + 1))
    num_procs = read_number(env, "PTUNE_PROCS", source, least=1) or num_procs or None
    return Topology(source, job_id, num_nodes, node_rank, head, port, node_names, num_procs, num_restarts)


def derive_port(job_id: str) -> int:
    """An even port of 10000..29998, below Linux' ephemeral ones: jobs that share a node rarely get the same."""
    return 10000 + 2 * (zlib.crc32(job_id.encode()) % 10000)


def refuse_torchrun(env: Env) -> None:
    """Raise UserError where this process is one of many ranks already; Azure ML gives RANK to launchers too."""
    is_rank = "RANK" in env and "LOCAL_RANK" in env and "AZUREML_RUN_ID" not in env
    if is_rank or "TORCHELASTIC_RUN_ID" in env:
        name = "TORCHELASTIC_RUN_ID is" if "TORCHELASTIC_RUN_ID" in env else "RANK and LOCAL_RANK are"
        raise UserError(f"run.sh starts torchrun itself: start it once per node and not under torchrun ({name} set)")


def read_variables(env: Env) -> Topology:
    """The names of ssh.sh first, else those that people are used to."""
    source = "variables"
    count_name = first_set(env, "PTUNE_NUM_NODES", "NNODES", "NUM_NODES")
    num_nodes = need_number(env, count_name, source, least=1)
    names = tuple(name.strip() for name in env.get("PTUNE_NODE_NAMES", "").split(",") if name.strip())
    if names and len(names) != num_nodes:
        raise UserError(f"PTUNE_NODE_NAMES ({source}): {len(names)} names, but {count_name}={num_nodes}")
    node_rank = need_rank(env, first_set(env, "PTUNE_NODE_RANK", "NODE_RANK"), source, num_nodes)
    return build_topology(
        env, source, num_nodes, node_rank, head=env.get("MASTER_ADDR"), head_name="PTUNE_HEAD_ADDRESS or MASTER_ADDR",
        port=read_port(env, "MASTER_PORT", source), node_names=names,
    )  # fmt: skip


def read_skypilot(env: Env) -> Topology:
    """docs.skypilot.co, running-jobs/environment-variables. The task's id outlives recoveries; nothing counts those."""
    source = "skypilot"
    names = tuple(need_text(env, "SKYPILOT_NODE_IPS", source).split())
    num_nodes = read_number(env, "SKYPILOT_NUM_NODES", source, least=1) or len(names)
    if num_nodes != len(names):
        raise UserError(f"SKYPILOT_NODE_IPS ({source}): {len(names)} addresses, but SKYPILOT_NUM_NODES={num_nodes}")
    return build_topology(
        env, source, num_nodes, need_rank(env, "SKYPILOT_NODE_RANK", source, num_nodes),
        job_id=env.get("SKYPILOT_TASK_ID", ""), head=names[0], node_names=names,
        num_procs=read_number(env, "SKYPILOT_NUM_GPUS_PER_NODE", source),  # 0 for a task without GPUs
    )  # fmt: skip


def read_aws_batch(env: Env) -> Topology:
    """AWS Batch user guide, mnp-env-vars and job_env_vars. The main node becomes node 0, those before it move up."""
    source = "aws batch"
    num_nodes = read_number(env, "AWS_BATCH_JOB_NUM_NODES", source, least=1) or 1  # set for multi-node jobs only
    rank = need_rank(env, "AWS_BATCH_JOB_NODE_INDEX", source, num_nodes)
    main = need_rank(env, "AWS_BATCH_JOB_MAIN_NODE_INDEX", source, num_nodes)
    if rank <= main:
        rank = 0 if rank == main else rank + 1
    return build_topology(
        env, source, num_nodes, rank,
        job_id=need_text(env, "AWS_BATCH_JOB_ID", source).partition("#")[0],  # a node's id ends in #INDEX
        # The main node is not told its own address; the head only has to reach itself.
        head=env.get("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS", LOCAL_HEAD if rank == 0 else None),
        head_name="AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS",
        num_restarts=(read_number(env, "AWS_BATCH_JOB_ATTEMPT", source, least=1) or 1) - 1,
    )  # fmt: skip


def read_azure_ml(env: Env) -> Topology:
    """learn.microsoft.com, how-to-train-distributed-gpu: WORLD_SIZE counts processes, so they must be one per node."""
    source = "azure ml"
    if "WORLD_SIZE" not in env:
        num_nodes = read_number(env, "OMPI_COMM_WORLD_SIZE", source) or read_number(env, "AZUREML_NODE_COUNT", source)
        if (num_nodes or 1) > 1:
            raise UserError("WORLD_SIZE (azure ml) is not set: several nodes need distribution type pytorch")
        return build_topology(env, source, num_nodes=1, node_rank=0, job_id=env["AZUREML_RUN_ID"])
    num_procs = need_number(env, "WORLD_SIZE", source, least=1)
    num_nodes = read_number(env, "AZUREML_NODE_COUNT", source, least=1) or num_procs
    node_rank = need_rank(env, "NODE_RANK", source, num_nodes)
    # Without a count of nodes, only the second process of a node can tell that there are too many.
    is_second = bool(read_number(env, "LOCAL_RANK", source)) or env.get("RANK", str(node_rank)) != str(node_rank)
    if num_procs != num_nodes or is_second:
        raise UserError("WORLD_SIZE (azure ml) counts several processes per node: set process_count_per_instance to 1")
    return build_topology(
        env, source, num_nodes, node_rank, job_id=env["AZUREML_RUN_ID"],
        head=env.get("MASTER_ADDR"), head_name="MASTER_ADDR", port=read_port(env, "MASTER_PORT", source),
    )  # fmt: skip


def read_kubeflow(env: Env) -> Topology:
    """kubeflow/trainer, pkg/runtime/framework/plugins/torch/torch.go; PyTorchJob's variables have the same names."""
    source = "kubernetes"
    num_nodes = need_number(env, "PET_NNODES", source, least=1)
    node_rank = need_rank(env, first_set(env, "PET_NODE_RANK", "JOB_COMPLETION_INDEX"), source, num_nodes)
    is_word = env.get("PET_NPROC_PER_NODE") in ("auto", "gpu", "cpu")  # torchrun's own words
    return build_topology(
        env, source, num_nodes, node_rank,
        job_id=env.get("PET_MASTER_ADDR", ""),  # made of the job's name, which stands in no variable of its own
        head=env.get("PET_MASTER_ADDR"), head_name="PET_MASTER_ADDR", port=read_port(env, "PET_MASTER_PORT", source),
        num_procs=None if is_word else read_number(env, "PET_NPROC_PER_NODE", source, least=1),
    )  # fmt: skip


def read_jobset(env: Env) -> Topology:
    """jobset.sigs.k8s.io, concepts: JOBSET-REPLICATEDJOB-0-INDEX.JOBSET is the name of a pod of one replicated job.

    All names but JOB_COMPLETION_INDEX, which Kubernetes sets for Indexed Jobs, are those of launch/kubernetes.
    """
    source = "jobset"
    jobset, job = need_text(env, "JOBSET_NAME", source), need_text(env, "REPLICATED_JOB_NAME", source)
    num_nodes = need_number(env, "PTUNE_NUM_NODES", source, least=1)
    return build_topology(
        env, source, num_nodes, need_rank(env, "JOB_COMPLETION_INDEX", source, num_nodes),
        job_id=jobset, head=f"{jobset}-{job}-0-0.{jobset}",
        node_names=tuple(f"{jobset}-{job}-0-{index}" for index in range(num_nodes)),
        num_restarts=read_number(env, "JOBSET_RESTART_ATTEMPT", source) or 0,
    )  # fmt: skip


def read_openmpi(env: Env, read_text: Callable[[str], str]) -> Topology:
    """mpirun's ranks; rank 0 is on the first host of the hostfile when every host has one."""
    source = "openmpi"
    num_nodes = need_number(env, "OMPI_COMM_WORLD_SIZE", source, least=1)
    node_rank = need_rank(env, "OMPI_COMM_WORLD_RANK", source, num_nodes)
    num_local = need_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", source, least=1)
    if num_local > 1:
        raise UserError(f"OMPI_COMM_WORLD_LOCAL_SIZE={num_local} (openmpi): give mpirun --map-by ppr:1:node")
    head = env.get("MASTER_ADDR")
    if head is None and num_nodes > 1 and "PTUNE_HEAD_ADDRESS" not in env:
        head = read_first_host(env, read_text)
    return build_topology(
        env, source, num_nodes, node_rank, job_id=env.get("PMIX_NAMESPACE", env.get("OMPI_MCA_ess_base_jobid", "")),
        head=head, port=read_port(env, "MASTER_PORT", source),
    )  # fmt: skip


def read_first_host(env: Env, read_text: Callable[[str], str]) -> str:
    """The first host of Open MPI's default hostfile: lines of `HOST slots=N`, comments from # on."""
    name = first_set(env, *HOSTFILES)
    lines: list[str] = []
    if name in env:
        try:
            lines = re.sub(r"#.*", "", read_text(env[name])).split("\n")
        except OSError:  # the file may be on mpirun's machine alone
            pass
    hosts = [line.split()[0] for line in lines if line.strip()]
    if not hosts:
        raise UserError(f"MASTER_ADDR is not set and {name} (openmpi) names no host: give mpirun -x MASTER_ADDR=HOST")
    return hosts[0]


def read_slurm(env: Env) -> Topology:
    """slurm.schedmd.com, srun, "output environment variables". Of a step, if srun started this; else of one node."""
    source, job_id = "slurm", env["SLURM_JOB_ID"]
    step = read_number(env, "SLURM_STEP_ID", source)
    # A batch script has SLURM_PROCID and SLURM_NODEID too, both 0: only the step's id tells that srun was here.
    in_step = step is not None and step < FIRST_SPECIAL_STEP
    count_name = first_set(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES") if in_step else "SLURM_NNODES"
    num_nodes = need_number(env, count_name, source, least=1)
    if in_step:
        # Steps of one job may run side by side, and one that is started again must not meet what the first left.
        job_id = f"{job_id}.{step}"
        num_tasks = need_number(env, first_set(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), source, least=1)
        if num_tasks > num_nodes:
            raise UserError(f"SLURM_NTASKS={num_tasks} on {num_nodes} nodes (slurm): add --ntasks-per-node=1 to srun")
    elif num_nodes > 1:
        raise UserError(f"SLURM_NNODES={num_nodes} (slurm) outside srun: start it with srun --ntasks-per-node=1")
    list_name = first_set(env, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    names = tuple(expand_hostlist(need_text(env, list_name, source), list_name))
    if len(names) != num_nodes:
        raise UserError(f"{list_name} ({source}): {len(names)} nodes, but {count_name}={num_nodes}")
    return build_topology(
        env, source, num_nodes, need_rank(env, "SLURM_NODEID", source, num_nodes),
        job_id=job_id, head=names[0], node_names=names,
        num_procs=read_number(env, "SLURM_GPUS_ON_NODE", source),
        num_restarts=read_number(env, "SLURM_RESTART_COUNT", source) or 0,
    )  # fmt: skip


def expand_hostlist(hostlist: str, name: str = "hostlist") -> list[str]:
    """The names of a Slurm hostlist such as `n[0-2,5],gpu-[001-003]-ib[0-1],login`, as `scontrol show hostnames`.

    The last bracket of a name changes fastest; zeros in front stay. name: the variable for the UserError.
    """
    if not re.fullmatch(r"([^\[\]]|\[[^\[\]]+\])*", hostlist):
        raise UserError(f"{name} (slurm): the brackets of {hostlist!r} do not match")
    names = []
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\[\]]+\])+", hostlist):
        parts = re.split(r"\[([^\]]+)\]", pattern)  # text, ranges, text, ranges, ..., text
        choices = [expand_ranges(part, name) if number % 2 else [part] for number, part in enumerate(parts)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def expand_ranges(ranges: str, name: str) -> list[str]:
    """The numbers of `001-003,7` as they are written."""
    numbers = []
    for part in ranges.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not 0 <= last - first < MAX_HOSTS_IN_RANGE:
            raise UserError(f"{name} (slurm): {part!r} is no range of nodes")
        numbers += [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    return numbers


def first_set(env: Env, *names: str) -> str:
    """The first of the names that is set, else the first of all, so that an error names it."""
    return next((name for name in names if name in env), names[0])


def need_text(env: Env, name: str, source: str) -> str:
    if name not in env:
        raise UserError(f"{name} ({source}) is not set")
    return env[name]


def read_number(env: Env, name: str, source: str, least: int = 0) -> int | None:
    """None where it is not set."""
    value = env.get(name)
    if value is not None and not (re.fullmatch("[0-9]+", value) and int(value) >= least):
        raise UserError(f"{name} ({source}): a whole number of at least {least} is needed, got {value!r}")
    return None if value is None else int(value)


def need_number(env: Env, name: str, source: str, least: int = 0) -> int:
    need_text(env, name, source)
    return read_number(env, name, source, least)


def read_port(env: Env, name: str, source: str) -> int | None:
    port = read_number(env, name, source, least=1)
    if port is not None and port > 65535:
        raise UserError(f"{name} ({source}): a port is at most 65535, got {port}")
    return port


def need_rank(env: Env, name: str, source: str, num_nodes: int) -> int:
    """A node's number from 0; of one node it may be left out."""
    rank = read_number(env, name, source) if num_nodes == 1 else need_number(env, name, source)
    if (rank or 0) >= num_nodes:
        raise UserError(f"{name} ({source}): the nodes are 0 to {num_nodes - 1}, got {rank}")
    return rank or 0
