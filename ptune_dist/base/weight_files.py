"""Read any part of a tensor from safetensors files, directly into the memory of its destination.

Files are not memory-mapped: the pages of a map count as memory of this process, and the kernel reads more than is asked
for. The format is https://github.com/huggingface/safetensors#format; the library checks every file first.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from ptune_dist.base.other_folders import INDEX, WHOLE, describe_conversion, describe_other_weights
from ptune_dist.common.files import explain_unreadable
from ptune_dist.common.hub import split_revision
from ptune_dist.errors import UserError

CHUNK_BYTES = 32 << 20  # of a tensor that is cast, or moved to a GPU
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
MLX = ("scales", "biases")  # beside a weight that MLX quantized
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte


class WeightFiles:
    """The tensors of a checkpoint, any part of which can be read. Its files are closed when it is garbage-collected."""

    def __init__(self, tensors: dict[str, StoredTensor]):
        self._tensors = tensors
        self.shapes = {name: stored.shape for name, stored in tensors.items()}
        self._opened: dict[Path, int] = {}
        self._buffers = Buffers(2, is_pinned=torch.cuda.is_available())
        self.bytes_read = 0

    def __del__(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)

    def dtype_of(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def renamed(self, names: dict[str, str]) -> "WeightFiles":
        """Some of the tensors under other names: stored name -> name."""
        return WeightFiles({name: self._tensors[stored] for stored, name in names.items()})

    def holds_floats(self, name: str) -> bool:
        return self._tensors[name].dtype.is_floating_point

    def read_flat(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + len(out)) of the flattened tensor into 1-D `out`; casts and moves if needed."""
        stored = self._tensors[name]
        if out.dtype == stored.dtype and out.device.type == "cpu":
            self._read(stored, start, out)
            return
        step = max(1, CHUNK_BYTES // stored.dtype.itemsize)
        buffers = self._buffers if out.is_cuda else Buffers(1, is_pinned=False)
        for first in range(0, len(out), step):
            count = min(step, len(out) - first)
            part = buffers.take(count * stored.dtype.itemsize).view(stored.dtype)
            self._read(stored, start + first, part)
            if out.is_cuda:  # cast there: a copy that casts does so on the host, into memory that is not pinned
                part = part.to(out.device, non_blocking=True)
                buffers.copied(out.device)
            out[first : first + count].copy_(part)

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last), in the file's dtype."""
        stored = self._tensors[name]
        width = prod(stored.shape[1:])
        part = torch.empty((last - first) * width, dtype=stored.dtype)
        self._read(stored, first * width, part)
        return part.view(last - first, *stored.shape[1:])

    def read_columns(self, name: str, first: int, last: int) -> torch.Tensor:
        """Columns [first, last) of a matrix, transposed: [last - first, rows], in the file's dtype."""
        stored = self._tensors[name]
        num_rows, width = stored.shape
        if (first, last) == (0, width):
            return self.read_rows(name, 0, num_rows).T.contiguous()
        part = torch.empty(num_rows, last - first, dtype=stored.dtype)
        for row in range(num_rows):
            self._read(stored, row * width + first, part[row])
        return part.T.contiguous()

    def _read(self, stored: StoredTensor, start: int, out: torch.Tensor) -> None:
        """Read directly into `out`, a contiguous CPU tensor of the file's dtype. Raises UserError."""
        view = out.reshape(-1).view(torch.uint8).numpy().data
        position = stored.offset + start * stored.dtype.itemsize
        while len(view):
            try:
                count = os.preadv(self._descriptor(stored.file), [view[: 1 << 30]], position)
            except OSError as error:
                raise UserError(f"model.path: cannot read {stored.file}: {error.strerror}") from None
            if not count:
                raise UserError(f"model.path: {stored.file} became shorter while it was read")
            self.bytes_read += count
            view = view[count:]
            position += count

    def _descriptor(self, file: Path) -> int:
        if file not in self._opened:
            self._opened[file] = os.open(file, os.O_RDONLY)
        return self._opened[file]


class Buffers:
    """Host memory to read into, in turns: while one is copied to a GPU, the next chunk is read into another."""

    def __init__(self, num: int, *, is_pinned: bool):
        self._memory: list[torch.Tensor | None] = [None] * num
        self._copies: list[torch.cuda.Event | None] = [None] * num
        self._is_pinned = is_pinned
        self._last = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """The first bytes of the next buffer, once nothing reads from it any more."""
        self._last = (self._last + 1) % len(self._memory)
        copy = self._copies[self._last]
        if copy is not None:
            copy.synchronize()
        memory = self._memory[self._last]
        if memory is None or len(memory) < num_bytes:
            memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
            self._memory[self._last] = memory
        return memory[:num_bytes]

    def copied(self, device: torch.device) -> None:
        """Call once a copy to a GPU from the buffer that was taken last is queued."""
        copy = torch.cuda.Event()
        copy.record(torch.cuda.current_stream(device))
        self._copies[self._last] = copy


def open_weight_files(path: str, *, local_only: bool) -> WeightFiles:
    """The safetensors files of a folder or a hub name. Raises UserError, also for a truncated file."""
    tensors: dict[str, StoredTensor] = {}
    for file in find_weight_files(path, local_only):
        tensors |= dict(read_header(file))
    return WeightFiles(tensors)


def find_weight_files(path: str, local_only: bool) -> list[Path]:
    """The one weight file, or those that an index lists. Raises UserError."""
    repository, revision = split_revision(path)

    def find(name: str) -> Path | None:
        try:
            found = cached_file(
                repository,
                name,
                revision=revision,
                local_files_only=local_only,
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError:
            return None
        return Path(found) if found else None

    whole = find(WHOLE)
    if whole and whole.is_file():
        return [whole]
    index = find(INDEX)
    if index is None:
        what = describe_other_weights(Path(path)) if Path(path).is_dir() else None
        if not what and any(find(name) for name in PICKLED):
            what = f"has pickled weights, which are not read: {describe_conversion(path)}"
        if what:
            raise UserError(f"model.path: {path} {what}")
        raise UserError(f"model.path: cannot read the weights of {path}: it has neither {WHOLE} nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"model.path: cannot read the weights of {path}: {index} is not an index of weights") from None
    files = [find(name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise UserError(f"model.path: cannot read the weights of {path}: {', '.join(missing[:5])} is missing")
    return [file for file in files if file is not None]


def read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Name and place of each tensor in a file. Raises UserError if the file is damaged."""
    try:
        # This checks the header and the file's length. (With "pt" the library makes a private map, which the kernel
        # refuses for a file larger than memory.)
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(size))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        unreadable = explain_unreadable(file)
        if unreadable:
            raise UserError(f"model.path: the weights in {file} cannot be read: {unreadable}") from None
        raise UserError(f"model.path: the weights in {file} are damaged, copy them again: {error}") from None
    header.pop("__metadata__", None)
    for name, facts in header.items():
        if facts["dtype"] == "U32" and header.keys() & {f"{name.removesuffix('weight')}{end}" for end in MLX}:
            raise UserError(f"model.path: {file}: {name} is quantized by MLX, which is not read: give the float base")
        if facts["dtype"] not in DTYPES:
            raise UserError(f"model.path: {file}: {name} is stored as {facts['dtype']}, which is not supported")
        place = 8 + size + facts["data_offsets"][0]
        yield name, StoredTensor(file, DTYPES[facts["dtype"]], tuple(facts["shape"]), place)
