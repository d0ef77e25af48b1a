"""What a launcher learns about its ranks from outside."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ptune_dist.cluster import ranks as ranks_module
from ptune_dist.cluster.outcome import Outcome
from ptune_dist.cluster.processes import process_state, wait_until_dead
from ptune_dist.cluster.rank_files import (
    HeartbeatFile,
    mark_begun,
    read_secret,
    stack_file,
    to_file_name,
    write_outcome,
    write_secret,
)
from ptune_dist.cluster.rank_monitor import RankMonitor
from ptune_dist.cluster.ranks import RankLaunch, Ranks, build_environment, copy_lines, wait_until_written
from ptune_dist.cluster.secret import read_variable


def make_launch(folder: Path, num_gpus: int) -> RankLaunch:
    return RankLaunch(["train", "c.yaml"], folder, "7", "n0", 0, 1, 2, num_gpus, "127.0.0.1", 1, "", 1.0)


def test_a_rank_gets_defaults_that_a_users_settings_win_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS", "PTUNE_NUM_GPUS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    env = build_environment(make_launch(tmp_path, num_gpus=2), tmp_path)
    assert [env.get(name) for name in names] == ["expandable_segments:True", None, "4", "2"]
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    for name in names[:2]:  # torch reads both
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:512")
            env = build_environment(make_launch(tmp_path, num_gpus=0), tmp_path)
            other = next(each for each in names[:2] if each != name)
            assert env[name] == "max_split_size_mb:512" and other not in env
            assert (env["TORCHINDUCTOR_COMPILE_THREADS"], env["PTUNE_NUM_GPUS"]) == ("1", "0")


def test_ranks_of_replicas_get_the_number_of_nodes_and_a_file_with_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PTUNE_SECRET", "of the test, for all its nodes")
    launch = make_launch(tmp_path, num_gpus=0)
    assert "PTUNE_EXPECTED_NODES" not in build_environment(launch, tmp_path)
    assert "PTUNE_EXPECTED_NODES" not in build_environment(replace(launch, num_replicas=1), tmp_path)
    env = build_environment(replace(launch, num_replicas=4), tmp_path)
    assert env["PTUNE_EXPECTED_NODES"] == "4" and "PTUNE_SECRET" not in env
    assert not read_secret()
    write_secret(tmp_path, read_variable())
    monkeypatch.delenv("PTUNE_SECRET")
    monkeypatch.setenv("PTUNE_NODE_FOLDER", str(tmp_path))
    assert read_variable() == "of the test, for all its nodes"
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_a_rank_that_may_wait_for_its_gpu_is_not_called_stuck(tmp_path: Path):
    """The main thread is in a backward pass, and the node's launcher knows that the ranks are on GPUs."""
    HeartbeatFile(tmp_path, 3).write(12, 0.0)
    recorded = Path(__file__).parent / "stacks" / "backward.txt"
    stack_file(tmp_path, 3).write_bytes(recorded.read_bytes())
    assert RankMonitor(tmp_path, "n0", 1, 60.0, on_gpu=True).find_stuck() is None
    stuck = RankMonitor(tmp_path, "n0", 1, 60.0, on_gpu=False).find_stuck()
    assert (stuck.kind, stuck.rank) == ("stuck", 3) and "_engine_run_backward (graph.py" in stuck.reason
    stack_file(tmp_path, 3).write_bytes((recorded.parent / "backward_in_a_hook.txt").read_bytes())
    stuck = RankMonitor(tmp_path, "n0", 1, 60.0, on_gpu=True).find_stuck()
    assert stuck.reason.endswith("after step 12, in clip_by_disk (plugin.py, line 18)")


@pytest.mark.parametrize(("num_gpus", "kind"), [(0, "stuck"), (2, None)])
def test_the_launcher_judges_stacks_by_whether_its_node_has_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, kind: str | None
):
    monkeypatch.setattr(ranks_module, "build_torchrun_command", lambda launch, folder: ["sleep", "60"])
    ranks = Ranks(make_launch(tmp_path, num_gpus))
    HeartbeatFile(ranks.folder, 0).write(12, 0.0)
    stack_file(ranks.folder, 0).write_bytes((Path(__file__).parent / "stacks" / "backward.txt").read_bytes())
    stuck = ranks.end(with_stacks=True)
    ranks.remove_folder()
    assert (stuck.kind if stuck else None) == kind


def test_ranks_start_until_the_last_has_loaded_or_one_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks_module, "build_torchrun_command", lambda launch, folder: ["sleep", "60"])
    for record_end in (False, True):
        ranks = Ranks(make_launch(tmp_path, num_gpus=0))
        HeartbeatFile(ranks.folder, 0).write(0, 60.0)
        mark_begun(ranks.folder, 0)
        assert ranks.are_starting()
        if record_end:
            write_outcome(ranks.folder, Outcome("mistake", "m", 1))
        else:
            mark_begun(ranks.folder, 1)
        assert not ranks.are_starting()
        ranks.end(with_stacks=False)
        ranks.remove_folder()


def test_the_state_of_a_process():
    assert process_state(os.getpid()) == "R"
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(ended.pid) == "Z"
    began = time.monotonic()
    wait_until_dead([ended.pid], 60)
    wait_until_dead([os.getpid(), ended.pid], 0.1)
    assert time.monotonic() - began < 30
    ended.wait()
    assert process_state(ended.pid) == ""


def test_a_failing_sink_does_not_stop_the_others(tmp_path: Path):
    broken = open(tmp_path / "broken", "wb")
    broken.close()
    (tmp_path / "source").write_bytes(b"one\ntwo")
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "log", "wb", buffering=0) as log:
        copy_lines(source, broken, log)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo"


def test_files_are_waited_for_until_they_are_written(tmp_path: Path):
    file = tmp_path / "rank-00000.txt"
    file.touch()
    writer = subprocess.Popen(["sh", "-c", f"sleep 0.3; echo stack > {file}"])
    wait_until_written([file], seconds=10)
    assert file.read_text() == "stack\n"
    writer.wait()


@pytest.mark.parametrize(
    ("name", "file"), [("n-1.site", "n-1.site"), ("2 (ip-10-0-0-21)", "2-ip-10-0-0-21"), ("a/b", "a-b")]
)
def test_a_nodes_name_becomes_a_file_name(name: str, file: str):
    assert to_file_name(name) == file
