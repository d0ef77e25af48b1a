"""What each scheduler's variables tell about the nodes of a job, for the dumps in tests/environments."""

import errno
import os
import re
import subprocess
import sys

import pytest

from ptune_dist.cluster.topology import Topology, derive_port, find_topology
from ptune_dist.errors import UserError
from tests.processes import ROOT, process_env

ENVIRONMENTS = ROOT / "tests" / "environments"
# The files of hosts that variables of the dumps name.
FILES = {
    "/etc/mpi/hostfile": "# written by the operator\n\nnode-a slots=2  # the first\nnode-b slots=2\n",
    "/var/spool/pbs/aux/4711.pbs01": "n1.example.org\nn1.example.org\nn2.example.org\nn2.example.org\n",
    "/home/user/.lsbatch/8812.hostfile": "hostA\nhostA\nhostB\nhostB\n",
    "/var/spool/sge/n1/active_jobs/93017.1/pe_hostfile": (
        "n1.example.org 2 all.q@n1.example.org UNDEFINED\nn2.example.org 2 all.q@n2.example.org UNDEFINED\n"
    ),
    "/empty": "\n",
}
DOMAIN_NAMES = ("n1.example.org", "n2.example.org")
UUID = "5f0b1c9e-0000-4000-8000-000000000001"
TWO = ("1", "2")
# A dump, and what each of its nodes finds: source, job_id, head, port, node_names, num_procs, num_restarts.
JOBS = {
    "slurm": ("slurm", "1.0", "n01", derive_port("1.0"), ("n01", "n02", "n03"), 2, 0),
    "slurm_second_step": ("slurm", "1.1", "n02", derive_port("1.1"), ("n02", "n03"), 2, 0),
    "slurm_requeued": ("slurm", "6.0", "n01", derive_port("6.0"), ("n01", "n02"), 2, 1),
    "slurm_salloc_one": ("slurm", "9", "127.0.0.1", None, ("n01",), None, 0),
    "slurm_het": ("slurm", "1.0", "n0", derive_port("1.0"), ("n0", "n1", "n2"), None, 0),
    "pbs": ("pbs", "4711.pbs01", DOMAIN_NAMES[0], derive_port("4711.pbs01"), DOMAIN_NAMES, None, 0),
    "pbs_mpiexec": ("pbs", "4711.pbs01", DOMAIN_NAMES[0], derive_port("4711.pbs01"), DOMAIN_NAMES, None, 0),
    "lsf_jsrun": ("lsf", "8813", "h36n01", derive_port("8813"), ("h36n01", "h36n02"), None, 0),
    "flux_in_slurm": ("mpi", "f3Ab", "n1", derive_port("f3Ab"), TWO, None, 0),
    "lsf": ("lsf", "8812", "hostA", derive_port("8812"), ("hostA", "hostB"), None, 0),
    "grid_engine": ("grid engine", "93017", DOMAIN_NAMES[0], derive_port("93017"), DOMAIN_NAMES, None, 0),
    "mpich": ("mpi", "", "n1", derive_port(""), TWO, None, 0),
    "flux": ("mpi", "f2Z9nVbq", "n1", derive_port("f2Z9nVbq"), TWO, None, 0),
    "openmpi": ("openmpi", "923992065", "node-a", derive_port("923992065"), TWO, None, 0),
    "skypilot": (
        "skypilot",
        "sky-managed-2025-01-01-00-00-00-000000_sentiment_7-0",
        "10.0.0.11",
        derive_port("sky-managed-2025-01-01-00-00-00-000000_sentiment_7-0"),
        ("10.0.0.11", "10.0.0.12"),
        8,
        0,
    ),
    "aws_batch": ("aws batch", UUID, "10.0.0.21", derive_port(UUID), ("1", "2", "3"), None, 1),
    "azure_ml": ("azure ml", "plum_basket_abc123", "10.0.0.4", 6105, TWO, None, 0),
    "kubeflow": ("kubernetes", "sentiment-node-0-0.sentiment", "sentiment-node-0-0.sentiment", 29500, TWO, None, 0),
    "jobset": (
        "jobset",
        "sentiment",
        "sentiment-node-0-0.sentiment",
        derive_port("sentiment"),
        ("sentiment-node-0-0", "sentiment-node-0-1"),
        None,
        1,
    ),
    "ssh": (
        "variables",
        "sentiment-1735689600",
        "10.0.0.31",
        derive_port("sentiment-1735689600"),
        ("gpu1", "gpu2"),
        4,
        0,
    ),
    "variables": ("variables", "", "trainer-0.local", 29511, TWO, None, 0),
}
NODES = [(name, rank) for name, expected in JOBS.items() for rank in range(len(expected[4]))]
# A dump, what is changed in it (None: unset), and what the one-line error must contain.
MISTAKES = [
    ("slurm_two_tasks", {}, "SLURM_NTASKS=4 on 2 nodes (slurm): add --ntasks-per-node=1"),
    ("slurm_batch_script", {}, "SLURM_NNODES=3 (slurm) outside srun: start it with srun --ntasks-per-node=1"),
    ("slurm_interactive", {}, "SLURM_NNODES=2 (slurm) outside srun"),
    ("slurm_salloc", {}, "SLURM_NNODES=2 (slurm) outside srun"),
    ("slurm_salloc", {"SLURM_NNODES": None}, "SLURM_NNODES (slurm) is not set"),
    (
        "slurm_het_batch_script",
        {},
        "SLURM_HET_SIZE=2 (slurm) outside srun: start it with srun --het-group=0-1 --ntasks-p",
    ),
    (
        "pbs",
        {"HOSTNAME": "n3", "PBS_NODENUM": None},
        "PBS_NODEFILE (pbs) lists the hosts n1.example.org, n2.example.org, a",
    ),
    (
        "pbs",
        {"PBS_TASKNUM": "1"},
        "this is the job's script on the first: start it on each with pbsdsh or mpiexec, or set",
    ),
    (
        "pbs",
        {"PBS_NODEFILE": "/absent"},
        "PBS_NODEFILE (pbs) names /absent, which cannot be read here (No such file or d",
    ),
    (
        "pbs",
        {"PBS_NODEFILE": "/empty"},
        "PBS_NODEFILE (pbs) names /empty, which lists no host: set PTUNE_NUM_NODES, PTUNE_",
    ),
    ("pbs", {"PBS_NODEFILE": None}, "PBS_NODEFILE (pbs) is not set"),
    ("pbs", {"PBS_NODENUM": "x"}, "PBS_NODENUM (pbs): must be a whole number"),
    (
        "pbs_mpiexec",
        {"MPI_LOCALNRANKS": "2"},
        "MPI_LOCALNRANKS=2 (pbs): start one process on each host, as with -ppn 1",
    ),
    (
        "lsf",
        {"HOSTNAME": "login"},
        "LSB_MCPU_HOSTS (lsf) lists the hosts hostA, hostB, and none of them is this one, login",
    ),
    ("lsf", {"LSB_MCPU_HOSTS": None, "LSB_HOSTS": None, "LSB_DJOB_HOSTFILE": None}, "LSB_MCPU_HOSTS (lsf) is not set"),
    ("grid_engine", {"PE_HOSTFILE": "/absent"}, "PE_HOSTFILE (grid engine) names /absent, which cannot be read here"),
    ("grid_engine", {"PE_HOSTFILE": None}, "PE_HOSTFILE (grid engine) is not set"),
    ("grid_engine", {"NHOSTS": "two"}, "NHOSTS (grid engine): must be a whole number of at least 1"),
    (
        "grid_engine",
        {"HOSTNAME": "n9"},
        "none of them is this one, n9: set PTUNE_NUM_NODES, PTUNE_NODE_RANK and PTUNE_HEAD",
    ),
    ("mpich", {"MASTER_ADDR": None}, "PTUNE_HEAD_ADDRESS or MASTER_ADDR (mpi) is not set, which 2 nodes need"),
    ("mpich", {"MPI_LOCALNRANKS": "8"}, "MPI_LOCALNRANKS=8 (mpi): start one process on each host"),
    ("mpich", {"PMI_RANK": "2"}, "PMI_RANK (mpi): the nodes are 0 to 1, not 2"),
    (
        "mpich",
        {"PMI_RANK": None},
        "PMI_SIZE=2 (environment), but no variable tells which node this is: set PTUNE_NUM_NODES",
    ),
    ("flux", {"FLUX_JOB_SIZE": "8"}, "FLUX_JOB_SIZE=8 (mpi) on 2 hosts: start one process on each, as with -N2 -n2"),
    ("pbs_mpiexec", {"PMI_SIZE": "4"}, "PMI_SIZE=4 (pbs), but PBS_NODEFILE lists 2 hosts: start one process on each"),
    ("flux", {"FLUX_TASK_RANK": None}, "FLUX_JOB_NNODES=2 (environment), but no variable tells which node this is"),
    ("slurm", {"SLURM_NODEID": None}, "SLURM_NODEID (slurm) is not set"),
    ("slurm", {"SLURM_NODEID": "3"}, "SLURM_NODEID (slurm): the nodes are 0 to 2, not 3"),
    ("slurm", {"SLURM_STEP_NUM_NODES": None, "SLURM_NNODES": None}, "SLURM_STEP_NUM_NODES (slurm) is not set"),
    ("slurm", {"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": None}, "SLURM_STEP_NUM_TASKS (slurm) is not set"),
    ("slurm", {"SLURM_STEP_NUM_NODES": "0"}, "SLURM_STEP_NUM_NODES (slurm): must be a whole number of at least 1"),
    ("slurm", {"SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": None}, "SLURM_STEP_NODELIST (slurm) is not set"),
    ("slurm", {"SLURM_STEP_NODELIST": "n[01-02]"}, "SLURM_STEP_NODELIST (slurm): 2 nodes, but SLURM_STEP_NUM_NODES=3"),
    ("slurm", {"SLURM_STEP_NODELIST": "n[01-03"}, "SLURM_STEP_NODELIST (slurm): the brackets"),
    ("slurm", {"SLURM_STEP_ID": "first"}, "SLURM_STEP_ID (slurm): must be a whole number"),
    ("slurm", {"SLURM_GPUS_ON_NODE": "two"}, "SLURM_GPUS_ON_NODE (slurm): must be a whole number"),
    ("slurm", {"SLURM_RESTART_COUNT": "-1"}, "SLURM_RESTART_COUNT (slurm): must be a whole number"),
    ("slurm", {"PTUNE_PORT": "70000"}, "PTUNE_PORT (slurm): a port is at most 65535"),
    ("slurm", {"PTUNE_PROCS": "0"}, "PTUNE_PROCS (slurm): must be a whole number of at least 1, not '0'"),
    ("openmpi_two_per_node", {}, "OMPI_COMM_WORLD_LOCAL_SIZE=2 (openmpi): pass --map-by ppr:1:node to mpirun"),
    ("openmpi", {"OMPI_MCA_orte_default_hostfile": None}, "pass -x MASTER_ADDR=HOST to mpirun"),
    ("openmpi", {"OMPI_MCA_orte_default_hostfile": "/absent"}, "_default_hostfile (openmpi) names no host"),
    ("openmpi", {"OMPI_COMM_WORLD_RANK": None}, "OMPI_COMM_WORLD_RANK (openmpi) is not set"),
    ("openmpi", {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK (openmpi): the nodes are 0 to 1"),
    ("openmpi", {"OMPI_COMM_WORLD_LOCAL_SIZE": None}, "OMPI_COMM_WORLD_LOCAL_SIZE (openmpi) is not set"),
    ("openmpi", {"OMPI_COMM_WORLD_SIZE": "0"}, "OMPI_COMM_WORLD_SIZE (openmpi): must be a whole number of at least 1"),
    ("skypilot", {"SKYPILOT_NODE_RANK": None}, "SKYPILOT_NODE_RANK (skypilot) is not set"),
    ("skypilot", {"SKYPILOT_NODE_IPS": None}, "SKYPILOT_NODE_IPS (skypilot) is not set"),
    ("skypilot", {"SKYPILOT_NODE_RANK": "2"}, "SKYPILOT_NODE_RANK (skypilot): the nodes are 0 to 1"),
    ("skypilot", {"SKYPILOT_NUM_NODES": "3"}, "SKYPILOT_NODE_IPS (skypilot): 2 addresses, but SKYPILOT_NUM_NODES=3"),
    ("skypilot", {"SKYPILOT_NUM_GPUS_PER_NODE": "A100"}, "SKYPILOT_NUM_GPUS_PER_NODE (skypilot)"),
    ("aws_batch", {"AWS_BATCH_JOB_NODE_INDEX": None}, "AWS_BATCH_JOB_NODE_INDEX (aws batch) is not set"),
    ("aws_batch", {"AWS_BATCH_JOB_NODE_INDEX": "3"}, "AWS_BATCH_JOB_NODE_INDEX (aws batch): the nodes are 0 to 2"),
    ("aws_batch", {"AWS_BATCH_JOB_MAIN_NODE_INDEX": None}, "AWS_BATCH_JOB_MAIN_NODE_INDEX (aws batch) is not set"),
    ("aws_batch", {"AWS_BATCH_JOB_MAIN_NODE_INDEX": "0"}, "_MAIN_NODE_PRIVATE_IPV4_ADDRESS (aws batch) is not set"),
    ("aws_batch", {"AWS_BATCH_JOB_ID": None}, "AWS_BATCH_JOB_ID (aws batch) is not set"),
    ("aws_batch", {"AWS_BATCH_JOB_NUM_NODES": "none"}, "AWS_BATCH_JOB_NUM_NODES (aws batch): must be a whole number"),
    (
        "aws_batch",
        {"AWS_BATCH_JOB_ATTEMPT": "0"},
        "AWS_BATCH_JOB_ATTEMPT (aws batch): must be a whole number of at least 1",
    ),
    ("azure_ml_two_procs", {}, "WORLD_SIZE (azure ml) counts several processes per node: set process_count_per_inst"),
    ("azure_ml", {"AZUREML_NODE_COUNT": "1"}, "set process_count_per_instance to 1"),
    ("azure_ml", {"RANK": "1"}, "set process_count_per_instance to 1"),
    ("azure_ml", {"WORLD_SIZE": None, "AZUREML_NODE_COUNT": "2"}, "WORLD_SIZE (azure ml) is not set: several"),
    ("azure_ml", {"WORLD_SIZE": None, "OMPI_COMM_WORLD_SIZE": "2"}, "WORLD_SIZE (azure ml) is not set: several"),
    ("azure_ml", {"NODE_RANK": None}, "NODE_RANK (azure ml) is not set"),
    ("azure_ml", {"MASTER_ADDR": None}, "MASTER_ADDR (azure ml) is not set, which 2 nodes need"),
    ("azure_ml", {"MASTER_PORT": "http"}, "MASTER_PORT (azure ml): must be a whole number"),
    ("kubeflow", {"PET_NNODES": "1:2"}, "PET_NNODES (kubernetes): must be a whole number of at least 1, not '1:2'"),
    ("kubeflow", {"PET_NODE_RANK": None, "JOB_COMPLETION_INDEX": None}, "PET_NODE_RANK (kubernetes) is not set"),
    ("kubeflow", {"PET_NODE_RANK": "2"}, "PET_NODE_RANK (kubernetes): the nodes are 0 to 1"),
    ("kubeflow", {"PET_MASTER_ADDR": None}, "PET_MASTER_ADDR (kubernetes) is not set, which 2 nodes need"),
    ("kubeflow", {"PET_NPROC_PER_NODE": "all"}, "PET_NPROC_PER_NODE (kubernetes): must be a whole number"),
    ("jobset", {"JOBSET_NAME": None}, "JOBSET_NAME (jobset) is not set"),
    ("jobset", {"REPLICATED_JOB_NAME": None}, "REPLICATED_JOB_NAME (jobset) is not set"),
    ("jobset", {"PTUNE_NUM_NODES": None}, "PTUNE_NUM_NODES (jobset) is not set"),
    ("jobset", {"JOB_COMPLETION_INDEX": None}, "JOB_COMPLETION_INDEX (jobset) is not set"),
    ("jobset", {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX (jobset): the nodes are 0 to 1, not 2"),
    ("jobset", {"JOBSET_RESTART_ATTEMPT": "x"}, "JOBSET_RESTART_ATTEMPT (jobset): must be a whole number"),
    ("ssh", {"PTUNE_NODE_NAMES": "gpu1"}, "PTUNE_NODE_NAMES (variables): 1 names, but PTUNE_NUM_NODES=2"),
    ("ssh", {"PTUNE_NUM_NODES": None}, "PTUNE_NUM_NODES (variables) is not set"),
    ("ssh", {"PTUNE_NODE_RANK": None}, "PTUNE_NODE_RANK (variables) is not set"),
    ("ssh", {"PTUNE_HEAD_ADDRESS": None}, "PTUNE_HEAD_ADDRESS or MASTER_ADDR (variables) is not set"),
    ("variables", {"NODE_RANK": ""}, "PTUNE_NODE_RANK (variables) is not set"),
    ("variables", {"NODE_RANK": "2"}, "NODE_RANK (variables): the nodes are 0 to 1, not 2"),
    ("variables", {"NNODES": "two"}, "NNODES (variables): must be a whole number of at least 1, not 'two'"),
    ("variables", {"NNODES": "0"}, "NNODES (variables): must be a whole number of at least 1, not '0'"),
    ("variables", {"MASTER_ADDR": None}, "PTUNE_HEAD_ADDRESS or MASTER_ADDR (variables) is not set"),
    ("variables", {"MASTER_PORT": "0"}, "MASTER_PORT (variables): must be a whole number of at least 1"),
    ("variables", {"TORCHELASTIC_RUN_ID": "none"}, "run.sh starts torchrun itself: start it once per node"),
    ("variables", {"RANK": "0", "LOCAL_RANK": "0"}, "run.sh starts torchrun itself: start it once per node"),
    ("azure_ml", {"TORCHELASTIC_RUN_ID": "none"}, "run.sh starts torchrun itself: start it once per node"),
]


def load_environment(name: str, rank: int = 0, **changes: str | None) -> dict[str, str]:
    """The variables of one node: the lines before the first `# node N`, and those below its own."""
    shared, *nodes = re.split(r"^# node [0-9]+\n", (ENVIRONMENTS / f"{name}.env").read_text(), flags=re.MULTILINE)
    own = nodes[rank] if nodes else ""
    lines = [line for line in (shared + own).splitlines() if not line.startswith("#")]
    env = dict(line.replace("\\n", "\n").split("=", 1) for line in lines) | changes
    return {key: value for key, value in env.items() if value is not None}


def read_hostfile(path: str) -> str:
    if path not in FILES:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return FILES[path]


def find(name: str, rank: int = 0, **changes: str | None) -> Topology:
    variables = load_environment(name, rank, **changes)
    return find_topology(variables, read_hostfile, variables.get("HOSTNAME", "localhost"))


@pytest.mark.parametrize("name, rank", NODES)
def test_every_node_of_a_dump_finds_its_job(name: str, rank: int):
    source, job_id, head, port, node_names, num_procs, num_restarts = JOBS[name]
    if name == "aws_batch" and rank == 0:
        head = "127.0.0.1"  # the main node does not get its own address
    expected = Topology(source, job_id, len(node_names), rank, head, port, node_names, num_procs, num_restarts)
    assert find(name, rank) == expected
    assert expected.node_name == node_names[rank]


@pytest.mark.parametrize("name", JOBS)
def test_the_nodes_of_a_job_differ_only_in_their_rank(name: str):
    found = [find(name, rank) for rank in range(len(JOBS[name][4]))]
    assert len({(node.job_id, node.port, node.num_nodes, node.node_names) for node in found}) == 1
    assert len({node.head for node in found}) == (2 if name == "aws_batch" else 1)
    assert [node.node_rank for node in found] == list(range(len(found)))


def test_every_dump_is_used_by_a_test_and_names_its_origin():
    names = {path.stem for path in ENVIRONMENTS.glob("*.env")}
    assert names == set(JOBS) | {name for name, _, _ in MISTAKES}
    for name in names:
        assert re.match("# (dumped from|based on) ", (ENVIRONMENTS / f"{name}.env").read_text()), name


@pytest.mark.parametrize("name, changes, message", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_variable(name: str, changes: dict[str, str | None], message: str):
    with pytest.raises(UserError) as error:
        find(name, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_variables_there_is_one_node_on_any_port():
    alone = Topology("one node", "", 1, 0, "127.0.0.1", None, ("1",), None, 0)
    assert find_topology({}) == alone
    # None of these alone describes a job: shells and images set them for other reasons.
    assert find_topology({"MASTER_ADDR": "somewhere", "MASTER_PORT": "29500", "NNODES": "", "RANK": "0"}) == alone


@pytest.mark.parametrize("name", ["slurm", "skypilot", "aws_batch", "kubeflow", "jobset", "openmpi", "ssh"])
def test_the_users_settings_win(name: str):
    settings = {"PTUNE_HEAD_ADDRESS": "10.9.9.9", "PTUNE_PORT": "12345", "PTUNE_PROCS": "3", "PTUNE_JOB_ID": "mine"}
    found = find(name, **settings)
    assert (found.head, found.port, found.num_procs, found.job_id) == ("10.9.9.9", 12345, 3, "mine")
    assert (found.source, found.node_names) == (JOBS[name][0], JOBS[name][4])


def test_one_node_takes_the_users_settings_too():
    found = find_topology({"PTUNE_PORT": "12345", "PTUNE_PROCS": "4", "PTUNE_HEAD_ADDRESS": "::1"})
    assert (found.source, found.head, found.port, found.num_procs) == ("one node", "::1", 12345, 4)


# A scheduler that is tried earlier wins over those after it, even if all of their variables are set.
@pytest.mark.parametrize(
    "order",
    [
        ("ssh", "skypilot", "aws_batch", "azure_ml", "kubeflow", "openmpi", "slurm", "variables"),
        ("skypilot", "kubeflow", "slurm"),
        ("kubeflow", "jobset", "variables"),
        ("jobset", "slurm", "variables"),
        ("openmpi", "slurm"),
        ("flux", "slurm"),
        ("slurm", "variables"),
        ("skypilot", "slurm_salloc"),
        ("openmpi", "slurm_salloc"),
    ],
)
def test_the_more_deliberate_scheduler_wins(order: tuple[str, ...]):
    for number, name in enumerate(order):
        env: dict[str, str] = {}
        for later in reversed(order[number:]):
            env |= load_environment(later)
        # Several schedulers share PTUNE_NUM_NODES and MASTER_ADDR, so only the source is compared.
        expected = JOBS[name][0] if name in JOBS else "slurm"
        assert find_topology(env, read_hostfile).source == expected
        if number == len(order) - 2 and order[-1] == "slurm_salloc":
            break  # a mistake on its own


def test_a_jobset_is_not_mistaken_for_plain_variables():
    assert find("jobset").source == "jobset"
    assert find("jobset", NODE_RANK="1").node_rank == 0


@pytest.mark.parametrize("name", ["aws_batch", "kubeflow", "jobset", "skypilot", "ssh", "variables"])
def test_a_single_node_needs_no_head_and_no_rank(name: str):
    one = {"AWS_BATCH_JOB_NUM_NODES": None, "AWS_BATCH_JOB_NODE_INDEX": None, "AWS_BATCH_JOB_MAIN_NODE_INDEX": None}
    one |= {"PET_NNODES": "1", "PET_NODE_RANK": None, "JOB_COMPLETION_INDEX": None, "PET_MASTER_ADDR": None}
    one |= {"SKYPILOT_NODE_IPS": "10.0.0.11", "SKYPILOT_NUM_NODES": None, "NNODES": "1", "MASTER_ADDR": None}
    one |= {"PTUNE_NUM_NODES": "1", "PTUNE_NODE_NAMES": "gpu1", "PTUNE_HEAD_ADDRESS": None}
    own = load_environment(name)
    found = find(name, **{key: value for key, value in one.items() if key in own})
    assert (found.source, found.num_nodes, found.node_rank, found.head) == (JOBS[name][0], 1, 0, "127.0.0.1")
    named = own.get("PET_MASTER_PORT", own.get("MASTER_PORT"))
    assert found.port == (int(named) if named else None)


def test_a_single_node_of_azure_ml_has_no_distribution():
    found = find_topology({"AZUREML_RUN_ID": "plum", "AZUREML_NODE_COUNT": "1"})
    assert (found.source, found.job_id, found.head, found.port) == ("azure ml", "plum", "127.0.0.1", None)


def test_a_batch_script_on_one_node_is_one_node():
    found = find("slurm_batch_script", SLURM_NNODES="1", SLURM_JOB_NODELIST="n07")
    assert found == Topology("slurm", "1", 1, 0, "127.0.0.1", None, ("n07",), 2, 0)


def test_the_main_node_of_aws_batch_becomes_node_0_whatever_its_index():
    for main, ranks in {"0": [0, 1, 2], "1": [1, 0, 2], "2": [1, 2, 0]}.items():
        found = [
            find("aws_batch", 1, AWS_BATCH_JOB_MAIN_NODE_INDEX=main, AWS_BATCH_JOB_NODE_INDEX=str(index))
            for index in range(3)
        ]
        assert [node.node_rank for node in found] == ranks


def test_mpi_prefers_the_head_of_its_command_to_the_hostfile():
    assert find("openmpi", MASTER_ADDR="10.0.0.9", OMPI_MCA_orte_default_hostfile=None).head == "10.0.0.9"
    newer = {"OMPI_MCA_orte_default_hostfile": None, "PRTE_MCA_prte_default_hostfile": "/etc/mpi/hostfile"}
    assert find("openmpi", **newer).head == "node-a"


def test_a_number_of_processes_that_is_a_word_or_zero_is_ignored():
    assert [find("kubeflow", PET_NPROC_PER_NODE=value).num_procs for value in ("gpu", "cpu", "4")] == [None, None, 4]
    assert find("skypilot", SKYPILOT_NUM_GPUS_PER_NODE="0").num_procs is None
    assert find("slurm", SLURM_GPUS_ON_NODE=None).num_procs is None


def test_a_node_finds_itself_by_name_before_a_number_that_may_be_the_scripts():
    assert [find("pbs", 1, PBS_NODENUM=number).node_rank for number in (None, "0", "1")] == [1, 1, 1]
    assert find("pbs", HOSTNAME="unknown", PBS_NODENUM="1").node_rank == 1  # the list has names of another network
    assert find("pbs", 1, HOSTNAME="N2.example.org.").node_rank == 1
    with pytest.raises(UserError, match="none of them is this one"):
        find("grid_engine", HOSTNAME="n2.elsewhere.net")


def test_one_host_of_a_list_is_one_node_whatever_it_is_called():
    one = {"LSB_MCPU_HOSTS": "hostA 4", "HOSTNAME": "container"}
    assert (find("lsf", **one).num_nodes, find("lsf", **one).head) == (1, "127.0.0.1")
    assert find("grid_engine", NHOSTS="1", PE_HOSTFILE=None).num_nodes == 1


def test_lists_of_slots_and_files_say_the_same():
    found = [find("lsf", LSB_MCPU_HOSTS=None), find("lsf", LSB_MCPU_HOSTS=None, LSB_HOSTS=None), find("lsf")]
    assert found[0] == found[1] == found[2]


def test_tasks_of_an_array_are_jobs_of_their_own():
    assert find("lsf", LSB_JOBINDEX="3").job_id == "8812[3]"
    assert find("grid_engine", SGE_TASK_ID="3").job_id == "93017.3"


@pytest.mark.parametrize("name", ["pbs", "lsf", "grid_engine", "mpich"])
def test_a_node_rank_given_by_the_user_wins_over_lists_of_hosts(name: str):
    given = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "a"}
    found = find(name, **given)
    assert (found.source, found.num_nodes, found.node_rank, found.head) == ("variables", 3, 2, "a")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "VC_WORKER_NUM", "HOROVOD_SIZE"])
def test_several_nodes_that_nothing_numbers_are_refused(name: str):
    with pytest.raises(UserError, match=f"{name}=2 .* set PTUNE_NUM_NODES, PTUNE_NODE_RANK and PTUNE_HEAD_ADDRESS"):
        find_topology({name: "2", "RANK": "0"})
    assert find_topology({name: "1"}).num_nodes == 1
    assert find_topology({name: "2", "PTUNE_NUM_NODES": "1", "PTUNE_NODE_RANK": "0"}).num_nodes == 1


def test_ports_are_below_the_ephemeral_ones_and_rarely_collide():
    ports = [derive_port(f"{job}.0") for job in range(1000, 1100)]
    assert all(10000 <= port < 30000 and port % 2 == 0 for port in ports)
    assert len(set(ports)) >= 98
    assert derive_port("1.0") == 29530  # the same in every process and version


def test_different_jobs_have_different_ids():
    found = [find("slurm"), find("slurm_second_step"), find("slurm_requeued"), find("slurm", SLURM_JOB_ID="2")]
    assert len({node.job_id for node in found}) == len({node.port for node in found}) == 4


def test_it_loads_no_torch_sockets_or_processes():
    script = """
import sys, ptune_dist.cluster.topology
assert not {"torch", "socket", "subprocess"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-S", "-c", script], env=process_env(), check=True)


def find_pbs(hosts: str, host_name: str, **changes: str) -> Topology:
    """A node of PBS that finds itself in a list."""
    variables = {"PBS_JOBID": "1.pbs", "PBS_NODEFILE": "/hosts"} | changes
    return find_topology(variables, lambda _: hosts, host_name)


@pytest.mark.parametrize(
    "hosts, host_name, rank",
    [
        ("n1\nn1\nn2\nn2\n", "n2", 1),
        ("n1\nn2\nn1\nn2\n", "n2.example.org", 1),  # round robin
        ("n1.example.org\nn2.example.org\n", "N2", 1),
        ("  n1  \r\n n2 \r\n\r\n", "n2", 1),
        ("10.0.0.1\n10.0.0.2\n", "10.0.0.2", 1),
        ("fe80::1\nfe80::2\n", "fe80::2", 1),
        ("n1\nn11\nn111\n", "n11", 1),
        ("gpu-1.a\ngpu-1.b\n", "gpu-1.b", 1),
    ],
)
def test_a_host_finds_itself_by_any_of_its_names(hosts: str, host_name: str, rank: int):
    assert find_pbs(hosts, host_name).node_rank == rank


@pytest.mark.parametrize(
    "hosts, host_name", [("10.0.0.1\n10.0.0.2\n", "10.0.0.3"), ("a.x\na.y\n", "a.z"), ("a.x\na.y\n", "a")]
)
def test_a_host_that_may_be_none_or_several_is_refused(hosts: str, host_name: str):
    with pytest.raises(UserError, match="none of them is this one"):
        find_pbs(hosts, host_name)


def test_mpiexec_on_a_part_of_the_hosts_makes_a_job_of_these():
    hosts = "n1\nn2\nn3\nn4\n"
    for rank in range(2):
        found = find_pbs(hosts, f"n{rank + 2}", PMI_RANK=str(rank), PMI_SIZE="2", MPI_LOCALNRANKS="1")
        assert (found.num_nodes, found.node_rank, found.head, found.node_names) == (2, rank, "n2", ("n2", "n3"))
    with pytest.raises(UserError, match="PMI_SIZE=3 .pbs., but PBS_NODEFILE lists 4 hosts: start one process on each"):
        find_pbs(hosts, "n1", PMI_RANK="2", PMI_SIZE="3")


@pytest.mark.parametrize("name, value", [("SM_HOSTS", '["algo-1", "algo-2"]'), ("JSM_NAMESPACE_SIZE", "2")])
def test_what_counts_several_hosts_is_refused_where_no_rank_is_known(name: str, value: str):
    with pytest.raises(UserError, match=f"{name}=2 .environment., but no variable tells which node this is"):
        find_topology({name: value})
    assert find_topology({"SM_HOSTS": '["algo-1"]'}).num_nodes == 1
