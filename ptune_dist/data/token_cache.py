"""Token ids of large data on disk: built once, memory-mapped by all ranks, found again by restarts.

An entry is a folder with one file for each array and a header, which holds their sizes, the facts about all examples
and a checksum. Its name is a hash of the content of the data and of everything else that tokens depend on: the
tokenizer, the templates and other options, and this package's own code for data. A second file leads from the path,
size and times of the data to the entry, so that a restart need not read the data. An entry is written aside and renamed
once it is on disk; whoever builds holds a lock, which others wait for, and who maps an entry holds it against removal.
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
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from ptune_dist.common.files import flush, replace_file, see_anew, sync_folder
from ptune_dist.common.locks import Lock, share_lock, try_lock
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.encode import Encoding, Examples, Facts
from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError

FORMAT = 1
SMALLEST_BYTES = 1 << 20  # of data files: less is tokenized in about a second
COMPRESSED = (".gz", ".zst", ".parquet")
ARRAYS = ("ids", "offsets", "num_targets", "is_truncated", "num_context", "numbers")
WAIT_S = 0.2
OLD_S = 7 * 86400.0  # where a disk has no locks, what was used in this time may be in use
GIB = 1 << 30
# Of config section `data`: what tokens do not depend on.
NOT_IN_KEY = {"train", "validation", "references", "cache_dir", "cache_gib"}

_in_use: list[IO[bytes]] = []  # held until this process ends


@dataclass(frozen=True)
class TokenCache:
    """The place of one split's token ids. `options`: all that they depend on besides the content of `files`."""

    folder: Path
    name: str
    files: list[Path]
    options: str
    max_bytes: float

    def get(self, load: Callable[[], Rows], encode: Callable[[Rows], Examples]) -> tuple[Rows, Examples]:
        """The rows, which are not read where they are known, and their examples. Raises UserError of the rows."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            return self._without(error, load, encode)
        stamp = self._stamp()
        alias = self.folder / f"{stamp}.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = self._open(json.loads(alias.read_text())["entry"], load)
            if found:
                return found
        entry = hash_text(self.options, *map(hash_file, self.files))
        try:
            found = self._open(entry, load)
        except PermissionError as error:
            return self._without(error, load, encode)
        if found is None:
            try:
                with self._claim(entry):
                    see_anew(self.folder)
                    found = self._open(entry, load)
                    if found is None:
                        rows, examples = self._encode(entry, load, encode)
                        if self._stamp() != stamp:
                            raise UserError(f"{self.name} has changed while it was read: start again")
                        try:
                            self._write(entry, rows, examples)
                        except OSError as error:
                            self._say(error)
                            return rows, examples
                        found = self._open(entry, load)
                        if found is None:  # a disk that does not show what has just been written
                            return rows, examples
            except OSError as error:
                return self._without(error, load, encode)
        with contextlib.suppress(OSError):
            replace_file(alias, json.dumps({"entry": entry}).encode())
        evict(self.folder, self.max_bytes)
        return found

    def _without(
        self, error: OSError, load: Callable[[], Rows], encode: Callable[[Rows], Examples]
    ) -> tuple[Rows, Examples]:
        self._say(error)
        rows = load()
        return rows, encode(rows)

    def _say(self, error: OSError) -> None:
        print(
            f"warning: data.cache_dir: {self.folder}: {error.strerror or error}: the token ids of {self.name} are kept "
            "in the memory of every rank, and built at every start",
            file=sys.stderr,
            flush=True,
        )

    def _stamp(self) -> str:
        """Changes when a file is written, replaced or moved."""
        facts = []
        for file in self.files:
            stat = file.stat()
            facts.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}")
        return hash_text(self.options, *facts)

    def _claim(self, entry: str) -> Lock:
        """The right to build an entry, once nobody else has it. Raises OSError, and UserError that a builder found."""
        failure = self.folder / f"{entry}.failed"
        known = read_text(failure)
        while True:
            lock = try_lock(self.folder / f"{entry}.lock")
            said = read_text(failure)
            if said and said != known:
                if lock:
                    lock.close()
                raise UserError(json.loads(said)["error"])
            if lock:
                return lock
            time.sleep(WAIT_S)

    def _encode(
        self, entry: str, load: Callable[[], Rows], encode: Callable[[Rows], Examples]
    ) -> tuple[Rows, Examples]:
        """As builder; what is wrong with the rows is left for those that wait."""
        try:
            rows = load()
            return rows, encode(rows)
        except UserError as error:
            said = {"error": str(error), "token": secrets.token_hex(8)}
            with contextlib.suppress(OSError):
                replace_file(self.folder / f"{entry}.failed", json.dumps(said).encode())
            raise

    def _write(self, entry: str, rows: Rows, examples: Examples) -> None:
        """Raises OSError where the disk is full."""
        for left in self.folder.glob(f".{entry}-*"):  # of killed builders: this one holds the lock
            shutil.rmtree(left, ignore_errors=True)
        aside = self.folder / f".{entry}-{secrets.token_hex(8)}"
        try:
            aside.mkdir(mode=0o700)
            arrays = {}
            for name in ARRAYS:
                array = getattr(examples, name)
                if array is not None and (name != "num_context" or examples.known.has_contexts):
                    arrays[name] = {"dtype": str(array.dtype), "count": len(array)}
                    write_array(aside / name, array)
            header = {
                "format": FORMAT,
                "arrays": arrays,
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
            if (self.folder / entry).exists():  # damaged, or it would have been opened
                os.rename(self.folder / entry, self.folder / f".{entry}-{secrets.token_hex(8)}")
            os.rename(aside, self.folder / entry)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _open(self, entry: str, load: Callable[[], Rows]) -> tuple[Rows, Examples] | None:
        """What an entry holds; None where there is none, or a damaged one. Raises PermissionError of another user's."""
        folder = self.folder / entry
        try:
            held = share_lock(folder / "in_use")
            if held is not None:
                _in_use.append(held)
            with contextlib.suppress(OSError):
                os.utime(folder / "in_use")
            checksum, text = (folder / "header.json").read_text().split("\n", 1)
            header = json.loads(text) if checksum == hash_text(text) else {}
            if header.get("format") != FORMAT:
                raise ValueError("its header is damaged")
            arrays = {name: map_array(folder / name, **facts) for name, facts in header["arrays"].items()}
        except (FileNotFoundError, BlockingIOError):
            if folder.exists():
                print(f"warning: data.cache_dir: {folder} is incomplete: built again", file=sys.stderr, flush=True)
            return None
        except PermissionError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"warning: data.cache_dir: {folder}: {error}: built again", file=sys.stderr, flush=True)
            return None
        rows = StoredRows(self.name, header["kind"], header["num_rows"], header["columns"], header["head"], load)
        where = functools.partial(name_block, self.name) if rows.kind == "text" else rows.where
        return rows, Examples(**arrays, where=where, facts=Facts(**header["facts"]))


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


def open_cache(data: DataConfig, encoding: Encoding, source: str, which: str, max_examples: int) -> TokenCache | None:
    """The place for the token ids of a source; None where they are not kept: little data, a name on the hub."""
    if data.cache_dir is None:
        return None
    files = find_files(source)
    if sum(size_of(file) for file in files) < SMALLEST_BYTES:
        return None
    options = {
        "format": FORMAT,
        "code": hash_code(),
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2", "numpy", "datasets")],
        "tokenizer": hash_tokenizer(encoding),
        "data": data.model_dump(mode="json", exclude=NOT_IN_KEY),
        "source": [source.rpartition(":")[2] if Path(source).is_dir() is False else "", which, max_examples],
        "suffixes": [file.suffix.lower() for file in files],
        "framing": [dataclasses.asdict(encoding.framing), type(encoding.targets).__name__, encoding.targets.specials],
        "encoding": [encoding.max_length, encoding.placement, encoding.truncation_side, encoding.num_embeddings],
    }
    folder = default_folder() if data.cache_dir == "auto" else Path(data.cache_dir).expanduser()
    text = json.dumps(options, sort_keys=True)
    return TokenCache(folder.absolute(), source, files, text, data.cache_gib * GIB)


def default_folder() -> Path:
    """Below the user's cache folder (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptune_dist" / "tokens"


def find_files(source: str) -> list[Path]:
    """The files of a source: a file, or those of a folder; none for a name on the hub."""
    path = Path(source).expanduser()
    if not path.exists() and ":" in source:
        path = Path(source.rpartition(":")[0]).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def size_of(file: Path) -> int:
    size = file.stat().st_size
    return 8 * size if file.suffix.lower() in COMPRESSED else size


def hash_tokenizer(encoding: Encoding) -> str:
    """Of everything that decides how the tokenizer splits a text."""
    tokenizer = encoding.tokenizer
    parts = [type(tokenizer).__qualname__, str(getattr(tokenizer, "split_special_tokens", False))]
    parts.append(json.dumps([encoding.specials, tokenizer.special_tokens_map], default=str, sort_keys=True))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hash_text(*parts, backend.to_str())
    place = Path(tokenizer.name_or_path)
    files = sorted(place.iterdir()) if place.is_dir() else []
    models = [file for file in files if file.is_file() and file.stat().st_size < GIB and "safetensors" not in file.name]
    parts.append(json.dumps(tokenizer.get_vocab(), sort_keys=True))
    return hash_text(*parts, *map(hash_file, models))


@functools.cache
def hash_code() -> str:
    """Of this package's modules that make tokens out of rows: another version may make others."""
    return hash_text(*(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))))


def hash_text(*parts: str) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        hashed.update(f"{len(content)} ".encode() + content)
    return hashed.hexdigest()[:32]


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def write_array(path: Path, array: np.ndarray) -> None:
    """Write the bytes of an array and flush them to disk."""
    data = np.ascontiguousarray(array).data.cast("B")
    with open(path, "wb", buffering=0) as file:
        while len(data):
            written = file.write(data[: 1 << 26])
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[written:]
        flush(file.fileno())


def map_array(path: Path, dtype: str, count: int) -> np.ndarray:
    """An array that is read from its file as it is used. Raises ValueError for a file of another size."""
    kind = np.dtype(dtype)
    if path.stat().st_size != count * kind.itemsize:
        raise ValueError(f"{path.name} has not the size that its header gives")
    return np.memmap(path, kind, "r", shape=(count,)).view(np.ndarray) if count else np.zeros(0, kind)


def name_block(name: str, index: int) -> str:
    return f"{name} block {index + 1} (the first is block 1)"


def evict(folder: Path, max_bytes: float) -> None:
    """Remove entries that are not in use, those first that were not used for the longest time, to keep the limit."""
    entries = sorted((used_at(path), path) for path in folder.iterdir() if (path / "in_use").exists())
    sizes = {path: sum(size_on_disk(path.iterdir())) for _, path in entries}
    total = sum(sizes.values())
    for used, path in entries:
        if total <= max_bytes:
            break
        with contextlib.suppress(OSError):
            lock = try_lock(path / "in_use")
            if lock is None:
                continue
            with lock:
                if not lock.is_by_kernel and time.time() - used < OLD_S:
                    continue
                aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
                os.rename(path, aside)
                lock.moved_to(aside)
                shutil.rmtree(aside, ignore_errors=True)
                total -= sizes[path]


def used_at(path: Path) -> float:
    try:
        return (path / "in_use").stat().st_mtime
    except OSError:
        return 0.0


def size_on_disk(files: Iterable[Path]) -> Iterable[int]:
    for file in files:
        with contextlib.suppress(OSError):
            yield file.stat().st_size
