"""Locks between processes: flock where the disk has it, elsewhere a lock file whose owner shows that it is alive.

Some network disks (NFS without a lock daemon, buckets that are mounted, some container volumes) refuse flock. There
the owner creates `NAME.owner`, which exists at most once, writes who it is and touches it every few seconds. A lock is
taken over when its owner is dead: at once where the owner ran on this machine, else when the file has not been touched
for STALE_S by the disk's own clock.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ptune_dist.common.files import flush, write_durably

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM)
TOUCH_S = 5.0
STALE_S = 60.0
SETTLE_S = 0.5  # two that take over one dead lock see each other within this time


class Lock:
    """A lock that is held until it is closed or its process ends. A context manager."""

    def __init__(self, file: IO[bytes], owner_file: Path | None = None):
        self.is_by_kernel = owner_file is None
        self._file = file
        self._owner_file = owner_file
        self._is_signed = False
        self._ended = threading.Event()
        if owner_file is not None:
            threading.Thread(target=self._touch, name="lock", daemon=True).start()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._ended.set()
        if self._owner_file is not None:
            with contextlib.suppress(OSError):
                self._owner_file.unlink()
            self._owner_file = None
        if self._is_signed:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), 0)
        self._is_signed = False
        self._file.close()

    def sign(self) -> None:
        """Write who holds the lock into its file, for `find_holder`. Where that cannot be written it is left out."""
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), content)
            self._is_signed = True

    def moved_to(self, folder: Path) -> None:
        """The folder of the locked file has been renamed."""
        if self._owner_file is not None:
            self._owner_file = folder / self._owner_file.name

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_S):
            with contextlib.suppress(OSError):
                if self._owner_file is not None:
                    os.utime(self._owner_file)


def try_lock(path: Path, warn: Callable[[str], None] = lambda _: None) -> Lock | None:
    """Lock the file `path`, which is created; None where another process holds it.

    `warn` gets one line where the disk has no locks. Raises OSError for a file that cannot be opened or written.
    """
    file = open_lock(path)
    owner_file = path.with_name(f"{path.name}.owner")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            found = _take(owner_file)
            if found:
                warn(f"{path.parent} is on a disk without file locks ({error.strerror}): a lock file is used instead")
                return Lock(file, owner_file)
            file.close()
            return None
        if _is_alive(owner_file):  # of a process that found no flock here, on another machine say
            file.close()
            return None
        return Lock(file)
    except BaseException:
        file.close()
        raise


def try_shared_lock(path: Path, warn: Callable[[str], None] = lambda _: None) -> Lock | None:
    """As `try_lock`, for processes that hold a lock together against all others.

    On a disk without locks nothing is locked, after a line that tells so. Raises OSError.
    """
    file = open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            file.close()
            raise
        warn(f"{path.parent} is on a disk without file locks ({error.strerror}): start no other run in it")
    if _is_alive(path.with_name(f"{path.name}.owner")):
        file.close()
        return None
    return Lock(file)


def is_locked_alone(path: Path) -> bool:
    """Whether a process holds the lock of the file `path` against all others, not together with some."""
    try:
        file = share_lock(path)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock yet
        return False
    if file is not None:
        file.close()
    return _is_alive(path.with_name(f"{path.name}.owner"))


class Attendance:
    """The lock of a file that several processes hold together; each can find out whether it is the only one.

    On a disk without locks each takes itself for the only one.
    """

    def __init__(self, path: Path):
        """Raises OSError."""
        self._file = open(path, "a+b")  # noqa: SIM115  # closed with the lock

    def enter(self) -> bool:
        """Become one of them; returns whether there are no others. Until `settle` no other can enter."""
        while True:
            if self._try(fcntl.LOCK_EX):
                return True
            if self._try(fcntl.LOCK_SH):
                return False
            time.sleep(0.05)  # another one has entered as the first, and has not settled

    def settle(self) -> None:
        """Let others enter."""
        self._try(fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Whether this process is the only one. Of two that ask at once, both may hear that they are not."""
        is_alone = self._try(fcntl.LOCK_EX)
        while not self._try(fcntl.LOCK_SH):  # what fails has released the lock, and another may have asked the same
            time.sleep(0.05)
        return is_alone

    def leave(self) -> bool:
        """Leave; returns whether none is left. Of several that leave at once, one at least hears that."""
        self._try(fcntl.LOCK_UN)
        is_last = self._try(fcntl.LOCK_EX)
        self._file.close()
        return is_last

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        return True


def open_lock(path: Path) -> IO[bytes]:
    """The file that is locked. Another user's can be locked all the same on most disks, where it can be read."""
    try:
        return open(path, "ab")
    except PermissionError as error:
        with contextlib.suppress(OSError):
            return open(path, "rb")
        raise error


def share_lock(path: Path) -> IO[bytes] | None:
    """Hold the file `path` against `try_lock` while the returned file is open; None where the disk has no locks.

    Many processes may hold it at once, and may do so on a disk that they can only read. Raises BlockingIOError where
    another process has locked it, and OSError for a file that is not there.
    """
    file = open(path, "rb")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in WITHOUT_LOCKS:
            return None
        raise
    return file


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the file `path`."""
    try:
        with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it may be held together
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:  # there is no lock yet
            return False
    return _is_alive(path.with_name(f"{path.name}.owner"))


def find_holder(path: Path) -> tuple[str, int] | None:
    """The host and the process id of whoever has signed a lock that is held; None where that is not known."""
    try:
        found = json.loads(path.read_bytes())
        return str(found["host"]), int(found["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _take(owner_file: Path) -> bool:
    """Create the owner's file, or replace that of a dead owner; False where the owner lives."""
    content = json.dumps(_describe_self()).encode()
    try:
        with open(owner_file, "xb") as file:
            file.write(content)
            file.flush()
            flush(file.fileno())
        return True
    except FileExistsError:
        if _is_alive(owner_file):
            return False
    aside = owner_file.with_name(f"{owner_file.name}-{secrets.token_hex(8)}")
    try:
        write_durably(aside, content)
        if _is_alive(owner_file):
            return False
        os.replace(aside, owner_file)
        time.sleep(SETTLE_S)
        return owner_file.read_bytes() == content
    except FileNotFoundError:  # released by one that took it over and is done
        return False
    finally:
        aside.unlink(missing_ok=True)


def _describe_self() -> dict[str, object]:
    own = os.getpid()
    return {"machine": _machine(), "pid": own, "started": _start_of(own), "token": secrets.token_hex(8)}


def _is_alive(owner_file: Path) -> bool:
    """Whether the lock's owner lives, as far as can be seen from here."""
    try:
        touched = owner_file.stat().st_mtime
    except OSError:
        return False
    try:
        owner = json.loads(owner_file.read_bytes())
        if owner["machine"] == _machine() and sys.platform == "linux":
            return _start_of(owner["pid"]) == owner["started"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):  # another user's, being written, or damaged
        pass
    return _disk_time(owner_file.parent) - touched < STALE_S


def _machine() -> str:
    """The name of this machine since its last boot, and of its own process ids where it is a container."""
    parts = [socket.gethostname()]
    for path, read in (("/proc/sys/kernel/random/boot_id", _read), ("/proc/self/ns/pid", os.readlink)):
        with contextlib.suppress(OSError):
            parts.append(read(path).strip())
    return " ".join(parts)


def _read(path: str) -> str:
    return Path(path).read_text()


def _start_of(pid: int) -> str | None:
    """When a process was started, in ticks since boot (proc(5)); None if it is dead."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _disk_time(folder: Path) -> float:
    """The time by the clock of the disk, which may be another machine's."""
    probe = folder / f".clock-{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
