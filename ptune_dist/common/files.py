"""Durable, atomic file writes: a temporary file is written, flushed to disk and renamed."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ptune_dist.errors import RunFault


@contextlib.contextmanager
def fault_on_failed_write(path: Path) -> Iterator[None]:
    """Turn a failed write, such as on a full disk, into a RunFault that names the path."""
    try:
        yield
    except OSError as error:
        raise RunFault(f"cannot write {path}: {error.strerror or error}") from None


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace the content of `path` atomically: even after a kill, a reader sees the old content or the new."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents; flush their entries, so that they survive a power failure."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power failure.

    Does nothing where the file system cannot flush folders, as some network and FUSE file systems, or where the folder
    may be written but not read.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
