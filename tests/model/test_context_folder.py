"""A folder of contexts returns every bit or nothing, and never fails a run."""

import contextlib
import os
import resource
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ptune_dist.errors import UserError
from ptune_dist.model import context_cache
from tests.model.cached import ITEM_BYTES, build_cache, same_bits, stored_files, tensors_of, tokens_of


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
        "keys": both[0],
        "values": both[1],
        "again": both[1],
        "turned": both.mT,
        "wide": both[:1].expand(5, 3, 4),
        "scalar": torch.tensor(3.0, requires_grad=True),
        "empty": torch.empty(0, 7),
        "mask": torch.tensor([True]),
    }
    cache = build_cache(tmp_path)
    cache.put(tokens_of(0), tensors)
    found = cache.get(tokens_of(0))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


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
    stored.write_bytes(context_cache.pack(tensors_of(1), key_of_other))  # valid, under the name of another context
    assert_removed_and_missed(tmp_path, stored)
    stored.write_bytes(whole)
    assert same_bits(build_cache(tmp_path).get(tokens_of(0)), tensors_of(0))


def test_a_file_that_cannot_be_read_is_a_miss_with_one_warning(tmp_path, stored):
    stored.unlink()
    stored.mkdir()
    cache = build_cache(tmp_path)
    for _ in range(3):
        assert cache.get(tokens_of(0)) is None
        cache.put(tokens_of(0), tensors_of(0))
    assert cache.misses == 3
    assert len(cache.warnings) == 1 and "cannot be read" in cache.warnings[0]


@contextlib.contextmanager
def largest_file(num_bytes: int):
    """The kernel stops a larger write in the middle, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_in_mid_write_gives_one_warning_and_is_then_only_read(tmp_path, stored):
    cache = build_cache(tmp_path, num_items=1)
    with largest_file(500):
        for number in range(1, 6):
            cache.put(tokens_of(number), tensors_of(number))
    assert len(cache.warnings) == 1 and "cannot write" in cache.warnings[0] and "File too large" in cache.warnings[0]
    assert same_bits(cache.get(tokens_of(5)), tensors_of(5))  # memory still works
    assert same_bits(cache.get(tokens_of(0)), tensors_of(0))  # and so does reading
    assert stored_files(tmp_path) == [stored]  # nothing half-written


@contextlib.contextmanager
def ordinary_user():
    """Permissions apply to root too."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_folder_that_becomes_read_only_gives_one_warning_and_is_then_only_read():
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
        (1000 * GIB, GIB + 10_000, True),
        (1000 * GIB, GIB - 1, False),
        (1000 * GIB, GIB + ITEM_BYTES - 1, False),
        (10 * GIB, GIB // 4, True),
        (10 * GIB, GIB // 6, False),  # 2% are 0.2 GiB
        (0, 0, True),  # a file system that reports no size
    ],
)
def test_the_last_of_a_disk_is_left_free(total, free, written, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=total, free=free)
    monkeypatch.setattr(context_cache.shutil, "disk_usage", lambda folder: usage)
    cache = build_cache(tmp_path)
    for number in range(3):
        cache.put(tokens_of(number), tensors_of(number))
    assert len(stored_files(tmp_path)) == (3 if written else 0)
    assert len(cache.warnings) == (0 if written else 1)
    usage.total = 1000 * GIB
    usage.free = 500 * GIB  # someone made room
    cache.put(tokens_of(9), tensors_of(9))
    assert same_bits(cache.get(tokens_of(9)), tensors_of(9))
