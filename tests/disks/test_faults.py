"""Runs on disks that lack locks, cannot flush, fail for a moment or for good, or show late what another has written.

The faults are made by a library between Python and the C library (faults.c).
"""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptune_dist.run.checkpoint import list_checkpoints
from tests.commands import Forker
from tests.conftest import TINY
from tests.disks.runs import NUM_STEPS, Disk, files_of, only_error, result_of, steps_of, write_run_config
from tests.durability.trace import build_preloaded

FAILURES = [("ENOSPC", "free some space"), ("EDQUOT", "free some space"), ("EIO", "check the disk")]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("faults")
    forker = Forker(env={"LD_PRELOAD": str(build_preloaded("faults", folder, Path(__file__).parent))})
    yield Disk(folder, forker)
    forker.process.stdin.close()
    forker.process.wait()


@pytest.fixture(scope="module")
def sound(disk: Disk, tmp_path_factory: pytest.TempPathFactory):
    """What the run leaves on a disk without faults."""
    folder = tmp_path_factory.mktemp("sound")
    assert disk.run("train", write_run_config(folder)).code == 0
    return result_of(folder / "run")


def check_same(disk: Disk, sound, folder: Path, **faults: object) -> str:
    """Train with faults: nothing is lost. Returns what was printed."""
    finished = disk.run("train", write_run_config(folder), DISK_ROOT=folder, **faults)
    assert finished.code == 0, finished.err
    assert result_of(folder / "run") == sound and steps_of(folder / "run") == [2, 4, 6]
    assert not [name for name in files_of(folder) if "/." in name and not name.endswith("/.lock")]
    return finished.out


def check_fault(disk: Disk, sound, folder: Path, code: int, parts: tuple[str, ...], **faults: object) -> None:
    """Train with faults in the second checkpoint: one line, the first is kept, and the run can be resumed."""
    first = folder / "run" / "checkpoints" / "step-00000002"
    config = write_run_config(folder)
    second = first.with_name(".writing-step-00000004")
    finished = disk.run("train", config, DISK_ROOT=folder, FAULTS_WHEN=second, **faults)
    only_error(finished, code, str(folder / "run"), *parts)
    assert list_checkpoints(first.parent)[0] == first
    kept = files_of(first)
    again = disk.run("train", config)
    assert again.code == 0, again.err
    assert files_of(first) == kept and result_of(folder / "run") == sound


def test_a_disk_without_locks_or_flushes_that_fails_for_a_moment_costs_nothing(disk: Disk, sound, tmp_path: Path):
    faults = {"FLOCK_ERRNO": errno.EPERM, "FSYNC_ERRNO": errno.EINVAL}
    faults |= {"RENAME_ERRNO": errno.ESTALE, "RENAME_COUNT": 1}
    said = check_same(disk, sound, tmp_path, **faults)
    assert "is on a disk without file locks (Operation not permitted): a lock file is used instead" in said


def test_a_rename_that_was_done_and_reported_as_failed_is_no_loss(disk: Disk, sound, tmp_path: Path):
    when = tmp_path / "run" / "checkpoints"
    check_same(disk, sound, tmp_path, RENAME_ERRNO=errno.EIO, RENAME_COUNT=1, RENAME_DONE=1, FAULTS_WHEN=when)


def test_a_disk_that_fails_to_flush_ends_the_run_in_one_line(disk: Disk, sound, tmp_path: Path):
    parts = ("cannot save the checkpoint of step 4", "Input/output error: check the disk", "step-00000002 is kept")
    check_fault(disk, sound, tmp_path, 1, parts, FSYNC_ERRNO=errno.EIO)


@pytest.mark.extended
def test_a_node_that_sees_files_late_trains_and_evaluates_right(disk: Disk, tmp_path: Path):
    """Its ranks share the token ids, and evaluate a run of which they cannot yet see the config."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((TINY / "data" / "train.jsonl").read_text() * 60)
    results = []
    for late_s in (0, 3):
        folder = tmp_path / f"late-{late_s}"
        run = folder / "disk" / "run"
        config = write_run_config(folder, run, data={"train": str(rows), "validation": None}, evaluate={"every": 0})
        words = [config, f"data.cache_dir={folder}/disk/ids"]
        done = disk.run_ranks("train", *words, DISK_ROOT=folder / "disk", LATE_S=late_s)
        assert [each.code for each in done] == [0, 0], done
        results.append(result_of(run))
    assert results[0] == results[1]
    validation = f"data.validation={TINY}/data/validation.jsonl"
    done = disk.run_ranks("evaluate", run, validation, DISK_ROOT=folder / "disk", LATE_S=late_s)
    assert [each.code for each in done] == [0, 0], done


@pytest.mark.extended
@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_locks(disk: Disk, sound, tmp_path: Path, name: str):
    assert "a lock file is used instead" in check_same(disk, sound, tmp_path, FLOCK_ERRNO=getattr(errno, name))


@pytest.mark.extended
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EACCES"])
def test_locks_that_fail(disk: Disk, sound, tmp_path: Path, name: str):
    config = write_run_config(tmp_path)
    number = getattr(errno, name)
    finished = disk.run("train", config, DISK_ROOT=tmp_path, FLOCK_ERRNO=number)
    only_error(finished, 2 if name == "EACCES" else 1, f"output_dir: {tmp_path}/run: cannot write")
    assert disk.run("train", config).code == 0 and result_of(tmp_path / "run") == sound


@pytest.mark.extended
@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS"])
def test_flushes(disk: Disk, sound, tmp_path: Path, name: str):
    check_same(disk, sound, tmp_path, FSYNC_ERRNO=getattr(errno, name))


@pytest.mark.extended
@pytest.mark.parametrize("name, remedy", FAILURES)
@pytest.mark.parametrize("what", ["FSYNC", "RENAME"])
def test_failures(disk: Disk, sound, tmp_path: Path, what: str, name: str, remedy: str):
    parts = ("cannot save the checkpoint of step 4", remedy, "step-00000002 is kept")
    check_fault(disk, sound, tmp_path, 1, parts, **{f"{what}_ERRNO": getattr(errno, name), "RENAME_COUNT": 10**6})


@pytest.mark.extended
@pytest.mark.parametrize("name", ["ESTALE", "EXDEV", "EIO", "EBUSY"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("place", ["run/.lock", "run/checkpoints", "run/checkpoints/step-00000004"])
def test_moments(disk: Disk, sound, tmp_path: Path, name: str, count: int, place: str):
    number = getattr(errno, name)
    check_same(disk, sound, tmp_path, RENAME_ERRNO=number, RENAME_COUNT=count, FAULTS_WHEN=tmp_path / place)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["FLOCK_ERRNO", "FSYNC_ERRNO", "RENAME_ERRNO"])
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EIO, errno.EPERM, errno.ESTALE])
def test_token_ids_that_cannot_be_kept_are_built_again(disk: Disk, tmp_path: Path, name: str, number: int):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((TINY / "data" / "train.jsonl").read_text() * 60)
    config = write_run_config(tmp_path / "a", data={"train": str(rows), "validation": None}, evaluate={"every": 0})
    assert disk.run("train", config, "data.cache_dir=null").code == 0
    wanted = result_of(tmp_path / "a" / "run")
    for _ in range(2):
        shutil.rmtree(tmp_path / "a" / "run")
        place = {"DISK_ROOT": tmp_path / "ids", name: number, "RENAME_COUNT": 10**6}
        finished = disk.run("train", config, f"data.cache_dir={tmp_path}/ids", **place)
        assert finished.code == 0 and result_of(tmp_path / "a" / "run") == wanted, finished.err
        assert len(finished.err.splitlines()) <= 1
    assert NUM_STEPS == len(wanted[0])
