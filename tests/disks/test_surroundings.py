"""Runs on full and read-only disks, among other users' files, at unusual paths; removed while they train."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.run.folder import check_run_dir, list_checkpoints, lock_run_dir
from tests.commands import shared_forker
from tests.conftest import TINY
from tests.disks.runs import (
    Disk,
    files_of,
    only_error,
    result_of,
    status_of,
    steps_of,
    write_run_config,
)

OTHER = 65534  # user nobody
LONG = "train.max_steps=100000"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("surroundings"), shared_forker())


@pytest.fixture(scope="module")
def sound(disk: Disk, tmp_path_factory: pytest.TempPathFactory):
    """What the run leaves on a sound disk."""
    folder = tmp_path_factory.mktemp("sound")
    assert disk.run("train", write_run_config(folder)).code == 0
    return result_of(folder / "run")


@pytest.fixture
def half(disk: Disk, tmp_path: Path) -> Path:
    """A config whose run has been stopped after its first checkpoint: the disk was too small for more."""
    return stop_half_way(disk, tmp_path)


def stop_half_way(disk: Disk, folder: Path) -> Path:
    config = write_run_config(folder)
    run = folder / "run"
    assert disk.run("train", config).code == 0
    for path in list_checkpoints(run / "checkpoints")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(run / "prompt")
    (run / "summary.json").unlink()
    return config


class Mounted:
    """A file system of its own in memory."""

    def __init__(self, folder: Path, size: str):
        self.folder = folder
        folder.mkdir(parents=True)
        if os.geteuid() or self._call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
            pytest.skip("needs root, and to mount a tmpfs")

    def _call(self, *command: str) -> int:
        return subprocess.run([*command, str(self.folder)], capture_output=True).returncode

    def remount(self, options: str) -> None:
        assert self._call("mount", "-o", f"remount,{options}") == 0

    def remove(self) -> None:
        self._call("umount", "-l")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    """A file system of 10 MiB."""
    found = Mounted(tmp_path / "disk", "10m")
    yield found
    found.remove()


def give(path: Path, mode: int) -> None:
    """Make a file or folder another user's. Skips the test where that needs another user than this one."""
    if os.geteuid():
        pytest.skip("needs root, to make files of another user")
    os.chown(path, OTHER, OTHER)
    path.chmod(mode)


# Full and read-only


# What is on the disk when it is full: nothing, the start of TensorBoard's file, the log, no checkpoint, one, two.
@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[] if size in (8, 44) else pytest.mark.extended) for size in (*range(4, 72, 4),)]
)
def test_a_full_disk(disk: Disk, sound, tmp_path: Path, size: int):
    mounted = Mounted(tmp_path / "disk", f"{size}k")
    try:
        run = mounted.folder / "run"
        config = write_run_config(tmp_path, run)
        error = only_error(
            disk.run("train", config), 1, str(mounted.folder), "No space left on device: free some space"
        )
        kept = steps_of(run)
        kept_files = files_of(run / "checkpoints")
        assert len(kept_files) == 3 * len(kept)
        assert "cannot save the checkpoint" not in error or not kept or f"step-{kept[-1]:08d} is kept" in error
        assert status_of(run)["state"] == "failed" and status_of(run)["step"] == (kept or [0])[-1]
        mounted.remount("size=10m")
        assert disk.run("train", config).code == 0
        assert result_of(run) == sound and steps_of(run) == [2, 4, 6]
        assert files_of(run / "checkpoints").items() >= kept_files.items()
    finally:
        mounted.remove()


def test_a_read_only_disk_is_refused_at_once_unless_the_run_is_finished(disk: Disk, mounted: Mounted, tmp_path: Path):
    run = mounted.folder / "run"
    config = write_run_config(tmp_path, run)
    mounted.remount("ro")
    reason = f"cannot write in {mounted.folder}: Read-only file system: choose a folder on another disk"
    only_error(disk.run("train", config), 2, f"output_dir: {run}: {reason}")
    mounted.remount("rw")
    assert disk.run("train", config).code == 0
    before = files_of(run)
    mounted.remount("ro")
    assert disk.run("train", config).code == 0
    only_error(disk.run("train", config, "train.max_steps=8"), 2, "output_dir", "Read-only file system")
    evaluated = disk.run("evaluate", run)
    only_error(evaluated, 1, f"cannot write {run}/evaluation.json: Read-only file system")
    assert '"loss"' in evaluated.out  # the result is printed all the same
    assert files_of(run) == before


@pytest.mark.extended
def test_a_disk_that_is_filled_while_a_run_trains(disk: Disk, mounted: Mounted, tmp_path: Path):
    run = mounted.folder / "run"
    config = write_run_config(tmp_path, run, evaluate={"every": 0})
    started = disk.start("train", config, LONG, "checkpoint.every=20")
    started.wait_for(run / "metrics.jsonl", 30)
    with open(mounted.folder / "ballast", "wb", buffering=0) as file:
        with pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
    only_error(disk.finish(started), 1, str(run), "No space left on device")
    kept = steps_of(run)
    assert kept and status_of(run)["step"] == kept[-1]
    (mounted.folder / "ballast").unlink()
    last = kept[-1] + 5
    assert disk.run("train", config, LONG, f"train.max_steps={last}").code == 0
    assert [step for step, _ in result_of(run)[0]] == list(range(1, last + 1))


# Other users' files


@pytest.mark.parametrize(
    "mode, reason",
    [
        pytest.param(0o700, "its checkpoints cannot be seen", id="closed"),
        pytest.param(0o733, "its checkpoints cannot be seen", id="unreadable", marks=pytest.mark.extended),
        pytest.param(0o755, "belongs to user nobody): ask for access", id="unwritable"),
    ],
)
def test_checkpoints_of_another_user_are_refused_and_stay(disk: Disk, half: Path, mode: int, reason: str):
    checkpoints = half.parent / "run" / "checkpoints"
    before = files_of(checkpoints)
    give(checkpoints, mode)
    only_error(disk.run_without_rights("train", half), 2, f"{checkpoints}", "Permission denied", reason)
    assert files_of(checkpoints) == before


def test_an_unreadable_checkpoint_is_not_taken_for_a_damaged_one(disk: Disk, half: Path):
    file = half.parent / "run" / "checkpoints" / "step-00000002" / "prompt.safetensors"
    before = files_of(file.parent)
    give(file, 0o600)
    only_error(disk.run_without_rights("train", half), 2, f"{file}: Permission denied", "cannot be resumed without it")
    assert files_of(file.parent) == before


@pytest.mark.extended
@pytest.mark.parametrize("mode", [0o600, 0o644])
@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl", "train.log", "status.json", "tensorboard"])
def test_a_file_of_another_user_is_named_or_no_matter(disk: Disk, sound, half: Path, name: str, mode: int):
    file = half.parent / "run" / name
    give(file, mode | 0o111 if file.is_dir() else mode)
    finished = disk.run_without_rights("train", half)
    if finished.code:
        only_error(finished, finished.code, f"{file}", "Permission denied")
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        assert disk.run_without_rights("train", half).code == 0 or name in ("config.yaml",)
    if name not in ("config.yaml", "metrics.jsonl"):
        assert result_of(half.parent / "run") == sound


@pytest.mark.parametrize("what", ["folder", "below", pytest.param("base", marks=pytest.mark.extended)])
def test_folders_of_another_user_are_one_line(disk: Disk, tmp_path: Path, what: str):
    folder = tmp_path / "theirs"
    (folder / "run").mkdir(parents=True)
    key = "model.path" if what == "base" else "output_dir"
    place = folder if what == "folder" else folder / "run"
    give(folder, 0o700)
    for command in ("train", "validate"):
        finished = disk.run_without_rights(command, write_run_config(tmp_path), f"{key}={place}")
        only_error(finished, 2 if key == "output_dir" else 1, f"{place}", f"{folder} belongs to user nobody")
    if what == "below":
        only_error(
            disk.run_without_rights("evaluate", place), 1, "Permission denied", f"{folder} belongs to user nobody"
        )


def test_the_files_of_a_private_user_are_private_and_complete(disk: Disk, sound, tmp_path: Path):
    assert disk.run_without_rights("train", write_run_config(tmp_path), umask="077").code == 0
    assert result_of(tmp_path / "run") == sound
    assert not [path for path in (tmp_path / "run").rglob("*") if path.stat().st_mode & 0o077]


@pytest.mark.extended
def test_a_sticky_folder_that_users_share(disk: Disk, sound, half: Path):
    run = half.parent / "run"
    give(run, 0o1777)
    assert disk.run_without_rights("train", half).code == 0 and result_of(run) == sound
    give(run / "status.json", 0o644)
    again = disk.run_without_rights("train", half, "train.max_steps=8")
    only_error(again, 1, f"cannot write {run}/status.json: Operation not permitted", "belongs to user nobody")
    assert steps_of(run) == [2, 4, 6]


@pytest.mark.extended
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_unreadable_file_of_the_base_is_one_line(disk: Disk, tmp_path: Path, name: str):
    base = Path(shutil.copytree(TINY / "causal", tmp_path / "base"))
    give(base / name, 0o600)
    finished = disk.run_without_rights("train", write_run_config(tmp_path), f"model.path={base}")
    only_error(finished, 2, "model.path", f"{base}", "Permission denied")


@pytest.mark.extended
def test_an_unreadable_prompt_is_one_line(disk: Disk, tmp_path: Path):
    assert disk.run("train", write_run_config(tmp_path)).code == 0
    file = tmp_path / "run" / "prompt" / "prompt.safetensors"
    give(file, 0o600)
    finished = disk.run_without_rights("generate", tmp_path / "run", "--input", "a")
    only_error(finished, 2, f"{file}: cannot read the prompt: Permission denied", "belongs to user nobody")


# Paths

NAMES = ["a b", 'it\'s "x"', "ünï-日本", "100%d{}", "r[1]*?", "a:b", "line\nbreak", "x" * 240 + "/" + "y" * 240]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if number == 2 else pytest.mark.extended) for number, name in enumerate(NAMES)]
)
def test_unusual_names(disk: Disk, sound, tmp_path: Path, name: str):
    run = tmp_path / name / "run"
    config = write_run_config(tmp_path, run)
    assert disk.run("train", config).code == 0 and result_of(run) == sound
    assert disk.run("train", config).code == 0
    assert disk.run("generate", run, "--input", "a").code == 0


def test_a_run_behind_symbolic_links(disk: Disk, sound, tmp_path: Path):
    run = tmp_path / "run"
    for name in ("real", "else"):
        (tmp_path / name).mkdir()
    run.symlink_to("real")
    (run / "checkpoints").symlink_to("../else")
    config = write_run_config(tmp_path)
    assert disk.run("train", config).code == 0 and result_of(run) == sound
    assert steps_of(tmp_path / "else") == [] and len(list((tmp_path / "else").iterdir())) == 3


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
@pytest.mark.parametrize("kind", ["dangling", "loop", "file"])
def test_what_is_no_folder_is_refused_before_training(tmp_path: Path, name: str, kind: str):
    config = load_config(write_run_config(tmp_path))
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("") if kind == "file" else place.symlink_to("none" if kind == "dangling" else place.name)
    with pytest.raises(UserError, match=f"output_dir: {tmp_path}/run.*: (a symbolic link to |.*a folder is needed)"):
        check_run_dir(config)
        lock_run_dir(config)


def test_a_path_that_is_too_long_is_refused(disk: Disk, tmp_path: Path):
    finished = disk.run("train", write_run_config(tmp_path, tmp_path / ("z" * 300)))
    only_error(finished, 2, "output_dir", "File name too long: choose a shorter path")


# Removed while it trains


def remove(run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)


def rename(run: Path) -> None:
    run.rename(run.with_name("moved"))


def replace(run: Path) -> None:
    remove(run)
    run.mkdir()


def replace_by_file(run: Path) -> None:
    remove(run)
    run.write_text("")


@pytest.mark.parametrize(
    "change",
    [
        remove,
        *[pytest.param(change, marks=pytest.mark.extended) for change in (rename, replace, replace_by_file)],
    ],
)
def test_a_run_whose_folder_is_gone_ends_and_begins_no_other(disk: Disk, tmp_path: Path, change):
    run = tmp_path / "run"
    config = write_run_config(tmp_path, evaluate={"every": 0})
    started = disk.start("train", config, LONG, "checkpoint.every=40")
    started.wait_for(run / "metrics.jsonl", 5)
    change(run)
    began = time.monotonic()
    error = only_error(disk.finish(started), 1, f"{run}")
    assert "was removed or renamed" in error or "Not a directory" in error
    assert time.monotonic() - began < 30
    assert not run.is_dir() or not list_checkpoints(run / "checkpoints") and not (run / "config.yaml").exists()
