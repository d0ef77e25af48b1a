"""Durable, atomic file writes: a temporary file is written, flushed to disk and renamed. What a failed one means."""

import contextlib
import errno
import os
import pwd
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ptune_dist.errors import RunFault

T = TypeVar("T")

# What a disk answers that cannot flush, such as some network and FUSE file systems.
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS)
# What passes on network disks and unions of disks: a server that was restarted, a file that is being moved there.
PASSING = (errno.ESTALE, errno.EXDEV, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EIO, errno.EREMOTEIO)
PAUSES_S = (0.1, 1.0)  # before a second and a third try
FULL = (errno.ENOSPC, errno.EDQUOT)
OTHERS = (errno.EACCES, errno.EPERM)
REMEDIES = {
    **dict.fromkeys(FULL, "free some space, then run the same command again"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO), "check the disk and its network"),
    **dict.fromkeys((errno.EROFS, errno.EXDEV), "choose a folder on another disk"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a folder is needed"),
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "remove its symbolic links",
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def text_suffix(path: Path) -> str:
    """What kind of file it is once it is decompressed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def explain(error: OSError, path: Path | str | None = None) -> str:
    """What a failed call means and what to do, for a message that has named `path` already."""
    reason = error.strerror or str(error)
    place = Path(path or os.fsdecode(error.filename or ""))
    if error.errno in OTHERS:
        owner = find_owner(place)
        return f"{reason} ({owner}): ask for access" if owner else f"{reason}: change its permissions"
    if error.errno in (errno.EEXIST, errno.ENOENT, errno.ELOOP) and place.is_symlink():
        return f"a symbolic link to {os.readlink(place)}, which leads nowhere: remove it"
    remedy = REMEDIES.get(error.errno or 0)
    return f"{reason}: {remedy}" if remedy else reason


def explain_unreadable(file: Path) -> str | None:
    """Why a file cannot be opened, where that is so: safetensors takes every such file for one that is not there."""
    try:
        with open(file, "rb"):
            return None
    except OSError as error:
        return explain(error, file)


def find_owner(path: Path) -> str | None:
    """`PATH belongs to user NAME`, of the nearest file or folder that can be seen; None where it is this user's."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            owner = place.stat().st_uid
            name = str(owner)
            with contextlib.suppress(KeyError):
                name = pwd.getpwuid(owner).pw_name
            return None if owner == os.geteuid() else f"{place} belongs to user {name}"
    return None


def describe_os_error(error: OSError) -> str | None:
    """One line where the state of a disk or the owner of a file has led to an error that nothing expected."""
    if error.filename is None or error.errno not in {*REMEDIES, *OTHERS}:
        return None
    return f"{os.fsdecode(error.filename)}: {explain(error)}"


@contextlib.contextmanager
def fault_on_failed_write(path: Path) -> Iterator[None]:
    """Turn a failed write, such as on a full disk, into a RunFault that names the path."""
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if error.filename and path.is_dir() else path
        raise RunFault(f"cannot write {place}: {explain(error, place)}") from None


def try_again(function: Callable[[], T]) -> T:
    """Call `function`, and again where a network disk failed in a way that passes. It must bear to be repeated."""
    for pause in PAUSES_S:
        try:
            return function()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return function()


def flush(handle: int) -> None:
    """Flush an open file or folder to disk, where the disk can do that. Raises OSError where it fails."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        flush(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace the content of `path` atomically: even after a kill, a reader sees the old content or the new."""
    temporary = path.with_name(f".writing-{path.name}")

    def replace() -> None:
        try:
            write_durably(temporary, data)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    try:
        try_again(replace)
    except FileNotFoundError:  # another process has replaced the same file meanwhile
        replace()
    sync_folder(path.parent)


def share_as_folder(file: Path) -> None:
    """Let those read `file` who may read its folder: safetensors writes files for their owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def write_once(path: Path, text: str) -> str:
    """Have `text` be the content of a new file that only its owner can read; returns the content that it has got.

    Of several processes at once, on one machine or several, one has its way. Raises OSError.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush(file.fileno())
        with contextlib.suppress(FileExistsError):
            try:
                os.link(name, path)
            except OSError as error:
                if isinstance(error, FileExistsError):
                    raise
                if not path.exists():  # a disk without hard links
                    os.rename(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return path.read_text(encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents; flush their entries, so that they survive a power failure."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def see_anew(folder: Path) -> None:
    """Have a network disk tell what others have made in a folder: its client asks anew once it has changed it."""
    probe = folder / f".probe-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        probe.touch()
        probe.unlink()


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
        flush(handle)
    finally:
        os.close(handle)
