"""The context cache gives back what was put in, keeps to its budget, and is never what a run dies of."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ptune_dist.base import context_cache
from ptune_dist.base.context_cache import ContextCache
from ptune_dist.errors import UserError
from tests.conftest import process_env

ITEM_BYTES = 800  # of `tensors_of`


def tokens_of(number: int) -> np.ndarray:
    return np.arange(number, number + 5)


def tensors_of(number: int, dtype=torch.float32, num_bytes: int = ITEM_BYTES) -> dict[str, torch.Tensor]:
    """Random bits, the same for the same number: as floats they hold NaNs and every kind of small number too."""
    bits = torch.Generator().manual_seed(number)
    return {
        name: torch.randint(0, 256, (2, num_bytes // 4), dtype=torch.uint8, generator=bits).view(dtype)
        for name in ("layer 0 keys", "layer 0 values")
    }


def same_bits(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == expected.keys() and all(
        found[k].dtype == t.dtype and found[k].shape == t.shape
        and torch.equal(found[k].view(torch.uint8), t.view(torch.uint8))
        for k, t in expected.items()
    )  # fmt: skip


def build_cache(folder: Path | None = None, *, num_items: int = 0, identity="a base", **options) -> ContextCache:
    """A cache with room for `num_items`; its warnings are in `.warnings`."""
    warnings = []
    cache = ContextCache(
        max_bytes=num_items * ITEM_BYTES, folder=folder, identity=identity, warn=warnings.append, **options
    )
    cache.warnings = warnings
    return cache


def stored_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def stored(tmp_path) -> Path:
    """The file of context 0 in `tmp_path`."""
    build_cache(tmp_path).put(tokens_of(0), tensors_of(0))
    (file,) = stored_files(tmp_path)
    return file


def test_the_least_recently_used_goes_first():
    cache = build_cache(num_items=3)
    for number in range(3):
        cache.put(tokens_of(number), tensors_of(number))
    cache.get(tokens_of(0))  # used again: now 1, 2, 0
    cache.put(tokens_of(1), tensors_of(1))  # put again: now 2, 0, 1
    for newcomer, gone in ((3, 2), (4, 0), (5, 1), (6, 3)):
        assert cache.key_of(tokens_of(gone)) in cache.held
        cache.put(tokens_of(newcomer), tensors_of(newcomer))
        assert cache.key_of(tokens_of(gone)) not in cache.held
    assert [cache.get(tokens_of(number)) is not None for number in range(7)] == [False] * 4 + [True] * 3


def test_the_budget_is_kept_to_the_byte():
    cache = ContextCache(max_bytes=3 * ITEM_BYTES, folder=None, identity="")
    for number in range(20):
        cache.put(tokens_of(number), tensors_of(number))
        assert (cache.num_held, cache.held_bytes) == (min(number + 1, 3), min(number + 1, 3) * ITEM_BYTES)
    cache.put(tokens_of(100), {"a": torch.zeros(1, dtype=torch.int8)})
    assert (cache.num_held, cache.held_bytes) == (3, 2 * ITEM_BYTES + 1)
    cache.put(tokens_of(101), tensors_of(101, num_bytes=2 * ITEM_BYTES))
    assert (cache.num_held, cache.held_bytes) == (2, 2 * ITEM_BYTES + 1)
    cache.put(tokens_of(101), tensors_of(101))  # in place of the larger one
    assert (cache.num_held, cache.held_bytes) == (2, ITEM_BYTES + 1)


def test_an_item_larger_than_the_budget_is_not_held_and_drives_nothing_out():
    cache = build_cache(num_items=2)
    cache.put(tokens_of(0), tensors_of(0))
    cache.put(tokens_of(1), tensors_of(1, num_bytes=2 * ITEM_BYTES + 16))
    assert cache.get(tokens_of(1)) is None and cache.get(tokens_of(0)) is not None
    assert cache.held_bytes == ITEM_BYTES


def test_tensors_are_held_as_given_but_a_view_does_not_hold_its_storage():
    cache = build_cache(num_items=100)
    batch = torch.randn(8, 10, requires_grad=True)
    whole = torch.randn(4, 10)
    cache.put(tokens_of(0), {"row": batch[3], "whole": whole, "turned": whole.T})
    found = cache.get(tokens_of(0))
    assert torch.equal(found["row"], batch[3]) and not found["row"].requires_grad
    assert found["row"].untyped_storage().nbytes() == 40
    assert found["whole"].data_ptr() == found["turned"].data_ptr() == whole.data_ptr()


def test_what_a_caller_does_to_the_dict_does_not_reach_the_cache():
    cache = build_cache(num_items=1)
    given = tensors_of(0)
    cache.put(tokens_of(0), given)
    given.clear()
    cache.get(tokens_of(0)).clear()
    assert same_bits(cache.get(tokens_of(0)), tensors_of(0))


def test_another_identity_or_other_tokens_miss(tmp_path):
    build_cache(tmp_path).put(tokens_of(0), tensors_of(0))
    other = build_cache(tmp_path, identity="another base")
    assert other.get(tokens_of(0)) is None
    other.put(tokens_of(0), tensors_of(1))
    assert same_bits(other.get(tokens_of(0)), tensors_of(1))
    same = build_cache(tmp_path)
    assert same_bits(same.get(tokens_of(0)), tensors_of(0))
    assert same.get(tokens_of(0)[:4]) is None and same.get(tokens_of(1)) is None
    assert len({file.parent for file in stored_files(tmp_path)}) == 2
    assert other.key_of(tokens_of(0)) != same.key_of(tokens_of(0))  # even a file moved between the two is not believed


def test_the_key_depends_on_the_tokens_and_not_on_their_integer_type():
    cache = build_cache()
    tokens = tokens_of(7)
    for dtype in ("<i4", ">i4", "<u2", ">i8"):
        assert cache.key_of(tokens.astype(dtype)) == cache.key_of(tokens)
    strided = np.stack([tokens, tokens], axis=1)[:, 0]
    assert cache.key_of(strided) == cache.key_of(tokens)
    assert len({cache.key_of(np.zeros(length, dtype=int)) for length in range(4)}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_the_folder_gives_back_every_bit(dtype, tmp_path):
    for number in range(3):
        build_cache(tmp_path).put(tokens_of(number), tensors_of(number, dtype))
    cache = build_cache(tmp_path, num_items=3)
    for number in (2, 0, 1):
        assert same_bits(cache.get(tokens_of(number)), tensors_of(number, dtype))
    assert (cache.hits, cache.disk_hits, cache.num_held) == (3, 3, 3)
    shutil.rmtree(tmp_path)
    assert same_bits(cache.get(tokens_of(0)), tensors_of(0, dtype))  # from memory by now
    assert (cache.hits, cache.disk_hits, cache.warnings) == (4, 3, [])


def test_tensors_of_any_shape_and_any_sharing_survive_the_folder(tmp_path):
    both = torch.randn(2, 3, 4)
    tensors = {
        "keys": both[0], "values": both[1], "again": both[1], "turned": both.mT, "wide": both[:1].expand(5, 3, 4),
        "scalar": torch.tensor(3.0, requires_grad=True), "empty": torch.empty(0, 7), "mask": torch.tensor([True]),
    }  # fmt: skip
    cache = build_cache(tmp_path)
    cache.put(tokens_of(0), tensors)
    found = cache.get(tokens_of(0))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_memory_drives_out_is_in_the_folder_and_is_written_once(tmp_path):
    cache = build_cache(tmp_path, num_items=2)
    for number in range(4):
        cache.put(tokens_of(number), tensors_of(number))
    assert len(stored_files(tmp_path)) == 2 and cache.num_held == 2
    for number in (0, 1, 2, 3) * 2:
        assert same_bits(cache.get(tokens_of(number)), tensors_of(number))
    inodes = {file: file.stat().st_ino for file in stored_files(tmp_path)}
    assert len(inodes) == 4
    for number in (0, 1, 2, 3) * 2:
        cache.get(tokens_of(number))
        cache.put(tokens_of(number), tensors_of(number))
    assert {file: file.stat().st_ino for file in stored_files(tmp_path)} == inodes
    assert (cache.misses, cache.held_bytes) == (0, 2 * ITEM_BYTES)


def test_what_comes_from_the_folder_is_on_the_cache_s_device(tmp_path, stored):
    for num_items in (0, 1):
        found = build_cache(tmp_path, num_items=num_items, device="meta").get(tokens_of(0))
        assert {tensor.device.type for tensor in found.values()} == {"meta"}


def test_hits_and_misses_are_counted(tmp_path, stored):
    cache = build_cache(tmp_path, num_items=2)
    assert cache.take_counts() == (0, 0)
    for number in (0, 0, 1):  # from disk, from memory, nowhere
        cache.get(tokens_of(number))
    assert (cache.hits, cache.disk_hits, cache.misses) == (2, 1, 1)
    assert cache.take_counts() == (2, 1)
    cache.put(tokens_of(1), tensors_of(1))
    cache.get(tokens_of(1))
    assert cache.take_counts() == (1, 0) and cache.take_counts() == (0, 0)
    assert (cache.hits, cache.disk_hits, cache.misses) == (3, 1, 1)


def assert_removed_and_missed(folder: Path, file: Path) -> None:
    cache = build_cache(folder, num_items=1)
    assert cache.get(tokens_of(0)) is None
    assert (cache.hits, cache.disk_hits, cache.misses, cache.num_held) == (0, 0, 1, 0)
    assert not file.exists()
    assert len(cache.warnings) == 1 and f"{file} is damaged" in cache.warnings[0]


def test_a_file_cut_anywhere_is_removed_and_missed(tmp_path, stored):
    whole = stored.read_bytes()
    for length in {0, 1, 7, 8, 9, len(whole) // 3, len(whole) - ITEM_BYTES, len(whole) - 1}:
        stored.write_bytes(whole[:length])
        assert_removed_and_missed(tmp_path, stored)
    stored.write_bytes(whole + b"\0")
    assert_removed_and_missed(tmp_path, stored)
    cache = build_cache(tmp_path)
    cache.put(tokens_of(0), tensors_of(0))  # and can be written again
    assert same_bits(cache.get(tokens_of(0)), tensors_of(0))


def test_any_flipped_bit_is_noticed(tmp_path, stored):
    whole = stored.read_bytes()
    key = stored.stem
    assert same_bits(context_cache.unpack(whole, key), tensors_of(0))
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError):
            context_cache.unpack(bytes(damaged), key)
    stored.write_bytes(bytes(damaged))
    assert_removed_and_missed(tmp_path, stored)


def test_a_foreign_file_is_removed_and_missed(tmp_path, stored):
    whole = stored.read_bytes()
    key_of_other = build_cache().key_of(tokens_of(1))
    without_metadata = context_cache.save(tensors_of(0))
    deep = len(b"[" * 50_000).to_bytes(8, "little") + b"[" * 50_000
    for content in (b"text\n", bytes(1000), os.urandom(1000), b"\xff" * 100, deep, without_metadata):
        stored.write_bytes(content)
        assert_removed_and_missed(tmp_path, stored)
    stored.write_bytes(context_cache.pack(tensors_of(1), key_of_other))  # sound, under the name of another context
    assert_removed_and_missed(tmp_path, stored)
    stored.write_bytes(whole)
    assert same_bits(build_cache(tmp_path).get(tokens_of(0)), tensors_of(0))


def test_a_file_that_cannot_be_read_is_a_miss_said_once(tmp_path, stored):
    stored.unlink()
    stored.mkdir()
    cache = build_cache(tmp_path)
    for _ in range(3):
        assert cache.get(tokens_of(0)) is None
        cache.put(tokens_of(0), tensors_of(0))
    assert cache.misses == 3
    assert len(cache.warnings) == 1 and "cannot be read" in cache.warnings[0]


BIG_BYTES = 32 << 20
START = """
import os, random, sys, time
from pathlib import Path
from tests.base.test_context_cache import *
folder = Path(sys.argv[1])
"""


def start_script(script: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START + script, str(folder)], env=process_env(), text=True, stderr=subprocess.PIPE
    )


def kill_in_mid_write(writer: subprocess.Popen, folder: Path) -> list[Path]:
    """Kill the writer when it is seen at a half-written file; what it leaves aside."""
    while writer.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(0 < file.stat().st_size < BIG_BYTES for file in folder.glob("*/.writing/*.tmp")):
                os.kill(writer.pid, signal.SIGKILL)
                writer.communicate()
    assert writer.returncode == -signal.SIGKILL, writer.communicate()[1]
    return list(folder.glob("*/.writing/*.tmp"))


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
    assert leftover.exists()  # it might be a live writer's
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
    first, second = build_cache(tmp_path), build_cache(tmp_path)
    replace = os.replace

    def overtaken(source, target):
        monkeypatch.setattr(os, "replace", replace)
        second.put(tokens_of(0), tensors_of(0))
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    first.put(tokens_of(0), tensors_of(0))
    assert len(stored_files(tmp_path)) == 1
    assert same_bits(first.get(tokens_of(0)), tensors_of(0)) and not first.warnings + second.warnings


@contextlib.contextmanager
def largest_file(num_bytes: int):
    """The kernel refuses to write more into one file, in mid-write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_in_mid_write_is_said_once_and_then_only_read(tmp_path, stored):
    cache = build_cache(tmp_path, num_items=1)
    with largest_file(500):
        for number in range(1, 6):
            cache.put(tokens_of(number), tensors_of(number))
    assert len(cache.warnings) == 1 and "cannot write" in cache.warnings[0] and "File too large" in cache.warnings[0]
    assert same_bits(cache.get(tokens_of(5)), tensors_of(5))  # memory goes on
    assert same_bits(cache.get(tokens_of(0)), tensors_of(0))  # and so does reading
    assert stored_files(tmp_path) == [stored]  # nothing half-written


@contextlib.contextmanager
def ordinary_user():
    """Permissions bind root too."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_folder_that_becomes_read_only_is_said_once_and_then_only_read():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        cache = build_cache(folder)
        cache.put(tokens_of(0), tensors_of(0))
        paths = [folder, *folder.glob("*"), *folder.glob("*/.writing")]
        for path in paths:
            path.chmod(0o555)
        with ordinary_user():
            for number in range(1, 4):
                cache.put(tokens_of(number), tensors_of(number))
                assert cache.get(tokens_of(number)) is None
            assert same_bits(cache.get(tokens_of(0)), tensors_of(0))
            with pytest.raises(UserError, match="^train.context_cache_dir: .*another"):
                build_cache(folder / "another")
            readers = build_cache(folder)  # a folder that others filled may be used without writing to it
            assert same_bits(readers.get(tokens_of(0)), tensors_of(0))
        for path in paths:
            path.chmod(0o755)
        assert len(cache.warnings) == 1 and "Permission denied" in cache.warnings[0]


def test_a_folder_that_cannot_be_made_is_the_user_s_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="^train.context_cache_dir: .*file.* cannot be made"):
            build_cache(folder)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("total", "free", "written"),
    [
        (1000 * GIB, GIB + 10_000, True), (1000 * GIB, GIB - 1, False), (1000 * GIB, GIB + ITEM_BYTES - 1, False),
        (10 * GIB, GIB // 4, True), (10 * GIB, GIB // 6, False),  # 2% are 0.2 GiB
        (0, 0, True),  # a file system that does not say
    ],
)  # fmt: skip
def test_the_last_of_a_disk_is_left_free(total, free, written, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=total, free=free)
    monkeypatch.setattr(context_cache.shutil, "disk_usage", lambda folder: usage)
    cache = build_cache(tmp_path)
    for number in range(3):
        cache.put(tokens_of(number), tensors_of(number))
    assert len(stored_files(tmp_path)) == (3 if written else 0)
    assert len(cache.warnings) == (0 if written else 1)
    usage.total, usage.free = 1000 * GIB, 500 * GIB  # someone made room
    cache.put(tokens_of(9), tensors_of(9))
    assert same_bits(cache.get(tokens_of(9)), tensors_of(9))


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
