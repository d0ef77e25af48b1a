"""A lock has one owner at a time, with flock and on disks without it, and that of a dead owner is taken over."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptune_dist.common import locks
from ptune_dist.common.locks import is_locked, try_lock, try_shared_lock
from tests.processes import process_env

CHILD = """
import sys
from pathlib import Path
from ptune_dist.common.locks import try_lock
lock = try_lock(Path(sys.argv[1]), lambda line: print("warned:", line, flush=True))
print("held" if lock else "refused", flush=True)
if lock and sys.argv[2] == "stay":
    sys.stdin.read()
"""
ENOLCK, EOPNOTSUPP, ENOSYS = 37, 95, 38


@pytest.fixture(scope="module")
def shims(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Libraries whose flock fails, by the error that it gives."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make a disk without flock")
    folder = tmp_path_factory.mktemp("shims")
    found = {}
    for number in (ENOLCK, EOPNOTSUPP, ENOSYS):
        source = folder / f"{number}.c"
        source.write_text(f"#include <errno.h>\nint flock(int fd, int op) {{ errno = {number}; return -1; }}\n")
        found[number] = str(source.with_suffix(".so"))
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", found[number], source], check=True)
    return found


def start(path: Path, what: str, shim: str | None) -> subprocess.Popen[str]:
    env = process_env({"LD_PRELOAD": shim} if shim else None)
    command = [sys.executable, "-c", CHILD, str(path), what]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answers(path: Path, shim: str | None) -> list[str]:
    child = start(path, "end", shim)
    return child.communicate()[0].splitlines()


@pytest.mark.parametrize("number", [None, ENOLCK, EOPNOTSUPP, ENOSYS])
def test_a_lock_is_held_once_and_taken_over_from_a_killed_owner(tmp_path, shims, number):
    path = tmp_path / ".lock"
    shim = shims[number] if number else None
    owner = start(path, "stay", shim)
    first = [owner.stdout.readline().strip()]
    if number:
        assert first[0].startswith(f"warned: {tmp_path} is on a disk without file locks (")
        first.append(owner.stdout.readline().strip())
    assert first[-1] == "held"
    assert answers(path, shim) == ["refused"]
    if number:  # who has flock sees who has not
        assert try_lock(path) is None
    assert is_locked(path)
    owner.kill()
    owner.communicate()
    assert not is_locked(path)
    assert answers(path, shim)[-1] == "held"


def test_a_released_lock_can_be_taken_again(tmp_path):
    with try_lock(tmp_path / ".lock"):
        assert is_locked(tmp_path / ".lock")
        assert try_lock(tmp_path / ".lock") is None
    assert not is_locked(tmp_path / ".lock")
    assert try_lock(tmp_path / ".lock") is not None


def test_an_owner_on_another_machine_lives_as_long_as_it_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "SETTLE_S", 0.01)
    owner_file = tmp_path / ".lock.owner"
    owner_file.write_text(json.dumps({"machine": "another", "pid": 1, "started": "1"}))
    assert try_lock(tmp_path / ".lock") is None and is_locked(tmp_path / ".lock")
    os.utime(owner_file, (time.time() - 2 * locks.STALE_S,) * 2)
    assert not is_locked(tmp_path / ".lock")
    with try_lock(tmp_path / ".lock") as lock:
        assert lock and json.loads(owner_file.read_text())["pid"] == os.getpid()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock"]


def test_the_owner_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "TOUCH_S", 0.02)
    with try_lock(tmp_path / ".lock"):
        os.utime(tmp_path / ".lock.owner", (1, 1))
        deadline = time.monotonic() + 5
        while (tmp_path / ".lock.owner").stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / ".lock.owner").stat().st_mtime > 1


def test_an_error_that_is_not_about_locks_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / "none" / ".lock")


def refuse(*_: object) -> None:
    raise OSError(ENOLCK, os.strerror(ENOLCK))


def test_a_lock_that_is_shared_is_held_against_all_others(tmp_path):
    path = tmp_path / ".lock"
    with try_shared_lock(path) as first:
        assert first and is_locked(path) and try_lock(path) is None
        with try_shared_lock(path) as second:
            assert second is not None
        assert is_locked(path) and try_lock(path) is None
    assert not is_locked(path)
    with try_lock(path) as alone:
        assert alone and try_shared_lock(path) is None


def test_without_locks_a_shared_one_warns_and_respects_an_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    said = []
    with try_shared_lock(tmp_path / ".lock", said.append) as lock:
        assert lock and "is on a disk without file locks" in said[0]
    with try_lock(tmp_path / ".lock"):
        assert try_shared_lock(tmp_path / ".lock", said.append) is None
