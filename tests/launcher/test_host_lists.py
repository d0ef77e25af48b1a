"""Lists of host names as Slurm and Open MPI write them."""

import pytest

from ptune_dist.cluster.host_lists import expand_hostlist, first_host
from ptune_dist.errors import UserError


# As `scontrol show hostnames` of Slurm 22.05.8 prints them; the last is known to newer versions only.
@pytest.mark.parametrize(
    "hostlist, names",
    [
        (
            "n[0-2,5],gpu-[001-003]-ib[0-1],login",
            "n0 n1 n2 n5 gpu-001-ib0 gpu-001-ib1 gpu-002-ib0 gpu-002-ib1 gpu-003-ib0 gpu-003-ib1 login",
        ),
        ("n01", "n01"),
        ("n[5]", "n5"),
        ("n[09-11]", "n09 n10 n11"),
        ("n[098-102]", "n098 n099 n100 n101 n102"),
        ("a,b,c", "a b c"),
        ("rack[1-2]n[01-02]", "rack1n01 rack1n02 rack2n01 rack2n02"),
        ("a[1-2],a[2-3]", "a1 a2 a2 a3"),
        ("n[1-2][3-4]", "n13 n14 n23 n24"),
        ("n[1-2],,m", "n1 n2 m"),
        ("tux[0-1].cluster", "tux0.cluster tux1.cluster"),
    ],
)
def test_a_hostlist_expands_as_in_slurm(hostlist: str, names: str):
    assert expand_hostlist(hostlist) == names.split()


# scontrol rejects those with balanced brackets as well.
@pytest.mark.parametrize("hostlist", ["n[2-1]", "n[a-b]", "n[]", "n[1,,2]", "n[0-9999999]", "n[1-2", "n]1[", "n[[1]]"])
def test_an_invalid_hostlist_is_a_mistake(hostlist: str):
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST"):
        expand_hostlist(hostlist, "SLURM_JOB_NODELIST")


def test_the_first_host_of_a_hostfile():
    assert first_host("# written by the operator\n\nnode-a slots=2  # the first\nnode-b slots=2\n") == "node-a"
    assert first_host("# none\n\n") is None
