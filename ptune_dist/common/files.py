"""Files that are whole or not there: written aside, flushed to the disk, renamed. Floor 0."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ptune_dist.errors import RunFault


@contextlib.contextmanager
def fault_on_failed_write(path: Path) -> Iterator[None]:
    """A full disk and its like become a RunFault that names the path."""
    try:
        yield
    except OSError as error:
        raise RunFault(f"cannot write {path}: {error.strerror or error}") from None


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`: whoever reads it, at whatever moment this is killed, sees the old content or the new."""
    aside = path.with_name(f".writing-{path.name}")
    try:
        write_durably(aside, data)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
