"""A job of several hosts that trains on one of them gets a warning, under each scheduler."""

import pytest

from ptune_dist.cluster.allocation import describe_idle_hosts
from ptune_dist.cluster.topology import describe_unknown_scheduler, find_topology
from ptune_dist.errors import UserError

TWO = "n1 slots=4\nn1\nn2\n"
ONE = "n1\nn1\n"
SEVERAL = [
    {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"},
    {"SLURM_JOB_ID": "1", "SLURM_NNODES": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"},
    {"PBS_JOBID": "1", "PBS_NODEFILE": "two"},
    {"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "n1 4 n2 4"},
    {"LSB_JOBID": "1", "LSB_DJOB_HOSTFILE": "two"},
    {"JOB_ID": "1", "NHOSTS": "2", "PE_HOSTFILE": "missing"},
    {"OAR_JOB_ID": "1", "OAR_NODEFILE": "two"},
    {"PJM_JOBID": "1", "PJM_NODEINF": "two"},
    {"PJM_JOBID": "1", "PJM_NODE": "2"},
    {"LOADL_STEP_ID": "1", "LOADL_PROCESSOR_LIST": "n1 n1 n2"},
]
NOT_SEVERAL = [
    {},
    {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1"},
    {"SLURM_JOB_ID": "1", "SLURM_NNODES": "4", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "1"},
    {"PBS_JOBID": "1", "PBS_NODEFILE": "one"},
    {"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "n1 4"},
    {"OAR_JOB_ID": "1", "OAR_NODEFILE": "one"},
    *(
        {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", **more}
        for more in (
            {"PTUNE_NUM_NODES": "1"},
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        )
    ),
]
NOT_KNOWN = [{"LOADL_STEP_ID": "1"}, {"OAR_JOB_ID": "1"}, {"PJM_JOBID": "1", "PJM_NODEINF": "missing"}]


def read_text(path: str) -> str:
    texts = {"one": ONE, "two": TWO}
    if path not in texts:
        raise FileNotFoundError(path)
    return texts[path]


@pytest.mark.parametrize("variables", SEVERAL)
def test_train_without_the_launcher_names_it_where_a_job_has_several_hosts(variables: dict[str, str]):
    found = describe_idle_hosts(variables, read_text)
    assert "this job has 2 hosts" in found and "launch/run.sh" in found
    assert describe_idle_hosts({**variables, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, read_text) == found


@pytest.mark.parametrize("variables", NOT_SEVERAL)
def test_one_host_is_not_warned_of(variables: dict[str, str]):
    assert describe_idle_hosts(variables, read_text) == ""


@pytest.mark.parametrize("variables", SEVERAL[-4:])
def test_the_launcher_refuses_several_hosts_of_a_scheduler_that_it_does_not_know(variables: dict[str, str]):
    with pytest.raises(UserError, match="2 hosts.*PTUNE_NUM_NODES, PTUNE_NODE_RANK and PTUNE_HEAD_ADDRESS"):
        find_topology(variables, read_text)
    own = {"PTUNE_NUM_NODES": "2", "PTUNE_NODE_RANK": "1", "PTUNE_HEAD_ADDRESS": "n1"}
    assert find_topology(variables | own, read_text).node_rank == 1


@pytest.mark.parametrize("variables", NOT_KNOWN)
def test_a_scheduler_that_does_not_tell_is_a_warning(variables: dict[str, str]):
    assert find_topology(variables, read_text).num_nodes == 1
    assert "PTUNE_NUM_NODES" in describe_unknown_scheduler(variables, read_text)
    assert "not known" in describe_idle_hosts(variables, read_text)


def test_other_machines_are_not_warned_of():
    assert describe_unknown_scheduler({"OAR_NODEFILE": "one"}, read_text) == ""
    assert describe_unknown_scheduler({"PATH": "/bin"}, read_text) == ""
