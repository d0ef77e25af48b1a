"""A file is complete or absent, whatever happens to its writer."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptune_dist.common.files import fault_on_failed_write, make_folder, replace_file, write_durably
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
