"""The context cache: keys/values of contexts, on the GPU and in memory within byte budgets, and in a folder.

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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ptune_dist.errors import UserError
from ptune_dist.model.cache_tier import Tensors, Tier

LEFTOVER_AGE_S = 3600  # the file of a live writer is never as old as this
# Disk space left free for writes that must not fail, such as checkpoints, and for ranks that check at the same moment.
# The smaller of the two counts: 2% of a cluster's file system may be terabytes, and 1 GiB all of a small disk.
RESERVE_BYTES = 1 << 30
RESERVE_SHARE = 0.02
EMPTIED = (errno.ENOENT, errno.EEXIST, errno.ESTALE)  # errors while another process removes the folder (NFS included)


def print_warning(message: str) -> None:
    print(f"warning: {message}", flush=True)


class ContextCache:
    """One rank's contexts. Not collective: ranks may hit and miss differently.

    The first contexts stay on `device`, as many as `device_bytes` hold: rows are read in an order that no eviction can
    foresee, and whatever comes back to the device would drive out what is needed as soon. The others are in host memory
    within `max_bytes`, pinned where the device is a GPU, so that nothing waits for a copy, and what is evicted from
    there is in `folder`.

    `identity` describes everything else that determines the values (base, dtype, quantization, attention); contexts of
    another identity are never found. The folder has no byte budget: it is written to until the file system is nearly
    full. It may be shared by any number of ranks and jobs, and emptied at any time. Contexts that are in memory at the
    end of a run are not written.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        folder: Path | None,
        identity: str,
        device: torch.device | str = "cpu",
        device_bytes: int = 0,
        warn: Callable[[str], None] = print_warning,
    ):
        """Raises UserError if the folder cannot be made. `warn` is called once for each kind of problem."""
        self.device = torch.device(device)
        self.identity = hashlib.sha256(identity.encode()).digest()
        self.disk = None if folder is None else ContextFolder(Path(folder), self.identity.hex()[:16], warn)
        self._near = Tier(device_bytes)
        self._host = Tier(max_bytes, is_pinned=self.device.type == "cuda")
        # Counts since construction; a disk hit is also a hit.
        self.hits = 0
        self.misses = 0
        self.disk_hits = 0
        self._counts_taken = (0, 0)

    @property
    def held(self) -> list[str]:
        """The keys of contexts in host memory, the least recently used first."""
        return list(self._host.held)

    @property
    def held_bytes(self) -> int:
        """On the device and in host memory."""
        return self._near.num_bytes + self._host.num_bytes

    @property
    def num_held(self) -> int:
        return len(self._host.held)

    def get(self, tokens: np.ndarray) -> Tensors | None:
        """The tensors of a context, on the device, or None; counts a hit or a miss. Do not modify them in place."""
        key = self.key_of(tokens)
        found = self._near.get(key)
        if found is None:
            found = self._host.get(key)
            if found is None and self.disk:
                found = self._read_from_disk(self.disk, key)
            if found is None:
                self.misses += 1
                return None
            found = {name: tensor.to(self.device, non_blocking=True) for name, tensor in found.items()}
        self.hits += 1
        return dict(found)

    def put(self, tokens: np.ndarray, tensors: Tensors) -> None:
        """Store the tensors of a context, which are on the device.

        A view of a larger storage is copied, so that the cache keeps no more memory alive than its budget. Contexts
        that are evicted or larger than the budget are written to the folder, or dropped if there is none.
        """
        key = self.key_of(tokens)
        if self._near.has_room(key, tensors):
            self._near.put(key, tensors)
        else:
            self._hold(key, tensors)

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
        if found is not None:
            self.disk_hits += 1
            self._hold(key, found)
        return found

    def _hold(self, key: str, tensors: Tensors) -> None:
        if self.device.type == "cuda":  # to pinned memory, in the order of the device's work
            tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        for left, leaving in self._host.put(key, tensors):
            self._spill(left, leaving)

    def _spill(self, key: str, tensors: Tensors) -> None:
        if self.disk is None:
            return
        if self.device.type == "cuda":  # copies from the device may be on their way
            torch.cuda.current_stream(self.device).synchronize()
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
