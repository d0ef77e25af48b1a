"""Token ids of large data on disk: built once, memory-mapped by all ranks, found again by restarts.

An entry is a folder with one file for each array and a header, which holds their sizes and checksums and the facts
about all examples. Its name is a hash of the content of the data and of everything else that tokens depend on: the
tokenizer, the templates and other options, and this package's own code for data. A second file leads from the path,
size and times of the data to the entry, so that a restart need not read the data. An entry is written aside and renamed
once it is on disk; whoever builds holds a lock, which others wait for, and who maps an entry holds it against removal.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ptune_dist.common.files import replace_file, see_anew
from ptune_dist.common.locks import Lock, share_lock, try_lock
from ptune_dist.common.progress_line import WaitingLine, is_first_here
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.cache_entry import hash_text, read_entry, where_of, write_entry
from ptune_dist.data.cache_key import GIB, describe_options, find_files, hash_file, size_of
from ptune_dist.data.encode import Encoding
from ptune_dist.data.examples import Examples, Part, join_parts
from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError

SMALLEST_BYTES = 1 << 20  # of data files: less is tokenized in about a second
WAIT_S = 0.2
OLD_S = 7 * 86400.0  # where a disk has no locks, what was used in this time may be in use

Encode = Callable[[Rows], Generator[Part, None, None]]

_in_use: list[IO[bytes]] = []  # held until this process ends


@dataclass(frozen=True)
class TokenCache:
    """The place of one split's token ids. `options`: all that they depend on besides the content of `files`."""

    folder: Path
    name: str
    files: list[Path]
    options: str
    max_bytes: float

    def get(self, load: Callable[[], Rows], encode: Encode) -> tuple[Rows, Examples]:
        """The rows, which are not read where they are known, and their examples. Raises UserError of the rows."""
        try:
            return self._find(load) or self._build(load, encode)
        except OSError as error:
            if is_first_here():  # the others of this node fail alike
                print(
                    f"warning: data.cache_dir: {self.folder}: {error.strerror or error}: the token ids of {self.name} "
                    "are kept in the memory of every rank, and built at every start",
                    file=sys.stderr,
                    flush=True,
                )
        rows = load()
        return rows, join_parts(encode(rows), where_of(rows))

    def _find(self, load: Callable[[], Rows]) -> tuple[Rows, Examples] | None:
        """What an earlier start has left of files that have not been touched since."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return self._open(json.loads(self._alias.read_text())["entry"], load)
        return None

    def _build(self, load: Callable[[], Rows], encode: Encode) -> tuple[Rows, Examples]:
        """The entry of the files' content, which one process builds where there is none."""
        stamp = self._stamp
        entry = hash_text(self.options, *map(hash_file, self.files))
        found = self._open(entry, load)
        if found is None:
            with self._claim(entry):
                see_anew(self.folder)
                found = self._open(entry, load) or self._write(entry, stamp, load, encode)
        with contextlib.suppress(OSError):
            replace_file(self.folder / f"{stamp}.json", json.dumps({"entry": entry}).encode())
        evict(self.folder, self.max_bytes)
        return found

    @property
    def _alias(self) -> Path:
        return self.folder / f"{self._stamp}.json"

    @property
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
        waiting = WaitingLine(f"another process to build the token ids of {self.name}")
        while True:
            lock = try_lock(self.folder / f"{entry}.lock")
            found = read_text(failure)
            if found and found != known:
                if lock:
                    lock.close()
                raise UserError(json.loads(found)["error"])
            if lock:
                return lock
            waiting.show()
            time.sleep(WAIT_S)

    def _write(self, entry: str, stamp: str, load: Callable[[], Rows], encode: Encode) -> tuple[Rows, Examples]:
        """As builder; a mistake in the rows is left for those that wait. Raises OSError where the disk is full."""
        folder = self.folder / entry
        if folder.exists():  # only the builder warns: other ranks may look before it has replaced the entry
            print(f"warning: data.cache_dir: {folder} is damaged: it is built again", file=sys.stderr, flush=True)

        def check() -> None:
            if self._stamp != stamp:
                raise UserError(f"{self.name} has changed while it was read: start again")

        try:
            rows = load()
            with contextlib.closing(encode(rows)) as parts:
                written = write_entry(folder, rows, parts, check)
        except UserError as error:
            found = {"error": str(error), "token": secrets.token_hex(8)}
            with contextlib.suppress(OSError):
                replace_file(self.folder / f"{entry}.failed", json.dumps(found).encode())
            raise
        return self._open(entry, load) or written(load)

    def _open(self, entry: str, load: Callable[[], Rows]) -> tuple[Rows, Examples] | None:
        """What an entry holds; None where there is none, or a damaged one. Raises PermissionError of another user's."""
        folder = self.folder / entry
        try:
            held = share_lock(folder / "in_use")
            if held is not None:
                _in_use.append(held)
            with contextlib.suppress(OSError):
                os.utime(folder / "in_use")
            return read_entry(folder, self.name, load)
        except PermissionError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            return None


def open_cache(
    data: DataConfig, encoding: Encoding, which: str, max_examples: int, selection: str = ""
) -> TokenCache | None:
    """The place for the token ids of a split; None where they are not kept: little data, a name on the hub.

    selection: tells apart rows that are chosen otherwise than by the config.
    """
    if data.cache_dir is None:
        return None
    sources = data.train_sources if which == "train" or data.holds_out else data.validation_sources
    found = [find_files(source) for source in sources]
    if not all(found):
        return None
    files = [file for some in found for file in some]
    if sum(size_of(file) for file in files) < SMALLEST_BYTES:
        return None
    folder = default_folder() if data.cache_dir == "auto" else Path(data.cache_dir).expanduser()
    text = describe_options(data, encoding, sources, (which, max_examples, selection), files)
    name = sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"
    return TokenCache(folder.absolute(), name, files, text, data.cache_gib * GIB)


def default_folder() -> Path:
    """Below the user's cache folder (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptune_dist" / "tokens"


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


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
