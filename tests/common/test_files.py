"""A file is complete or absent, whatever happens to its writer."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ptune_dist.common import files
from ptune_dist.common.files import (
    describe_os_error,
    explain,
    explain_unreadable,
    fault_on_failed_write,
    find_owner,
    make_folder,
    replace_file,
    see_anew,
    try_again,
    write_durably,
    write_once,
)
from ptune_dist.errors import RunFault
from tests.processes import process_env

NEW = b"new" * 5000
OLD = b"old" * 5000


def test_replacing_gives_the_new_content_and_leaves_no_other_file(tmp_path):
    file = tmp_path / "a.json"
    for content in (OLD, NEW, b""):
        replace_file(file, content)
        assert file.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_process_that_was_frozen_while_another_replaced_the_same_file_replaces_it_again(tmp_path, monkeypatch):
    file = tmp_path / "a.json"

    def freeze(path: Path, data: bytes) -> None:
        monkeypatch.setattr(files, "write_durably", write_durably)
        write_durably(path, data)
        replace_file(file, NEW)

    monkeypatch.setattr(files, "write_durably", freeze)
    replace_file(file, OLD)
    assert file.read_bytes() == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_half_way_leaves_the_old_content_and_no_leftover(tmp_path):
    file = tmp_path / "a.json"
    replace_file(file, OLD)
    script = "import sys; from ptune_dist.common.files import *; replace_file(Path(sys.argv[1]), b'new' * 5000)"
    failed = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        env=process_env(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert "OSError" in failed.stderr and "File too large" in failed.stderr
    assert file.read_bytes() == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_take_the_place_of_a_folder_leaves_no_leftover(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "folder", NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_reader_sees_whole_content_whenever_the_writer_is_killed(tmp_path):
    file = tmp_path / "a.json"
    replace_file(file, OLD)
    script = """
import sys
from ptune_dist.common.files import *
print("ready", flush=True)
while True:
    for content in (b"new" * 5000, b"old" * 5000):
        replace_file(Path(sys.argv[1]), content)
"""
    for number in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(file)], env=process_env(), stdout=subprocess.PIPE, text=True
        )
        writer.stdout.readline()
        until = time.monotonic() + 0.03 + 0.007 * number
        while time.monotonic() < until:
            assert file.read_bytes() in (NEW, OLD)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert file.read_bytes() in (NEW, OLD)
    replace_file(file, NEW)  # the temporary file of a killed writer does no harm
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_durable_write_fails_where_the_folder_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "missing" / "a", NEW)


def test_a_fault_says_which_file_could_not_be_written_and_why():
    for error, reason in (
        (
            OSError(errno.ENOSPC, "No space left on device", "/r/.writing-a"),
            "No space left on device: free some space, then run the same command again",
        ),
        (OSError("the disk is gone"), "the disk is gone"),
    ):
        with pytest.raises(RunFault) as caught, fault_on_failed_write(Path("/r/a")):
            raise error
        assert str(caught.value) == f"cannot write /r/a: {reason}"


def test_a_fault_in_a_folder_names_the_file_in_it(tmp_path):
    for filename, named in ((os.fsencode(tmp_path / "a"), tmp_path / "a"), (None, tmp_path)):
        with pytest.raises(RunFault) as caught, fault_on_failed_write(tmp_path):
            raise OSError(errno.EROFS, "Read-only file system", filename)
        assert str(caught.value) == f"cannot write {named}: Read-only file system: choose a folder on another disk"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device: free some space, then run the same command again"),
        (errno.EDQUOT, "Disk quota exceeded: free some space, then run the same command again"),
        (errno.ESTALE, "Stale file handle: check the disk and its network"),
        (errno.EXDEV, "Invalid cross-device link: choose a folder on another disk"),
        (errno.ENOTDIR, "Not a directory: a folder is needed"),
        (errno.ENAMETOOLONG, "File name too long: choose a shorter path"),
        (errno.ELOOP, "Too many levels of symbolic links: remove its symbolic links"),
        (errno.EACCES, "Permission denied: change its permissions"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_an_error_is_explained_with_what_to_do(tmp_path, number, said):
    error = OSError(number, os.strerror(number), str(tmp_path))
    assert explain(error) == explain(error, tmp_path) == said
    expected = f"{tmp_path}: {said}" if number != errno.EMFILE else None  # which is no state of a disk
    assert describe_os_error(error) == expected
    assert describe_os_error(OSError(number, os.strerror(number))) is None  # nobody knows where


def test_what_belongs_to_somebody_else_is_named_with_its_owner(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    assert find_owner(theirs / "a" / "b") is None
    if os.geteuid():
        pytest.skip("needs root, to make files of another user")
    for user, name in ((65534, "nobody"), (54321, "54321")):
        os.chown(theirs, user, user)
        for path in (theirs, theirs / "a" / "b"):  # the nearest that is there
            assert find_owner(path) == f"{theirs} belongs to user {name}"
        said = f"Permission denied ({theirs} belongs to user {name}): ask for access"
        assert explain(PermissionError(errno.EACCES, "Permission denied", str(theirs / "a"))) == said
    monkeypatch.setattr(os, "geteuid", lambda: 60000)
    assert find_owner(theirs) == f"{theirs} belongs to user 54321"


def test_a_link_that_leads_nowhere_is_named_where_it_is_the_reason(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    for number in (errno.EEXIST, errno.ENOENT, errno.ELOOP):
        error = OSError(number, os.strerror(number), str(link))
        assert explain(error) == f"a symbolic link to {tmp_path}/gone, which leads nowhere: remove it"
    assert explain(OSError(errno.EMFILE, "Too many open files"), link) == "Too many open files"
    assert explain(OSError(errno.ENOENT, "No such file or directory"), tmp_path / "a") == "No such file or directory"


def test_why_a_file_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "a").write_bytes(NEW)
    assert explain_unreadable(tmp_path / "a") is None
    assert explain_unreadable(tmp_path / "b") == "No such file or directory"


def failing(*numbers: int) -> Callable[[], str]:
    """A function that raises these errors, one at each call, and then succeeds."""
    left = list(numbers)

    def function() -> str:
        if left:
            raise OSError(left.pop(0), "fails")
        return "done"

    return function


def test_what_fails_in_passing_is_tried_three_times_and_other_errors_once(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    assert try_again(failing(errno.ESTALE, errno.EIO)) == "done" and pauses == [0.1, 1.0]
    with pytest.raises(OSError, match="fails"):
        try_again(failing(errno.EBUSY, errno.EBUSY, errno.EBUSY))
    pauses.clear()
    with pytest.raises(OSError, match="fails"):
        try_again(failing(errno.ENOSPC))
    assert pauses == []


def test_a_folder_is_changed_to_see_it_anew_and_nothing_is_left(tmp_path):
    os.utime(tmp_path, (0, 0))
    see_anew(tmp_path)
    assert tmp_path.stat().st_mtime > 0 and not list(tmp_path.iterdir())
    see_anew(tmp_path / "missing")


def test_the_reason_why_a_file_could_not_even_be_made_is_not_lost(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            replace_file(tmp_path / "a", NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE


class LateFolder(type(Path())):
    """A folder that another process makes just after this one has looked."""

    def is_dir(self, **options) -> bool:
        found = super().is_dir(**options)
        if not found:
            os.mkdir(self)
        return found


def test_a_folder_that_another_process_makes_at_the_same_time_is_taken(tmp_path):
    make_folder(LateFolder(tmp_path / "a"))
    make_folder(tmp_path / "b" / "c")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c"]


@pytest.mark.parametrize("has_links", [True, False])
def test_of_several_writers_of_a_file_the_first_has_its_way(tmp_path, monkeypatch, has_links):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "secret"
    assert [write_once(path, text) for text in ("first", "second")] == ["first", "first"]
    assert path.stat().st_mode & 0o077 == 0 and list(tmp_path.iterdir()) == [path]
