"""A node that waits to join: what it tells of the reason, and how it ends."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from ptune_dist.nodes.group import GroupSettings, NodeGroup, StoppedWaiting

SECRET = "a secret of the tests"


@contextmanager
def node(name: str, folder: Path, **settings):
    """A node in this process, and what it has told."""
    lines: list[str] = []
    settings = {"secret": SECRET, "listen": "127.0.0.1:0", "rendezvous": folder} | settings
    with NodeGroup(GroupSettings(name, **settings), lines.append) as group:
        yield group, lines


def test_a_spare_that_is_asked_to_stop_leaves_without_having_joined(tmp_path):
    with node("a", tmp_path, max_nodes=1) as (first, _), node("b", tmp_path, max_nodes=1) as (spare, lines):
        first.enter(1)
        with pytest.raises(StoppedWaiting):
            spare.enter(1, lambda: any("waits as a spare" in line for line in lines))
        spare.leave()
        assert lines[-1] == "node b stopped while waiting to join"
        assert len(first.view.members) == 1
