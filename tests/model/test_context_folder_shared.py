"""Processes that share a folder of contexts, and are killed while writing, do each other no harm."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.model.cached import build_cache, same_bits, stored_files, tensors_of, tokens_of
from tests.processes import process_env

BIG_BYTES = 32 << 20
START = """
import os, random, shutil, sys, time
from pathlib import Path
from tests.model.cached import *
from tests.model.test_context_folder_shared import BIG_BYTES
folder = Path(sys.argv[1])
"""


def start_script(script: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START + script, str(folder)], env=process_env(), text=True, stderr=subprocess.PIPE
    )


def kill_in_mid_write(writer: subprocess.Popen, folder: Path) -> list[Path]:
    """Kill the writer while a file is half written; returns the temporary files that it leaves."""
    while writer.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(0 < file.stat().st_size < BIG_BYTES for file in folder.glob("*/.writing/*.tmp")):
                os.kill(writer.pid, signal.SIGKILL)
                writer.communicate()
    assert writer.returncode == -signal.SIGKILL, writer.communicate()[1]
    return list(folder.glob("*/.writing/*.tmp"))


@pytest.mark.extended
@pytest.mark.long
def test_a_writer_killed_in_mid_write_leaves_nothing_that_could_be_read_wrongly(tmp_path):
    script = """
for number in range(1000):
    build_cache(folder).put(tokens_of(number), tensors_of(number, num_bytes=BIG_BYTES))
"""
    for _ in range(5):  # now and then the file is finished before the signal arrives
        if leftovers := kill_in_mid_write(start_script(script, tmp_path), tmp_path):
            break
    (leftover,) = leftovers
    assert leftover.stat().st_size < BIG_BYTES
    cache = build_cache(tmp_path)
    num_files = len(list(tmp_path.glob("*/*.safetensors")))
    for number in range(num_files):
        assert same_bits(cache.get(tokens_of(number)), tensors_of(number, num_bytes=BIG_BYTES))
    assert cache.get(tokens_of(num_files)) is None and not cache.warnings
    assert leftover.exists()  # it might belong to a live writer
    hours_ago = time.time() - 2 * 3600
    os.utime(leftover, (hours_ago, hours_ago))
    build_cache(tmp_path, identity="another base")
    assert not leftover.exists()
    shutil.rmtree(tmp_path)  # pytest would keep it


def test_processes_that_share_a_folder_write_read_and_remove_without_harm(tmp_path):
    script = """
random.seed(os.getpid())
cache = build_cache(folder, num_items=2)
until = time.monotonic() + 1.5
while time.monotonic() < until:
    number = random.randrange(8)
    found = cache.get(tokens_of(number))
    assert found is None or same_bits(found, tensors_of(number))
    if found is None:
        cache.put(tokens_of(number), tensors_of(number))
    if random.random() < 0.2:
        cache.disk.path_of(cache.key_of(tokens_of(number))).unlink(missing_ok=True)
    if random.random() < 0.01:
        shutil.rmtree(folder, ignore_errors=True)
assert cache.disk_hits > 10 and cache.misses > 10 and cache.disk.writable and not cache.warnings, vars(cache)
"""
    sharers = [start_script(script, tmp_path) for _ in range(2)]
    for sharer in sharers:
        _, errors = sharer.communicate(timeout=60)
        assert sharer.returncode == 0, errors
    cache = build_cache(tmp_path)
    for number in range(8):
        found = cache.get(tokens_of(number))
        assert found is None or same_bits(found, tensors_of(number))
    assert not cache.warnings and not list(tmp_path.glob("*/.writing/*"))


def test_two_writers_of_one_context_leave_one_sound_file(tmp_path, monkeypatch):
    first = build_cache(tmp_path)
    second = build_cache(tmp_path)
    replace = os.replace

    def overtaken(source, target):
        monkeypatch.setattr(os, "replace", replace)
        second.put(tokens_of(0), tensors_of(0))
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    first.put(tokens_of(0), tensors_of(0))
    assert len(stored_files(tmp_path)) == 1
    assert same_bits(first.get(tokens_of(0)), tensors_of(0)) and not first.warnings + second.warnings


def test_a_folder_emptied_while_a_file_is_written_costs_that_file_only(tmp_path, monkeypatch):
    cache = build_cache(tmp_path)
    replace = os.replace

    def emptied(source, target):
        shutil.rmtree(tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", emptied)
    cache.put(tokens_of(0), tensors_of(0))
    monkeypatch.setattr(os, "replace", replace)
    assert cache.get(tokens_of(0)) is None
    cache.put(tokens_of(0), tensors_of(0))
    assert same_bits(cache.get(tokens_of(0)), tensors_of(0)) and not cache.warnings
