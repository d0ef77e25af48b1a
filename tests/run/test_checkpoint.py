"""A checkpoint is complete, verified and small; whatever fails, earlier ones are unchanged."""

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ptune_dist.errors import RunFault
from ptune_dist.run import checkpoint
from ptune_dist.run.checkpoint import (
    Snapshot,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    pack_snapshot,
    save_checkpoint,
    unpack_snapshot,
)


def make(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    vectors = torch.randn(5, 7, generator=generator)
    return Snapshot(
        step=step,
        prompt={"virtual_tokens": vectors},
        optimizer={"virtual_tokens.step": torch.tensor(float(step)), "virtual_tokens.exp_avg": vectors.T / 3},
        state={"progress": {"step": step, "train_loss": 0.1 * step, "best": {}}, "base": "abc", "loss_scale": {}},
    )


def same(a: Snapshot, b: Snapshot) -> bool:
    def tensors(snapshot):
        return {("p", k): t for k, t in snapshot.prompt.items()} | {("o", k): t for k, t in snapshot.optimizer.items()}

    x = tensors(a)
    y = tensors(b)
    bits = x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
    return bits and a.step == b.step and a.state == b.state


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's folder of checkpoints with those of steps 10 and 20."""
    for step in (10, 20):
        save_checkpoint(tmp_path / "checkpoints", make(step), keep=5)
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_bit_for_bit(folder):
    assert same(load_checkpoint(folder / "step-00000020"), make(20))
    assert same(load_newest_checkpoint(folder, warn=pytest.fail), make(20))


def test_bfloat16_scalars_and_no_optimizer_state_come_back_too(tmp_path):
    snapshot = Snapshot(3, {"a": torch.tensor(1.5), "b": torch.ones(2, dtype=torch.bfloat16)}, {}, {})
    assert same(load_checkpoint(save_checkpoint(tmp_path, snapshot, keep=1)), snapshot)


def test_no_checkpoint_is_no_error(tmp_path):
    assert load_newest_checkpoint(tmp_path / "none", warn=pytest.fail) is None
    (tmp_path / "checkpoints").mkdir()
    assert load_newest_checkpoint(tmp_path / "checkpoints", warn=pytest.fail) is None


def test_files_are_safetensors_and_json_of_the_prompts_size(folder):
    files = {path.name: path.read_bytes() for path in (folder / "step-00000020").iterdir()}
    assert set(files) == {"prompt.safetensors", "optimizer.safetensors", "state.json"}
    json.loads(files["state.json"])
    for name in ("prompt", "optimizer"):  # a safetensors file begins with its header's length and the header, JSON
        data = files[f"{name}.safetensors"]
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert sum(map(len, files.values())) < 2000


def test_the_last_few_are_kept(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_a_checkpoint_of_a_step_that_is_there_already_takes_its_place(folder):
    damaged = folder / "step-00000020" / "prompt.safetensors"
    damaged.write_bytes(b"")
    save_checkpoint(folder, make(20), keep=5)
    assert names(folder) == ["step-00000010", "step-00000020"]
    assert same(load_newest_checkpoint(folder, warn=pytest.fail), make(20))


def test_what_a_killed_writer_left_is_not_read_and_goes_with_the_next_save(folder):
    for leftover in (".writing-step-00000030", ".old-step-00000005"):
        shutil.copytree(folder / "step-00000010", folder / leftover)
    assert load_newest_checkpoint(folder, warn=pytest.fail).step == 20
    save_checkpoint(folder, make(30), keep=5)
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_writer_that_was_frozen_while_another_node_saved_the_same_step_keeps_what_is_there(
    folder, monkeypatch, moment
):
    write_files = checkpoint.write_snapshot

    def freeze(temporary: Path, snapshot: Snapshot) -> None:
        monkeypatch.setattr(checkpoint, "write_snapshot", write_files)
        if moment == "after":
            write_files(temporary, snapshot)
        save_checkpoint(folder, make(30), keep=5, may_be_late=True)
        if moment == "before":
            write_files(temporary, snapshot)

    monkeypatch.setattr(checkpoint, "write_snapshot", freeze)
    save_checkpoint(folder, make(30), keep=5, may_be_late=True)
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]
    assert same(load_newest_checkpoint(folder, warn=pytest.fail), make(30))


def test_a_writer_whose_files_are_gone_without_another_fails_after_a_moment(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "OTHER_WRITER_S", 0.3)
    monkeypatch.setattr(checkpoint, "write_snapshot", lambda temporary, snapshot: temporary.rmdir())
    with pytest.raises(RunFault, match="cannot save the checkpoint of step 30: .*No such file.*step-00000020 is kept"):
        save_checkpoint(folder, make(30), keep=5, may_be_late=True)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) - 12] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace_by_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = [truncate, flip_one_bit, empty, replace_by_zeros, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["prompt.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(folder, damage, name):
    damage(folder / "step-00000020" / name)
    warnings = []
    assert same(load_newest_checkpoint(folder, warnings.append), make(10))
    (warning,) = warnings
    assert str(folder / "step-00000020" / name) in warning and "\n" not in warning
    assert warning.endswith("; using the previous checkpoint")


def test_a_state_that_was_edited_is_damage(folder):
    file = folder / "step-00000020" / "state.json"
    state = json.loads(file.read_text())
    state["progress"]["train_loss"] = 0.0
    file.write_text(json.dumps(state))
    assert load_newest_checkpoint(folder, lambda _: None).step == 10


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{}"])
def test_a_state_that_is_other_json_is_damage(folder, content):
    (folder / "step-00000020" / "state.json").write_text(content)
    assert load_newest_checkpoint(folder, lambda _: None).step == 10


def test_if_all_are_damaged_the_run_does_not_start_over(folder):
    for step in (10, 20):
        truncate(folder / f"step-{step:08d}" / "prompt.safetensors")
    warnings = []
    with pytest.raises(RunFault, match="all checkpoints are damaged"):
        load_newest_checkpoint(folder, warnings.append)
    assert [warning.rpartition("; ")[2] for warning in warnings] == [
        "using the previous checkpoint",
        "there is no previous checkpoint",
    ]
    assert names(folder) == ["step-00000010", "step-00000020"]


def test_a_newer_damaged_checkpoint_does_not_push_out_the_sound_one_just_saved(folder):
    truncate(folder / "step-00000020" / "prompt.safetensors")  # the run resumed from step 10 and is stopped at 15
    assert save_checkpoint(folder, make(15), keep=1).is_dir()
    assert load_newest_checkpoint(folder, lambda _: None).step == 15


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writes beyond so many bytes fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_saved", [0, 1, 3])
def test_a_save_that_fails_names_the_newest_checkpoint_that_is_kept(tmp_path, num_saved):
    for step in range(1, num_saved + 1):
        save_checkpoint(tmp_path, make(step), keep=5)
    with files_of_at_most(100), pytest.raises(RunFault) as caught:
        save_checkpoint(tmp_path, make(9), keep=5)
    newest = tmp_path / f"step-{num_saved:08d}"
    assert str(caught.value) == (
        f"cannot save the checkpoint of step 9: {tmp_path}/step-00000009: File too large; "
        + (f"{newest} is kept" if num_saved else "there is no earlier checkpoint")
    )
    assert len(names(tmp_path)) == num_saved


def test_a_save_that_fails_does_not_name_a_later_damaged_checkpoint(folder):
    truncate(folder / "step-00000020" / "prompt.safetensors")  # the run resumed from step 10
    with files_of_at_most(100), pytest.raises(RunFault, match="step-00000010 is kept$"):
        save_checkpoint(folder, make(15), keep=5)


def test_where_no_folder_can_be_made_the_save_fails_in_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFault, match="cannot save the checkpoint of step 9: .*: a folder is needed"):
        save_checkpoint(tmp_path / "run" / "checkpoints", make(9), keep=5)


def test_leftovers_that_cannot_be_deleted_do_not_stop_a_save(folder):
    leftover = folder / ".old-step-00000005"
    leftover.symlink_to(folder / "step-00000010")  # which shutil.rmtree refuses
    save_checkpoint(folder, make(30), keep=5)
    assert load_newest_checkpoint(folder, warn=pytest.fail).step == 30
    assert leftover.is_symlink() and same(load_checkpoint(folder / "step-00000010"), make(10))


@pytest.mark.parametrize("name", ["prompt.safetensors", "optimizer.safetensors", "state.json"])
def test_a_save_that_fails_in_whichever_file_says_so_and_leaves_what_was(folder, name):
    sizes = {path.name: path.stat().st_size for path in (folder / "step-00000020").iterdir()}
    assert list(sizes) and sizes["prompt.safetensors"] < sizes["optimizer.safetensors"] < sizes["state.json"]
    with files_of_at_most(sizes[name] - 20), pytest.raises(RunFault) as caught:
        save_checkpoint(folder, make(30), keep=1)
    line = str(caught.value)
    assert "cannot save the checkpoint of step 30" in line and "File too large" in line and "\n" not in line
    assert f"{folder / 'step-00000020'} is kept" in line
    assert names(folder) == ["step-00000010", "step-00000020"]
    assert same(load_newest_checkpoint(folder, warn=pytest.fail), make(20))


def write_checkpoints(folder: Path, first: int, said: int) -> None:
    """Save one after another, and write the number of each that is saved, until killed."""
    for step in itertools.count(first):
        save_checkpoint(folder, make(step), keep=2)
        os.write(said, f"{step}\n".encode())


def test_a_writer_killed_at_any_moment_leaves_a_sound_newest_checkpoint(tmp_path):
    step = 1
    for number in range(3):
        reader, said = os.pipe()
        writer = multiprocessing.get_context("fork").Process(target=write_checkpoints, args=(tmp_path, step, said))
        writer.start()
        os.close(said)
        with open(reader) as lines:
            saved = [int(lines.readline())]
            time.sleep(0.05 + 0.017 * number)
            writer.kill()
            saved += map(int, lines.read().split())
        writer.join()
        found = load_newest_checkpoint(tmp_path, warn=pytest.fail)
        assert found.step >= max(saved) and same(found, make(found.step))
        assert len(list_checkpoints(tmp_path)) in (1, 2, 3)
        step = found.step + 1


def test_a_snapshot_travels_as_bytes_and_damage_is_found(tmp_path):
    snapshot = Snapshot(3, {"a/x": torch.arange(3.0)}, {"a/x.step": torch.tensor(2.0)}, {"progress": {"step": 3}})
    packed = pack_snapshot(snapshot)
    found = unpack_snapshot(packed)
    assert (found.step, found.state) == (3, {"progress": {"step": 3}})
    assert torch.equal(found.prompt["a/x"], torch.arange(3.0)) and found.optimizer["a/x.step"] == 2.0
    with pytest.raises(ValueError, match="damaged"):
        unpack_snapshot(packed.replace(b'"step": 3', b'"step": 4'))


def test_a_node_that_is_late_replaces_and_deletes_nothing_that_is_sound(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, Snapshot(step, {"x": torch.tensor([float(step)])}, {}), keep=4)
    save_checkpoint(tmp_path, Snapshot(2, {"x": torch.tensor([9.0])}, {}), keep=1, may_be_late=True)
    assert load_checkpoint(tmp_path / "step-00000002").prompt["x"] == 2.0
    (tmp_path / "step-00000003" / "prompt.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, Snapshot(3, {"x": torch.tensor([3.0])}, {}), keep=1, may_be_late=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
