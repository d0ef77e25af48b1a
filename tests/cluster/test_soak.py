"""The soak of soak.py, in small."""

import pytest

from tests.cluster.runs import only_in_full
from tests.cluster.soak import Soak, describe


@pytest.mark.long
@only_in_full
def test_three_random_faults_leave_no_trace(cluster, tmp_path):
    soak = Soak(cluster, tmp_path, num_faults=3, seed=1)
    soak.soak(most_s=600)
    assert len(soak.faults) == 3
    assert all(fault["steps_lost_beyond_checkpoint"] == 0 for fault in soak.faults)
    assert describe(soak, seed=1, wall_s=0)["num_faults"] == 3
