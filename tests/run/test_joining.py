"""A node whose folder holds more of the run than the others have does not throw that away."""

import threading

import pytest

from ptune_dist.errors import UserError
from ptune_dist.nodes.agreement import OwnReport
from ptune_dist.nodes.group import GroupSettings, NodeGroup
from ptune_dist.run.checkpoint import Snapshot, save_checkpoint
from ptune_dist.run.joining import enter_first


@pytest.fixture
def settings(tmp_path):
    return lambda name: GroupSettings(
        name, tmp_path / "nodes", "a secret of the tests", folder=name, listen="127.0.0.1:0", advertise=""
    )


@pytest.fixture
def others(settings):
    """A node that trains alone, until the test ends."""
    ended = threading.Event()

    def train() -> None:
        with NodeGroup(settings("a"), print) as group:
            group.enter(1)
            founded.set()
            step = 1
            while not ended.is_set():
                ranges = group.begin_step(step, lambda: b"state", ended.is_set)
                group.deliver(step, dict.fromkeys(ranges, b"sum"), OwnReport(seconds=0.1))
                while not (todo := group.wait(step)).is_complete:
                    group.deliver(step, dict.fromkeys(todo.redo, b"sum"))
                group.end_step(step)
                step += 1
                ended.wait(0.05)

    founded = threading.Event()
    thread = threading.Thread(target=train)
    thread.start()
    assert founded.wait(30)
    yield thread
    ended.set()
    thread.join()


def test_a_node_does_not_join_others_that_are_behind_its_own_folder(settings, others, tmp_path):
    def enter(group: NodeGroup):
        return group.enter(1)

    run_dir = tmp_path / "run"
    save_checkpoint(run_dir / "checkpoints", Snapshot(100_000, {}, {}), keep=1)
    before = sorted(run_dir.rglob("*"))
    with NodeGroup(settings("b"), print) as group:
        with pytest.raises(UserError, match="holds a checkpoint of step 100000, and the nodes that train now are at "):
            enter_first(group, enter, run_dir, sync_every=1)
    assert sorted(run_dir.rglob("*")) == before
    with NodeGroup(settings("c"), print) as group:  # the others have continued
        assert enter_first(group, enter, tmp_path / "empty", sync_every=1).snapshot == b"state"
        group.leave()
