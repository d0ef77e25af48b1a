"""The context cache returns what was put in, keeps its budget, and tells contexts apart."""

import numpy as np
import torch

from ptune_dist.model.cache_tier import Tier
from ptune_dist.model.context_cache import ContextCache
from tests.model.cached import ITEM_BYTES, build_cache, same_bits, stored_files, tensors_of, tokens_of


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
    assert other.key_of(tokens_of(0)) != same.key_of(tokens_of(0))  # even a file moved between the two is not accepted


def test_the_key_depends_on_the_tokens_and_not_on_their_integer_type():
    cache = build_cache()
    tokens = tokens_of(7)
    for dtype in ("<i4", ">i4", "<u2", ">i8"):
        assert cache.key_of(tokens.astype(dtype)) == cache.key_of(tokens)
    strided = np.stack([tokens, tokens], axis=1)[:, 0]
    assert cache.key_of(strided) == cache.key_of(tokens)
    assert len({cache.key_of(np.zeros(length, dtype=int)) for length in range(4)}) == 4


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


def test_the_device_keeps_what_came_first_and_memory_the_rest():
    cache = build_cache(num_items=2, device_bytes=2 * ITEM_BYTES)
    for number in range(4):
        cache.put(tokens_of(number), tensors_of(number))
    assert cache.held == [cache.key_of(tokens_of(number)) for number in (2, 3)]
    assert cache.held_bytes == 4 * ITEM_BYTES
    for number in (3, 0, 2, 1) * 2:
        assert same_bits(cache.get(tokens_of(number)), tensors_of(number))
    assert (cache.hits, cache.misses) == (8, 0)
    cache.put(tokens_of(4), tensors_of(4))
    assert [cache.get(tokens_of(number)) is None for number in range(5)] == [False, False, False, True, False]


def test_the_device_alone_and_the_folder_behind_it(tmp_path):
    cache = build_cache(tmp_path, device_bytes=ITEM_BYTES)
    for number in (0, 1, 0, 2):
        cache.put(tokens_of(number), tensors_of(number))
    assert len(stored_files(tmp_path)) == 2 and cache.held == [] and cache.held_bytes == ITEM_BYTES
    for number in range(3):
        assert same_bits(cache.get(tokens_of(number)), tensors_of(number))


def test_pinned_memory_counts_as_it_is_allocated():
    tier = Tier(1024, is_pinned=True)
    assert tier.put("a", {"keys": torch.zeros(130)}) == []  # 520 bytes
    assert tier.num_bytes == 1024
    assert [key for key, _ in tier.put("b", {"keys": torch.zeros(1)})] == ["a"]
