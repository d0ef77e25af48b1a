"""Checkpoints of a run: the prompt, its optimizer's state and the place in the run; never the base.

Floor 5. A checkpoint is a folder `step-00000100/` with two safetensors files and `state.json`, which holds their
digests and its own. It is written aside, flushed and renamed: a kill at any moment leaves the ones before it intact.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ptune_dist.common.files import sync_folder, write_durably
from ptune_dist.errors import RunFault
from ptune_dist.run.folder import list_checkpoints

TENSOR_FILES = ("prompt", "optimizer")


@dataclass
class Snapshot:
    """All that a run needs to go on exactly."""

    step: int
    prompt: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write one checkpoint and drop all but the newest `keep`. One rank calls. Raises RunFault when it cannot be saved.

    What stood before is untouched until the new one is complete.
    """
    final = folder / f"step-{snapshot.step:08d}"
    aside = folder / f".writing-{final.name}"
    try:
        remove_leftovers(folder)
        aside.mkdir(parents=True)
        write_snapshot(aside, snapshot)
        if final.exists():  # a damaged one that this run has come past again
            final.rename(folder / f".old-{final.name}")
        aside.rename(final)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        kept = list_checkpoints(folder)
        rest = f"{kept[-1]} is kept" if kept else "there was none before it"
        raise RunFault(
            f"cannot save the checkpoint of step {snapshot.step}: {error.strerror}: {final}; {rest}"
        ) from None
    sound = [path for path in list_checkpoints(folder) if path <= final]  # newer ones were damaged, or we had used them
    for old in set(list_checkpoints(folder)) - set(sound[-keep:]):
        old.rename(folder / f".old-{old.name}")
    remove_leftovers(folder)
    return final


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    state = {"step": snapshot.step, **snapshot.state, "sha256": {}}
    for name in TENSOR_FILES:
        data = save({k: t.contiguous() for k, t in getattr(snapshot, name).items()})
        write_durably(folder / f"{name}.safetensors", data)
        state["sha256"][name] = hashlib.sha256(data).hexdigest()
    write_durably(folder / "state.json", json.dumps(state | {"digest": digest_state(state)}, indent=1).encode())
    sync_folder(folder)


def digest_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Drop what a killed writer left."""
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".old-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(path: Path) -> Snapshot:
    """Read and verify one checkpoint. Raises ValueError naming the damaged file."""
    try:
        state = json.loads((path / "state.json").read_bytes())
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
            data = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != digests.get(name):
            raise ValueError(f"{file} is damaged: its bytes do not match the digest in state.json")
        tensors[name] = load(data)
    return Snapshot(step=state.pop("step"), prompt=tensors["prompt"], optimizer=tensors["optimizer"], state=state)


def load_newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest sound checkpoint; a damaged one is named to `warn` and the one before it is used.

    Raises RunFault when there are checkpoints and none is sound: starting over must be the user's decision.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            warn(f"{error}; " + ("using the checkpoint before it" if path != found[0] else "there is none before it"))
    if found:
        raise RunFault(f"{folder}: no checkpoint is sound: remove the folder to start over")
    return None
