"""The files through which a launcher and its ranks communicate."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptune_dist.cluster.outcome import Outcome
from ptune_dist.cluster.rank_files import (
    Heartbeat,
    HeartbeatFile,
    create_node_folder,
    is_stop_requested,
    node_folder,
    read_heartbeats,
    read_outcomes,
    request_stop,
    stack_file,
    write_outcome,
)
from tests.processes import process_env


def test_the_latest_heartbeat_of_each_rank_is_read(tmp_path: Path):
    first = HeartbeatFile(tmp_path, 3)
    second = HeartbeatFile(tmp_path, 12)
    assert read_heartbeats(tmp_path) == []  # none has been written
    second.write(0, 600)
    first.write(1, 60)
    first.write(2, 60)
    (beat, other) = read_heartbeats(tmp_path)
    assert (beat.rank, beat.pid, beat.step) == (3, os.getpid(), 2)
    assert beat.at == pytest.approx(time.monotonic(), abs=5) and beat.deadline == beat.at + 60
    assert (other.rank, other.step, other.deadline - other.at) == (12, 0, 600)


def test_a_truncated_heartbeat_is_ignored(tmp_path: Path):
    (tmp_path / "rank-00000.beat").write_bytes(b"\x01" * 31)
    assert read_heartbeats(tmp_path) == []


def test_a_heartbeat_costs_microseconds(tmp_path: Path):
    file = HeartbeatFile(tmp_path, 0)
    began = time.perf_counter()
    for step in range(1000):
        file.write(step, 60)
    assert time.perf_counter() - began < 0.5
    assert [beat.step for beat in read_heartbeats(tmp_path)] == [999]


def test_a_heartbeat_has_32_bytes(tmp_path: Path):
    HeartbeatFile(tmp_path, 0).write(1, 1)
    assert (tmp_path / "rank-00000.beat").stat().st_size == 32
    assert isinstance(read_heartbeats(tmp_path)[0], Heartbeat)


def test_a_half_written_heartbeat_is_never_seen(tmp_path: Path):
    """By another process: a launcher that read a zero would end a healthy job."""
    script = (
        "import sys, pathlib\nfrom ptune_dist.cluster.rank_files import HeartbeatFile\n"
        "file = HeartbeatFile(pathlib.Path(sys.argv[1]), 0)\n"
        "while True:\n    file.write(3, 5.0)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=process_env())
    try:
        give_up_at = time.monotonic() + 20
        while not read_heartbeats(tmp_path):
            assert time.monotonic() < give_up_at
        for _ in range(10_000):
            (beat,) = read_heartbeats(tmp_path)
            assert beat.pid == writer.pid and beat.step == 3 and beat.deadline > beat.at > 1
    finally:
        writer.kill()
        writer.wait()


def test_outcomes_are_read_in_the_order_in_which_they_were_written(tmp_path: Path):
    for rank, kind in ((2, "error"), (0, "lost"), (1, "lost")):
        write_outcome(tmp_path, Outcome(kind, f"of rank {rank}: ä", rank, "n0"))
        time.sleep(0.02)
    assert list(read_outcomes(tmp_path)) == [2, 0, 1]
    assert read_outcomes(tmp_path)[2] == Outcome("error", "of rank 2: ä", 2, "n0")
    assert not list(tmp_path.glob(".*"))


def test_a_request_to_stop_is_a_file(tmp_path: Path):
    assert not is_stop_requested(tmp_path)
    request_stop(tmp_path)
    request_stop(tmp_path)
    assert is_stop_requested(tmp_path)


def test_without_a_launcher_there_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PTUNE_NODE_FOLDER", raising=False)
    assert node_folder() is None
    monkeypatch.setenv("PTUNE_NODE_FOLDER", "")
    assert node_folder() is None
    monkeypatch.setenv("PTUNE_NODE_FOLDER", str(tmp_path))
    assert node_folder() == tmp_path
    assert stack_file(tmp_path, 7).name == "rank-00007.txt"


def test_only_the_folders_of_dead_launchers_are_removed(tmp_path: Path):
    dead, dead_claim = create_node_folder(tmp_path)
    (dead / "rank-00000.beat").touch()
    dead_claim.close()  # as the kernel does
    living, living_claim = create_node_folder(tmp_path)
    assert not dead.exists()
    own, own_claim = create_node_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, own])
    living_claim.close()
    own_claim.close()
