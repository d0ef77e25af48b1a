"""Offloading that cannot work is refused before anything is loaded, and NVMe's buffers follow from the base."""

import math

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from ptune_dist.base.layers import layers_of
from ptune_dist.zero.offload import settle_offload
from tests.base.bases import error_of, open_only

needs_aio = pytest.mark.skipif(not AsyncIOBuilder().is_compatible(verbose=False), reason="no libaio")


@pytest.fixture(scope="module")
def model(llama):
    return open_only(llama).model


def settle(model, world_size: int | None = 1, **zero) -> dict:
    content = {"zero_optimization": {"stage": 3} | zero}
    settle_offload(content, model, world_size, "ds.json")
    return content["zero_optimization"]


def refusal(model, world_size: int | None = 1, **zero) -> str:
    return error_of(settle, model, world_size, starts="ds.json: zero_optimization.", **zero)


# What is refused


@pytest.mark.parametrize("section", ["offload_param", "offload_optimizer"])
def test_a_device_that_is_none_is_named(model, section):
    message = refusal(model, **{section: {"device": "gpu"}})
    assert f"{section}.device is 'gpu', not none, cpu or nvme" in message


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_nontrainable_weights", "mics_shard_size"])
def test_what_deepspeed_does_to_whole_tensors_is_refused_with_what_to_use_instead(model, key):
    assert f"{key} is not for a base that is loaded by parts: use " in refusal(model, **{key: 2})
    assert settle(model, **{key: -1 if key == "mics_shard_size" else False})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_offloading_the_base_needs_stage_3(model, stage):
    assert f"needs stage 3, not {stage}" in refusal(model, stage=stage, offload_param={"device": "cpu"})
    settle(model, stage=stage, offload_param={"device": "none"}, offload_optimizer={"device": "cpu"})


@pytest.mark.parametrize("section", ["offload_param", "offload_optimizer"])
def test_nvme_needs_a_folder_that_can_be_written_to(model, tmp_path, section):
    assert f"{section}.nvme_path is missing" in refusal(model, **{section: {"device": "nvme"}})
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "folder")  # not even root can make it
    message = refusal(model, **{section: {"device": "nvme", "nvme_path": below}})
    assert f"{section}.nvme_path: {below} is not writable: Not a directory" in message


def test_without_a_world_nothing_is_asked_of_the_machine(model, tmp_path):
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "new")}
    settle(model, None, offload_param=offload)
    settle(model, None, zero_hpz_partition_size=3)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("world_size, size, stage", [(4, 3, 3), (2, 4, 3), (4, 2, 2)])
def test_a_node_size_that_does_not_divide_the_ranks_is_refused(model, world_size, size, stage):
    message = refusal(model, world_size, stage=stage, zero_hpz_partition_size=size)
    assert f"zero_hpz_partition_size is {size}" in message
    assert f"stage {stage} and {world_size} ranks" in message


@pytest.mark.parametrize("world_size, size", [(4, 1), (4, 2), (4, 4), (1, 1)])
def test_a_node_size_that_divides_the_ranks_is_taken(model, world_size, size):
    settle(model, world_size, zero_hpz_partition_size=size)


# What is filled in


@needs_aio
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("int8", [None, {"include": [], "threshold": None}], ids=["float", "int8"])
def test_buffers_hold_a_ranks_part_of_any_tensor_of_a_layer(llama, tmp_path, world_size, int8):
    model = open_only(llama, int8=int8).model
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": "auto", "buffer_size": "auto"}
    filled = settle(model, world_size, offload_param=offload)["offload_param"]
    layer = [p.numel() for p in layers_of(model)[0].parameters()]
    assert filled["buffer_size"] >= math.ceil(max(layer) / world_size)
    assert filled["buffer_count"] >= 2 * len(layer)  # the layer at work and the next


@needs_aio
def test_buffers_that_are_given_stay(model, tmp_path):
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 7, "buffer_size": 12345}
    filled = settle(model, 2, offload_param=offload)["offload_param"]
    assert (filled["buffer_count"], filled["buffer_size"]) == (7, 12345)


@needs_aio
def test_every_process_has_a_new_folder_and_nobody_elses_is_touched(model, tmp_path):
    (tmp_path / "ptune-other").mkdir()
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    first, second = (settle(model, 2, offload_param=dict(offload))["offload_param"]["nvme_path"] for _ in range(2))
    assert first != second and str(tmp_path / "ptune-other") not in (first, second)
    assert (tmp_path / "ptune-other").exists()


@needs_aio
def test_one_rank_on_a_cpu_cannot_have_its_base_on_a_disk(model, tmp_path):
    message = refusal(model, 1, offload_param={"device": "nvme", "nvme_path": str(tmp_path)})
    assert "nvme needs a GPU, or 2 ranks on a CPU" in message


def test_a_disk_and_shards_within_a_node_exclude_each_other(model, tmp_path):
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    assert "not on nvme" in refusal(model, 2, offload_param=offload, zero_hpz_partition_size=2)


def test_what_is_not_offloaded_is_left_as_it_is(model):
    zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
    assert settle(model, **zero) == zero
