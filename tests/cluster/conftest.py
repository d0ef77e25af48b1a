"""The Slurm cluster that tests share; where it cannot be started they are skipped, with what is missing."""

import os
import shutil
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster

NEEDED = ["slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare"]


def pytest_collection_modifyitems(items):
    missing = find_missing()
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("cluster")
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"a test cluster needs {missing} (tests/cluster/install.sh)"))


def find_missing() -> str:
    wanted = [] if os.geteuid() == 0 else ["root"]
    return ", ".join(wanted + [command for command in NEEDED if not shutil.which(command)])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """One cluster for all tests of a pytest worker."""
    with Cluster(tmp_path_factory.mktemp("cluster"), num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def restored_cluster(request):
    """No test finds the faults or the jobs of another, be it one that failed."""
    if "cluster" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("cluster").restored():
        yield
