"""A short run of the soak test in soak.py."""

import os
import shutil

import pytest

from tests.replicas.hosts import Hosts
from tests.replicas.soak import Soak

KINDS = ["stall", "kill", "join", "long cut", "leave", "join"]


@pytest.mark.extended
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2")
def test_a_few_random_events_leave_no_trace(tmp_path):
    with Hosts({"a": 1, "b": 1, "c": 2}) as hosts:
        soak = Soak(tmp_path, hosts, KINDS, num_steps=80, seed=1)
        assert soak.run_all()["is_bitwise"]
    assert [event.kind for event in soak.events] == KINDS
    assert len(soak.ended) == 5  # nobody was started again but for the two that joined
    assert sum(node.num_begun for node in soak.ended) == 1  # the group has never ended
