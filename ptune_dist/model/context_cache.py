"""The context cache: keys/values of contexts, in memory within a byte budget and optionally in a folder.

The base never changes, so what it computes of a context (input tokens that no prompt precedes) can be reused in every
later step, epoch and job. The cache never fails a run: a damaged file is a miss, and if the disk is full, a warning is
printed once and training continues without writing to it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ptune_dist.errors import UserError

LEFTOVER_AGE_S = 3600  # the file of a live writer is never as old as this
# Disk space left free for writes that must not fail, such as checkpoints, and for ranks that check at the same moment.
# The smaller of the two counts: 2% of a cluster's file system may be terabytes, and 1 GiB all of a small disk.
RESERVE_BYTES = 1 << 30
RESERVE_SHARE = 0.02
EMPTIED = (errno.ENOENT, errno.EEXIST, errno.ESTALE)  # errors while another process removes the folder (NFS included)

Tensors = dict[str, torch.Tensor]


def print_warning(message: str) -> None:
    print(f"warning: {message}", flush=True)


class ContextCache:
    """One rank's contexts. Not collective: ranks may hit and miss differently.

    `identity` describes everything else that determines the values (base, dtype, quantization, attention); contexts of
    another identity are never found. Tensors read from `folder` are put on `device`. The folder has no byte budget:
    contexts that do not fit in memory are written to it until the file system is nearly full. It may be shared by any
    number of ranks and jobs, and emptied at any time. Contexts that are in memory at the end of a run are not written.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        folder: Path | None,
        identity: str,
        device: torch.device | str = "cpu",
        warn: Callable[[str], None] = print_warning,
    ):
        """Raises UserError if the folder cannot be made. `warn` is called once for each kind of problem."""
        self.max_bytes = max_bytes
        self.device = device
        self.identity = hashlib.sha256(identity.encode()).digest()
        self.disk = None if folder is None else ContextFolder(Path(folder), self.identity.hex()[:16], warn)
        self.held: OrderedDict[str, Tensors] = OrderedDict()  # least recently used first
        self.held_bytes = 0
        # Counts since construction; a disk hit is also a hit.
        self.hits = 0
        self.misses = 0
        self.disk_hits = 0
        self._counts_taken = (0, 0)

    @property
    def num_held(self) -> int:
        return len(self.held)

    def get(self, tokens: np.ndarray) -> Tensors | None:
        """The tensors of a context, or None; counts a hit or a miss. Do not modify the tensors in place."""
        key = self.key_of(tokens)
        found = self.held.get(key)
        if found is not None:
            self.held.move_to_end(key)
        elif self.disk:
            found = self._read_from_disk(self.disk, key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        return dict(found)

    def put(self, tokens: np.ndarray, tensors: Tensors) -> None:
        """Store the tensors of a context, on their device and without a copy.

        A view of a larger storage is copied, so that the cache keeps no more memory alive than its budget. Contexts
        that are evicted or larger than the budget are written to the folder, or dropped if there is none.
        """
        self._hold(self.key_of(tokens), tensors)

    def take_counts(self) -> tuple[int, int]:
        """Hits and misses since the last call."""
        hits_before, misses_before = self._counts_taken
        self._counts_taken = (self.hits, self.misses)
        return self.hits - hits_before, self.misses - misses_before

    def key_of(self, tokens: np.ndarray) -> str:
        """A digest of the identity and the tokens [T] of a context, the same on every machine."""
        assert tokens.ndim == 1 and tokens.dtype.kind in "iu", "a context is one row of token ids"
        content = len(tokens).to_bytes(8, "little") + tokens.astype("<i8").tobytes()
        return hashlib.sha256(self.identity + content).hexdigest()

    def _read_from_disk(self, disk: "ContextFolder", key: str) -> Tensors | None:
        found = disk.read(key)
        if found is None:
            return None
        found = {name: tensor.to(self.device) for name, tensor in found.items()}
        self.disk_hits += 1
        self._hold(key, found)
        return found

    def _hold(self, key: str, tensors: Tensors) -> None:
        if key in self.held:
            self._drop(key)
        num_bytes = count_bytes(tensors)
        if num_bytes > self.max_bytes:
            self._spill(key, tensors)
            return
        while self.held_bytes + num_bytes > self.max_bytes:
            oldest = next(iter(self.held))
            self._spill(oldest, self._drop(oldest))
        self.held[key] = {name: owned(tensor) for name, tensor in tensors.items()}
        self.held_bytes += num_bytes

    def _drop(self, key: str) -> Tensors:
        dropped = self.held.pop(key)
        self.held_bytes -= count_bytes(dropped)
        return dropped

    def _spill(self, key: str, tensors: Tensors) -> None:
        if self.disk:
            self.disk.write(key, tensors)


class ContextFolder:
    """A safetensors file for each context, in a subfolder for each identity.

    A file is written under a unique temporary name and then renamed, so that concurrent or killed writers do no harm.
    Files are not flushed to disk: each has a checksum, and a damaged file is treated as missing.
    """

    def __init__(self, root: Path, name: str, warn: Callable[[str], None]):
        self.folder = root / name
        self.temporary = self.folder / ".writing"  # a folder of its own, so that leftovers are found quickly
        self.warn = warn
        self.warned: set[str] = set()
        self.writable = True
        try:
            self.temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"train.context_cache_dir: {self.folder} cannot be made: {error.strerror}: use a writable folder"
            ) from None
        remove_leftovers(root)

    def path_of(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> Tensors | None:
        """The tensors of a context, on the CPU, or None if there is no valid file. A damaged file is removed."""
        path = self.path_of(key)
        try:
            data = path.read_bytes()  # not mapped, because another process may truncate the file
        except OSError as error:
            if error.errno in EMPTIED:
                return None
            self._warn_once("read", f"{path} cannot be read: {error.strerror}: its context will be computed again")
            return None
        try:
            return unpack(data, key)
        except ValueError as error:
            self._warn_once("damaged", f"{path} is damaged: {error}: removed, its context will be computed again")
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write(self, key: str, tensors: Tensors) -> None:
        """Write a context unless the folder has it. Synchronizes with the device of the tensors.

        After a failed write, the folder is only read.
        """
        if not self.writable:
            return
        path = self.path_of(key)
        try:
            if path.exists():
                return
            self.temporary.mkdir(parents=True, exist_ok=True)  # the folder may have been emptied
            if self._has_room(count_bytes(tensors)):
                self._replace(path, pack(tensors, key))
        except OSError as error:
            if error.errno in EMPTIED:  # at this moment; the next write will succeed
                return
            self.writable = False
            self._warn_once("write", f"cannot write {path}: {error.strerror}: continuing without writing contexts")

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = self.temporary / f"{uuid.uuid4().hex}.tmp"  # process ids are not unique across containers
        try:
            with open(temporary, "xb") as file:  # not tempfile, whose files only this user can read
                file.write(data)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _has_room(self, num_bytes: int) -> bool:
        usage = shutil.disk_usage(self.folder)
        reserve = min(RESERVE_BYTES, RESERVE_SHARE * usage.total)
        if usage.total == 0 or usage.free - num_bytes >= reserve:  # some mounted object stores report a size of 0
            return True
        self._warn_once(
            "full", f"{self.folder}: only {usage.free >> 20} MiB are free: no contexts are written until there is room"
        )
        return False

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            self.warn(f"train.context_cache_dir: {message}")


def remove_leftovers(root: Path) -> None:
    """Delete old temporary files of any identity, which killed writers left behind."""
    with contextlib.suppress(OSError):  # other ranks may do the same at this moment
        for leftover in list(root.glob("*/.writing/*.tmp")):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE_S:
                    leftover.unlink()


def count_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph; a copy, if it would keep a larger storage alive."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def pack(tensors: Tensors, key: str) -> bytes:
    """The content of a safetensors file, with the context's key and a checksum in its metadata."""
    copies = {  # because safetensors refuses tensors that share memory
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(copies, metadata={"context": key, "crc32": checksum(copies)})


def unpack(data: bytes, key: str) -> Tensors:
    """The tensors that `pack` packed under this key. Raises ValueError for anything else."""
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        is_valid = metadata["context"] == key and metadata["crc32"] == checksum(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a safetensors file of a context ({type(error).__name__})") from None
    if not is_valid:
        raise ValueError("its content does not match its checksum")
    return tensors


def checksum(tensors: Tensors) -> str:
    """CRC-32 of names, dtypes, shapes and bytes of contiguous CPU tensors; detects accidental damage."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
