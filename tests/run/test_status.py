"""status.json tells what a run is doing or why it ended, whatever it contained before."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome
from ptune_dist.errors import RunFault
from ptune_dist.run.status import begin_status, end_status, last_step, mark_running, read_status, update_status


def save(run_dir: Path, step: int) -> None:
    """Create a checkpoint, but only its folder."""
    (run_dir / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def counts(run_dir: Path) -> tuple[int, int, int]:
    status = read_status(run_dir)
    return status["restarts"], status["idle_starts"], status["started_at_step"]


def test_the_whole_life_of_a_run(tmp_path: Path):
    run = tmp_path / "runs" / "a"  # created by begin_status
    begin_status(run, "7.0", in_place=False)
    assert {k: v for k, v in read_status(run).items() if k != "time"} == {
        "state": "starting",
        "step": 0,
        "reason": "",
        "kind": "",
        "node": "",
        "rank": None,
        "job_id": "7.0",
        "restarts": 0,
        "idle_starts": 0,
        "started_at_step": 0,
    }
    mark_running(run)
    assert read_status(run)["state"] == "running"
    save(run, 40)
    end_status(run, Outcome("killed", "rank 1 was killed", 1, "n1"))
    found = read_status(run)
    assert (found["state"], found["step"], found["kind"]) == ("failed", 40, "killed")
    assert (found["reason"], found["node"], found["rank"]) == ("rank 1 was killed", "n1", 1)
    begin_status(run, "7.0", in_place=True)
    found = read_status(run)
    assert (found["state"], found["reason"], found["node"], found["rank"]) == ("starting", "", "", None)
    end_status(run, Outcome(STOPPED, "stopped on request, after saving", 0, "n0"))
    found = read_status(run)
    assert (found["state"], found["node"], found["rank"]) == ("stopped", "", None)
    end_status(run, Outcome(DONE))
    assert read_status(run)["state"] == "done"
    assert [path.name for path in run.iterdir() if path.is_file()] == ["status.json"]


def test_starts_are_counted_as_are_those_that_gained_no_step(tmp_path: Path):
    for expected in [(0, 0, 0), (1, 1, 0), (2, 2, 0)]:
        begin_status(tmp_path, "7", in_place=False)
        assert counts(tmp_path) == expected
    save(tmp_path, 20)
    begin_status(tmp_path, "7", in_place=False)
    assert counts(tmp_path) == (3, 0, 20)
    begin_status(tmp_path, "7", in_place=False)
    assert counts(tmp_path) == (4, 1, 20)


def test_a_restart_in_place_counts_but_not_as_an_idle_start(tmp_path: Path):
    begin_status(tmp_path, "7", in_place=False)
    for number in (1, 2):
        begin_status(tmp_path, "7", in_place=True)
        assert counts(tmp_path) == (number, 0, 0)
    save(tmp_path, 20)
    begin_status(tmp_path, "7", in_place=True)
    assert counts(tmp_path) == (3, 0, 0)  # the start that they belong to was at step 0
    begin_status(tmp_path, "8", in_place=False)
    assert counts(tmp_path) == (4, 0, 20)


@pytest.mark.parametrize("content", ["", '{"state": "runn', "[1]", "null", "\x00"])
def test_an_unreadable_status_is_empty_and_is_replaced(tmp_path: Path, content: str):
    assert read_status(tmp_path) == {}
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) == {}
    begin_status(tmp_path, "7", in_place=False)
    assert counts(tmp_path) == (0, 0, 0)


def test_keys_of_another_version_stay(tmp_path: Path):
    (tmp_path / "status.json").write_text('{"color": "red"}')
    update_status(tmp_path, state="running")
    assert read_status(tmp_path)["color"] == "red"


def test_the_step_is_that_of_the_newest_complete_checkpoint(tmp_path: Path):
    assert last_step(tmp_path) == 0
    for step in (100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000200.writing").mkdir()
    assert last_step(tmp_path) == 100


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; the kernel keeps a page of it for the folder."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


def test_a_full_disk_is_a_fault_at_the_start_and_is_recorded_at_the_end(full_disk: Path):
    begin_status(full_disk, "7", in_place=False)
    before = (full_disk / "status.json").read_bytes()
    fill(full_disk)
    with pytest.raises(RunFault, match=f"cannot write {full_disk}/status.json: No space left on device"):
        begin_status(full_disk, "7", in_place=True)
    assert (full_disk / "status.json").read_bytes() == before
    end_status(full_disk, Outcome("fault", "disk full"))  # in place
    assert read_status(full_disk) == json.loads(before) | {"state": "failed", "kind": "fault", "reason": "disk full"}
    end_status(full_disk / "no-run", Outcome(DONE))  # a file that cannot be written is not a fault of its own
    assert sorted(path.name for path in full_disk.iterdir())[0] == "ballast"
