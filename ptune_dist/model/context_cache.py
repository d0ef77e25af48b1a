"""The context cache: keys/values of contexts, kept in memory within a byte budget and, if asked, in a folder beyond it.

The base never changes, so what it makes of a context (input tokens that no prompt precedes) can be used again in every
later step, epoch and job. A cache must never cost a run: a file that is damaged is a miss, a disk that takes no more is
said once and done without.
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

LEFTOVER_AGE_S = 3600  # a live writer is done, or has at least touched its file, long before
# Left free for what must not fail, such as checkpoints, and for ranks that look at the same moment and then all write.
# The smaller of the two: 2% of a cluster's file system is terabytes, 1 GiB may be all of a small disk.
RESERVE_BYTES = 1 << 30
RESERVE_SHARE = 0.02
EMPTIED = (errno.ENOENT, errno.EEXIST, errno.ESTALE)  # what other processes' removing looks like: mkdir's, and NFS's

Tensors = dict[str, torch.Tensor]


def print_warning(message: str) -> None:
    print(f"warning: {message}", flush=True)


class ContextCache:
    """One rank's contexts. Nothing here is collective: ranks may hit and miss differently.

    `identity` says all else that decides the values (base, dtype, quantization, attention): contexts under another
    identity are never found. Tensors read from `folder` arrive on `device`. The folder has no byte budget: it grows by
    every context that memory has no room for until the file system is nearly full, and may be emptied at any time.
    Any number of ranks and jobs may share it. What memory still holds at the end of a run is not written.
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
        """Raises UserError when the folder cannot be made. `warn` is called once for each kind of trouble."""
        self.max_bytes = max_bytes
        self.device = device
        self.identity = hashlib.sha256(identity.encode()).digest()
        self.disk = None if folder is None else ContextFolder(Path(folder), self.identity.hex()[:16], warn)
        self.held: OrderedDict[str, Tensors] = OrderedDict()  # least recently used first
        self.held_bytes = 0
        self.hits = self.misses = self.disk_hits = 0  # since construction; a disk hit is also a hit
        self.taken = (0, 0)

    @property
    def num_held(self) -> int:
        return len(self.held)

    def get(self, tokens: np.ndarray) -> Tensors | None:
        """The tensors of a context, or None; counts a hit or a miss. They stay the cache's: do not write into them."""
        key = self.key_of(tokens)
        found = self.held.get(key)
        if found is not None:
            self.held.move_to_end(key)
        elif self.disk and (found := self.disk.read(key)) is not None:
            found = {name: tensor.to(self.device) for name, tensor in found.items()}
            self.disk_hits += 1
            self._hold(key, found)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        return dict(found)

    def put(self, tokens: np.ndarray, tensors: Tensors) -> None:
        """Keep the tensors of a context, on whatever device they are and without a copy.

        A view of a larger storage is copied, so that the budget is all that the cache keeps alive. What has to make
        room, and what is larger than the budget, goes to the folder; without one it is dropped.
        """
        self._hold(self.key_of(tokens), tensors)

    def take_counts(self) -> tuple[int, int]:
        """Hits and misses since the last call."""
        before, self.taken = self.taken, (self.hits, self.misses)
        return self.hits - before[0], self.misses - before[1]

    def key_of(self, tokens: np.ndarray) -> str:
        """A digest of the identity and the tokens of one context [T], the same on every machine."""
        assert tokens.ndim == 1 and tokens.dtype.kind in "iu", "a context is one row of token ids"
        return hashlib.sha256(
            self.identity + len(tokens).to_bytes(8, "little") + tokens.astype("<i8").tobytes()
        ).hexdigest()

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
    """A safetensors file per context in a subfolder per identity.

    A file is written aside under a name that no other writer has and then renamed, so that two writers of one context
    or a killed one do no harm. Nothing is flushed: each file holds its checksum, and a damaged one is as good as none.
    """

    def __init__(self, root: Path, name: str, warn: Callable[[str], None]):
        self.folder = root / name
        self.aside = self.folder / ".writing"  # apart, so that looking for leftovers does not list every context
        self.warn = warn
        self.warned: set[str] = set()
        self.writable = True
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"train.context_cache_dir: {self.folder} cannot be made: {error.strerror}: name a folder to write to"
            ) from None
        remove_leftovers(root)

    def path_of(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> Tensors | None:
        """The tensors of a context, on the CPU; None when there is no sound file. A damaged file is removed."""
        path = self.path_of(key)
        try:
            data = path.read_bytes()  # not mapped: another process may cut the file meanwhile
        except OSError as error:
            if error.errno in EMPTIED:
                return None
            self._warn_once("read", f"{path} cannot be read: {error.strerror}: its context is computed again")
            return None
        try:
            return unpack(data, key)
        except ValueError as error:
            self._warn_once("damaged", f"{path} is damaged: {error}: removed, its context is computed again")
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write(self, key: str, tensors: Tensors) -> None:
        """Put a context into the folder unless it is there. Waits for the device when the tensors are on one.

        A write that fails is the last: the folder is then only read.
        """
        if not self.writable:
            return
        path = self.path_of(key)
        try:
            if path.exists():
                return
            self.aside.mkdir(parents=True, exist_ok=True)  # someone may have emptied the folder
            if self._has_room(count_bytes(tensors)):
                self._replace(path, pack(tensors, key))
        except OSError as error:
            if error.errno in EMPTIED:  # at this very moment: the next context is written again
                return
            self.writable = False
            self._warn_once("write", f"cannot write {path}: {error.strerror}: going on without writing contexts")

    def _replace(self, path: Path, data: bytes) -> None:
        aside = self.aside / f"{uuid.uuid4().hex}.tmp"  # process ids repeat between containers
        try:
            with open(aside, "xb") as file:  # not tempfile: others who share the folder may read it
                file.write(data)
            os.replace(aside, path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _has_room(self, num_bytes: int) -> bool:
        usage = shutil.disk_usage(self.folder)
        reserve = min(RESERVE_BYTES, RESERVE_SHARE * usage.total)
        if usage.total == 0 or usage.free - num_bytes >= reserve:  # some mounted object stores report no size at all
            return True
        self._warn_once(
            "full", f"{self.folder}: {usage.free >> 20} MiB are free: no contexts are written until there are more"
        )
        return False

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            self.warn(f"train.context_cache_dir: {message}")


def remove_leftovers(root: Path) -> None:
    """Drop what killed writers left, of any identity; a file that a live writer may be at is too young."""
    with contextlib.suppress(OSError):  # other ranks do the same at this moment
        for leftover in list(root.glob("*/.writing/*.tmp")):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE_S:
                    leftover.unlink()


def count_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph, or a copy where it would keep a larger storage alive."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def pack(tensors: Tensors, key: str) -> bytes:
    """A safetensors file that says in its metadata whose it is and what its checksum is."""
    copies = {  # copies, because safetensors refuses tensors that share memory
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(copies, metadata={"context": key, "crc32": checksum(copies)})


def unpack(data: bytes, key: str) -> Tensors:
    """What `pack` packed under this key. Raises ValueError for anything else."""
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        sound = metadata["context"] == key and metadata["crc32"] == checksum(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"no safetensors file of a context ({type(error).__name__})") from None
    if not sound:
        raise ValueError("its content does not match its checksum")
    return tensors


def checksum(tensors: Tensors) -> str:
    """CRC-32 over names, dtypes, shapes and bytes of contiguous CPU tensors: against accidents, at memory speed."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
