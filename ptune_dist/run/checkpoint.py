"""Checkpoints of a run: the prompt, the optimizer's state and the progress, but never the base.

A checkpoint is a folder `step-00000100/` with two safetensors files and `state.json`, which contains their digests and
its own. It is written under a temporary name, flushed and renamed, so a kill at any moment leaves the earlier ones
intact.
"""

import contextlib
import errno
import hashlib
import io
import json
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ptune_dist.common.files import explain, make_folder, sync_folder, try_again, write_durably
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.folder import list_checkpoints

TENSOR_FILES = ("prompt", "optimizer")
OF_TWO_WRITERS = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)  # another node has saved the same step at this moment
OTHER_WRITER_S = 10.0
LEFTOVER_AGE_S = 600.0


@dataclass
class Snapshot:
    """Everything that a run needs to resume exactly."""

    step: int
    prompt: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, snapshot: Snapshot, *, keep: int, may_be_late: bool = False) -> Path:
    """Write one checkpoint, then delete all but the newest `keep`. Called by one rank.

    `may_be_late`: another node may have saved this step, or a later one, since: what is sound there is kept.

    Raises RunFault if it cannot be written. Earlier checkpoints are kept until the new one is complete.
    """
    final = folder / f"step-{snapshot.step:08d}"
    temporary = folder / f".writing-{final.name}{f'-{secrets.token_hex(4)}' if may_be_late else ''}"
    others_age_s = LEFTOVER_AGE_S if may_be_late else 0.0

    if may_be_late and is_sound(final):
        return final

    def write() -> None:
        remove_leftovers(folder, others_age_s)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_snapshot(temporary, snapshot)
        if may_be_late and is_sound(final):  # another node has saved meanwhile
            return shutil.rmtree(temporary, ignore_errors=True)
        if final.exists():  # a damaged one, whose step this run has repeated
            final.rename(folder / f".old-{final.name}")
        temporary.rename(final)

    try:
        make_folder(folder)
        try_again(write)
        sync_folder(folder)
    except OSError as error:
        if may_be_late and error.errno in OF_TWO_WRITERS and wait_until_sound(final):
            return final
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFault(
            f"cannot save the checkpoint of step {snapshot.step}: {final}: {explain(error, folder)}; "
            f"{describe_kept(folder, final)}"
        ) from None
    drop_old_checkpoints(folder, final, keep, drops_later=not may_be_late)
    remove_leftovers(folder, others_age_s)
    return final


def wait_until_sound(path: Path) -> bool:
    """Wait a moment for another node that saves the same step."""
    give_up_at = time.monotonic() + OTHER_WRITER_S
    while not is_sound(path):
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.1)
    return True


def is_sound(path: Path) -> bool:
    """Whether a checkpoint is there and undamaged."""
    try:
        load_checkpoint(path)
    except ValueError:
        return False
    return True


def describe_kept(folder: Path, failed: Path) -> str:
    """Which checkpoint a run continues from, now that one could not be saved: later ones are damaged."""
    with contextlib.suppress(UserError):  # the folder can no longer be read
        kept = [path for path in list_checkpoints(folder) if path < failed]
        return f"{kept[-1]} is kept" if kept else "there is no earlier checkpoint"
    return "earlier checkpoints have not been touched"


def drop_old_checkpoints(folder: Path, newest: Path, keep: int, *, drops_later: bool = True) -> None:
    """Delete all but the `keep` checkpoints up to `newest`.

    With `drops_later`, later ones too: they are damaged, or the run would have used them.

    What cannot be deleted now, another user's say, stays.
    """
    found = list_checkpoints(folder)
    sound = [path for path in found if path <= newest]
    for old in set(found if drops_later else sound) - set(sound[-keep:]):
        with contextlib.suppress(OSError):
            old.rename(folder / f".old-{old.name}")


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write the files of a checkpoint and flush them to disk."""
    for name, data in render_snapshot(snapshot):
        write_durably(folder / name, data)
    sync_folder(folder)


def render_snapshot(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint, with their names."""
    state = {"step": snapshot.step, **snapshot.state, "sha256": {}}
    for name in TENSOR_FILES:
        data = save({k: t.contiguous() for k, t in getattr(snapshot, name).items()})
        yield f"{name}.safetensors", data
        state["sha256"][name] = hashlib.sha256(data).hexdigest()
    yield "state.json", json.dumps(state | {"digest": digest_state(state)}, indent=1).encode()


def pack_snapshot(snapshot: Snapshot) -> bytes:
    """The files of a checkpoint as one text of bytes, for another node."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in render_snapshot(snapshot):
            archive.writestr(name, data)
    return packed.getvalue()


def unpack_snapshot(packed: bytes) -> Snapshot:
    """What `pack_snapshot` was given. Raises ValueError where it is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            return read_snapshot(Path("the state of another node"), lambda file: archive.read(file.name))
    except zipfile.BadZipFile as error:
        raise ValueError(f"the state of another node is damaged: {error}") from None


def digest_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def remove_leftovers(folder: Path, age_s: float) -> None:
    """Delete what a killed writer left behind: `age_s` ago, or another node may be writing it."""
    for leftover in folder.glob(".writing-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime >= age_s:
                shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(".old-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(path: Path) -> Snapshot:
    """Read and verify one checkpoint. Raises ValueError that names the damaged file, UserError for another user's."""
    return read_snapshot(path, read_part)


def read_snapshot(path: Path, read_part: Callable[[Path], bytes]) -> Snapshot:
    """The snapshot in the files of folder `path`, verified. Raises ValueError that names the damaged file."""
    try:
        state = json.loads(read_part(path / "state.json"))
        digest = state.pop("digest")
        if digest != digest_state(state):
            raise ValueError("its content does not match its digest")
        digests = state.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / 'state.json'} is damaged: {error}") from None
    tensors = {}
    for name in TENSOR_FILES:
        file = path / f"{name}.safetensors"
        try:
            data = read_part(file)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != digests.get(name):
            raise ValueError(f"{file} is damaged: its bytes do not match the digest in state.json")
        tensors[name] = load(data)
    return Snapshot(step=state.pop("step"), prompt=tensors["prompt"], optimizer=tensors["optimizer"], state=state)


def read_part(file: Path) -> bytes:
    """The bytes of a checkpoint's file. What this user may not read is not taken for damage. Raises OSError too."""
    try:
        return try_again(file.read_bytes)
    except PermissionError as error:
        raise UserError(f"{file}: {explain(error, file)}: the run cannot be resumed without it") from None


def load_newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest undamaged checkpoint, or None if there are none; `warn` is called for each damaged one.

    Raises RunFault if all are damaged, because starting over must be the user's decision.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            remedy = "using the previous checkpoint" if path != found[0] else "there is no previous checkpoint"
            warn(f"{error}; {remedy}")
    if found:
        raise RunFault(f"{folder}: all checkpoints are damaged: remove the folder to start over")
    return None
