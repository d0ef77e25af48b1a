"""A file is complete or absent, whatever happens to its writer."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from ptune_dist.common.files import replace_file, write_durably
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
