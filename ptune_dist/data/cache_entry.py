"""An entry of the token cache: a folder with one file for each array of the examples, and a header.

The header holds the arrays' sizes and checksums, the facts about all examples, what is asked of the rows at every
start, and a checksum of itself. An entry is written aside, as the rows are encoded, and renamed once it is on disk.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from ptune_dist.common.files import flush, replace_file, sync_folder
from ptune_dist.data.encode import name_block
from ptune_dist.data.examples import Examples, Facts, Part
from ptune_dist.data.sources import Rows

FORMAT = 3
BLOCK_BYTES = 1 << 22  # which one checksum is of
MOST_BYTES = 1 << 28  # of `ids` that a start reads to compare checksums: about 0.3 s
DTYPES = {
    "ids": "int32",
    "offsets": "int64",
    "num_targets": "int32",
    "is_truncated": "bool",
    "num_context": "int32",
    "numbers": "float64",
}


def write_entry(
    place: Path, rows: Rows, parts: Iterable[Part], check: Callable[[], None]
) -> Callable[[Callable[[], Rows]], tuple[Rows, Examples]]:
    """Write what `parts` holds of all rows to the folder `place`; the caller has the right to.

    `check` is called when all is read, and may raise. Returns a function that gives what was written, as `read_entry`
    does, even where the disk does not show it at once. Raises OSError, where the disk is full say.
    """
    for left in place.parent.glob(f".{place.name}-*"):  # of killed builders
        shutil.rmtree(left, ignore_errors=True)
    aside = place.with_name(f".{place.name}-{secrets.token_hex(8)}")
    try:
        aside.mkdir(mode=0o700)
        arrays, checksums = write_arrays(aside, parts)
        check()
        mapped = Examples(**map_arrays(aside, arrays), where=rows.where, facts=None)
        examples = dataclasses.replace(mapped, facts=mapped.known)
        header = {
            "format": FORMAT,
            "arrays": arrays,
            "checksums": checksums,
            "facts": dataclasses.asdict(examples.known),
            "kind": rows.kind,
            "columns": rows.columns(),
            "num_rows": len(rows),
            "head": plain_rows(rows.read(0, 1)),
        }
        text = json.dumps(header)
        replace_file(aside / "header.json", f"{hash_text(text)}\n{text}".encode())
        (aside / "in_use").touch()
        sync_folder(aside)
        if place.exists():  # damaged, or it would have been read
            os.rename(place, place.with_name(f".{place.name}-{secrets.token_hex(8)}"))
        os.rename(aside, place)
        sync_folder(place.parent)
        return lambda load: describe(header, examples, rows.name, load)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_entry(place: Path, name: str, load: Callable[[], Rows]) -> tuple[Rows, Examples]:
    """The rows and the mapped examples of an entry; `load` gives the rows of `name` themselves.

    Raises OSError for one that is not there, and ValueError, KeyError or TypeError for a damaged one.
    """
    checksum, text = (place / "header.json").read_text().split("\n", 1)
    header = json.loads(text) if checksum == hash_text(text) else {}
    if header.get("format") != FORMAT:
        raise ValueError("its header is damaged")
    arrays = map_arrays(place, header["arrays"])
    for array in arrays:
        compare_checksums(place / array, header["checksums"][array], MOST_BYTES if array == "ids" else None)
    facts = Facts(**header["facts"])
    return describe(header, Examples(**arrays, where=str, facts=facts), name, load)


def describe(header: dict[str, Any], examples: Examples, name: str, load: Callable[[], Rows]) -> tuple[Rows, Examples]:
    """Rows that are loaded when one is needed, and the examples, which name them."""
    rows = StoredRows(name, header["kind"], header["num_rows"], header["columns"], header["head"], load)
    return rows, dataclasses.replace(examples, where=where_of(rows))


def where_of(rows: Rows) -> Callable[[int], str]:
    """The name of an example, for messages."""
    return functools.partial(name_block, rows.name) if rows.kind == "text" else rows.where


def write_arrays(folder: Path, parts: Iterable[Part]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Write each array to its own file, and flush it. Raises OSError.

    Returns the number of elements of each, and the checksums of its blocks.
    """
    counts: dict[str, int] = {}
    sums: dict[str, BlockSums] = {}
    has_contexts = False
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}

        def add(name: str, array: np.ndarray) -> None:
            if name not in files:
                files[name] = stack.enter_context(open(folder / name, "wb", buffering=0))
                counts[name] = 0
                sums[name] = BlockSums()
            data = np.ascontiguousarray(array, DTYPES[name]).data.cast("B")
            write_bytes(files[name], data)
            sums[name].add(data)
            counts[name] += len(array)

        end = 0
        add("offsets", np.zeros(1, np.int64))
        for part in parts:
            offsets = end + np.cumsum(part.lengths, dtype=np.int64)
            end = int(offsets[-1])
            has_contexts = has_contexts or bool(part.num_context.any())
            add("offsets", offsets)
            for name in ("ids", "num_targets", "is_truncated", "num_context"):
                add(name, getattr(part, name))
            if part.numbers is not None:
                add("numbers", part.numbers)
        for file in files.values():
            flush(file.fileno())
    if not has_contexts:
        (folder / "num_context").unlink()
        del counts["num_context"]
    return counts, {name: sums[name].all() for name in counts}


class BlockSums:
    """The CRC-32 of each `BLOCK_BYTES` of a file, computed as it is written."""

    def __init__(self) -> None:
        self._whole: list[int] = []
        self._last = 0
        self._size = 0  # of the last block, which is being filled

    def add(self, data: memoryview) -> None:
        """These bytes come next."""
        while len(data):
            piece = data[: BLOCK_BYTES - self._size]
            self._last = zlib.crc32(piece, self._last)
            self._size += len(piece)
            data = data[len(piece) :]
            if self._size == BLOCK_BYTES:
                self._whole.append(self._last)
                self._last = 0
                self._size = 0

    def all(self) -> list[int]:
        return [*self._whole, self._last] if self._size else self._whole


def compare_checksums(path: Path, checksums: list[int], most_bytes: int | None) -> None:
    """Raise ValueError where a block of the file has another checksum.

    Of a file larger than `most_bytes`, so many bytes are read: blocks at equal distances, the first and the last too.
    Every rank reads the same ones, so that all of them find an entry damaged, or none does.
    """
    chosen = np.arange(len(checksums))
    if most_bytes is not None and len(checksums) * BLOCK_BYTES > most_bytes:
        chosen = np.linspace(0, len(checksums) - 1, most_bytes // BLOCK_BYTES).astype(int)
    with open(path, "rb", buffering=0) as file:
        for block in chosen.tolist():
            if zlib.crc32(os.pread(file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES)) != checksums[block]:
                raise ValueError(f"{path.name} does not hold what was written")


def write_bytes(file: IO[bytes], data: memoryview) -> None:
    """Raises OSError where not all of it can be written."""
    while len(data):
        written = file.write(data[: 1 << 26])
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = data[written:]


def map_arrays(folder: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Arrays that are read from their files as they are used. Raises ValueError for a file of another size."""
    return {name: map_array(folder / name, np.dtype(DTYPES[name]), count) for name, count in counts.items()}


def map_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has not the size that its header gives")
    return np.memmap(path, dtype, "r", shape=(count,)).view(np.ndarray) if count else np.zeros(0, dtype)


class StoredRows(Rows):
    """Rows of which only the columns' names and the first rows, `head`, are known until another one is read."""

    _num_rows: int
    _columns: list[str]
    _head: list[dict[str, Any]]
    _load: Callable[[], Rows]

    def __init__(
        self,
        name: str,
        kind: str,
        num_rows: int,
        columns: list[str],
        head: list[dict[str, Any]],
        load: Callable[[], Rows],
    ):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "_num_rows", num_rows)
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "_head", head)
        object.__setattr__(self, "_load", functools.cache(load))

    @property
    def source(self) -> Any:
        """The rows themselves, which are loaded now."""
        return self._load().source

    @property
    def unreadable(self) -> dict[str, str]:
        return self._load().unreadable

    def __len__(self) -> int:
        return self._num_rows

    def columns(self) -> list[str]:
        return list(self._columns)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        return self._head[first:last] if last <= len(self._head) else self._load().read(first, last)

    def first(self, count: int) -> Rows:
        if count > len(self._head):
            return self._load().first(count)
        return StoredRows(
            self.name, self.kind, count, self._columns, self._head[:count], lambda: self._load().first(count)
        )

    def where(self, index: int) -> str:
        return self._load().where(index)


def plain_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose values a header keeps as they are: none where there are others than texts and whole numbers."""
    return rows if all(type(value) in (str, int, bool, type(None)) for row in rows for value in row.values()) else []


def hash_text(*parts: str) -> str:
    """Of texts and of where each ends."""
    hashed = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        hashed.update(f"{len(content)} ".encode() + content)
    return hashed.hexdigest()[:32]
