"""A short run of the soak test in soak.py."""

from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster
from tests.cluster.soak import Soak, describe


@pytest.mark.long
@pytest.mark.extended
def test_three_random_faults_leave_no_trace(cluster: Cluster, tmp_path: Path):
    soak = Soak(cluster, tmp_path, num_faults=3, seed=1)
    soak.run_all(max_s=600)
    assert len(soak.faults) == 3
    assert all(fault["steps_lost_beyond_checkpoint"] == 0 for fault in soak.faults)
    assert describe(soak, seed=1, wall_s=0)["num_faults"] == 3
