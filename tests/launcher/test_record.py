"""What launchers record of a run that one job trains, or that nodes train as replicas."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome
from ptune_dist.cluster.record import Record, ReplicaRecord, read_node_statuses
from ptune_dist.common.locks import Attendance, is_locked_alone, try_lock, try_shared_lock
from ptune_dist.run.status import mark_running, read_status

KILLED = Outcome("killed", "rank 0 on node a was killed", 0, "a")


def status_of(run_dir: Path, *keys: str) -> tuple:
    status = read_status(run_dir)
    return tuple(status[key] for key in keys or ("state", "restarts", "idle_starts"))


def test_only_the_first_of_several_replicas_counts_a_start_of_the_run(tmp_path: Path):
    a, b = (ReplicaRecord(tmp_path, "7.0", name) for name in "ab")
    assert a.begin(in_place=False) == ""
    assert status_of(tmp_path) == ("starting", 0, 0)
    mark_running(tmp_path)
    assert b.begin(in_place=False) == f"node b joins the nodes that train {tmp_path}"
    assert status_of(tmp_path) == ("running", 0, 0)
    assert {name: status_of(tmp_path / "launchers" / name) for name in "ab"} == {
        "a": ("starting", 0, 0),
        "b": ("starting", 0, 0),
    }


def test_what_happens_to_one_node_is_its_own_as_long_as_others_train(tmp_path: Path):
    a, b = (ReplicaRecord(tmp_path, "7.0", name) for name in "ab")
    a.begin(in_place=False)
    b.begin(in_place=False)
    mark_running(tmp_path)
    a.end(KILLED)
    a.begin(in_place=True)
    a.end(KILLED)
    assert a.close(KILLED) == "node a has left; the other nodes continue" and not a.is_last
    assert status_of(tmp_path) == ("running", 0, 0)
    assert status_of(tmp_path / "launchers" / "a", "state", "reason", "restarts") == ("failed", KILLED.reason, 1)
    b.end(Outcome(STOPPED, "on request"))
    assert b.close(Outcome(STOPPED, "on request")) == "" and b.is_last
    assert status_of(tmp_path, "state", "reason") == ("stopped", "on request")
    assert [status["kind"] for status in read_node_statuses(tmp_path)] == ["killed", "stopped"]


def test_a_restart_of_the_only_node_is_one_of_the_run(tmp_path: Path):
    a = ReplicaRecord(tmp_path, "7.0", "a")
    a.begin(in_place=False)
    a.end(KILLED)
    assert status_of(tmp_path, "state", "kind", "node") == ("failed", "killed", "a")
    a.begin(in_place=True)
    assert status_of(tmp_path) == ("starting", 1, 0)
    b = ReplicaRecord(tmp_path, "8.0", "b")
    assert "joins" in b.begin(in_place=False)  # it may, after the other has looked whether it is alone


def test_a_node_that_fails_after_the_run_is_done_does_not_undo_that(tmp_path: Path):
    a, b = (ReplicaRecord(tmp_path, "7.0", name) for name in "ab")
    a.begin(in_place=False)
    b.begin(in_place=False)
    a.end(Outcome(DONE))
    a.close(Outcome(DONE))
    assert status_of(tmp_path, "state") == ("starting",)  # b is still there
    Record(tmp_path, "7.0").end(Outcome(DONE))  # as the ranks do
    b.end(KILLED)
    b.close(KILLED)
    assert status_of(tmp_path, "state") == ("done",)
    assert status_of(tmp_path / "launchers" / "b", "state") == ("failed",)


def test_the_next_start_after_all_have_died_is_counted(tmp_path: Path):
    a = ReplicaRecord(tmp_path, "7.0", "a")
    a.begin(in_place=False)
    a._others.leave()  # its process is killed
    again, b = ReplicaRecord(tmp_path, "7.0", "a"), ReplicaRecord(tmp_path, "7.0", "b")
    again.begin(in_place=False)
    b.begin(in_place=False)
    assert status_of(tmp_path) == ("starting", 1, 1)
    assert status_of(tmp_path / "launchers" / "a") == ("starting", 1, 1)


def test_replicas_are_kept_out_by_a_run_of_one_world_alone(tmp_path: Path):
    one_world, replica = Record(tmp_path, "7"), ReplicaRecord(tmp_path, "8", "a")
    assert not one_world.is_held() and not replica.is_held()
    with try_lock(tmp_path / ".lock"):
        assert one_world.is_held() and replica.is_held()
    with try_shared_lock(tmp_path / ".lock"):
        assert one_world.is_held() and not replica.is_held()
    assert not is_locked_alone(tmp_path / "none")


@pytest.fixture
def hall(tmp_path: Path) -> Iterator[list[Attendance]]:
    with ExitStack() as stack:
        found = [Attendance(tmp_path / "lock") for _ in range(3)]
        for one in found:
            stack.callback(one._file.close)
        yield found


def test_of_several_that_enter_one_is_first_and_of_those_that_leave_one_is_last(hall: list[Attendance]):
    a, b, c = hall
    assert a.enter() and a.is_alone()
    a.settle()
    assert not b.enter() and not c.enter() and not a.is_alone()
    assert not b.leave() and not a.leave() and c.is_alone()
    assert c.leave()


def test_a_disk_without_locks_makes_each_the_only_one(hall: list[Attendance], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert hall[0].enter() and hall[1].enter() and hall[0].is_alone() and hall[0].leave()
