"""The Slurm cluster that tests share. If it cannot be started, the tests are skipped, naming what is missing."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster

NEEDED = ["slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = find_missing()
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("cluster")
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"a test cluster needs {missing} (tests/cluster/install.sh)"))


def find_missing() -> str:
    missing = [command for command in NEEDED if not shutil.which(command)]
    if os.geteuid() != 0:
        missing.insert(0, "root")
    return ", ".join(missing)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for all tests of a pytest worker."""
    with Cluster(tmp_path_factory.mktemp("cluster"), num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def restored_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test is affected by the faults or the jobs of another, even if that one failed."""
    if "cluster" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("cluster").restored():
        yield
