"""What DeepSpeed's JSON says of places beside the GPU, and of shards within a node: checked and filled in.

DeepSpeed itself fails late here: in a collective, in a compiler, or in its swapper's assertions.
"""

import tempfile
from math import ceil
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers import PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.errors import UserError


def settle_offload(content: dict[str, Any], model: PreTrainedModel, world_size: int | None, file: str) -> None:
    """Fill the NVMe buffers that are `auto`; raise UserError for what cannot work.

    Without a `world_size` nothing is asked of the machine.
    """
    zero = content["zero_optimization"]
    if world_size:
        check_node_size(zero, world_size, file)
    for section in ("offload_param", "offload_optimizer"):
        offload = zero.get(section) or {}
        place = offload.get("device", "none")
        if place not in ("none", "cpu", "nvme"):
            raise UserError(f"{file}: zero_optimization.{section}.device is {place!r}, not none, cpu or nvme")
        if section == "offload_param" and place != "none" and zero.get("stage") != 3:
            raise UserError(f"{file}: zero_optimization.offload_param needs stage 3, not {zero.get('stage', 0)}")
        if place == "nvme" and world_size:
            check_nvme(offload, f"{file}: zero_optimization.{section}")
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        fill_buffers(zero["offload_param"], model, world_size or 1)


def check_node_size(zero: dict[str, Any], world_size: int, file: str) -> None:
    """hpZ: as many ranks share a second cut as `zero_hpz_partition_size` says."""
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1 and (zero.get("stage") != 3 or world_size % size):
        raise UserError(
            f"{file}: zero_optimization.zero_hpz_partition_size is {size}: it needs stage 3 and a number of ranks "
            f"that it divides, here stage {zero.get('stage', 0)} and {world_size} ranks"
        )


def check_nvme(offload: dict[str, Any], where: str) -> None:
    """Raise UserError where DeepSpeed could not write there, or has no library to do it with."""
    path = offload.get("nvme_path")
    if not path:
        raise UserError(f"{where}.nvme_path is missing: name a folder on a fast local disk")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{where}.nvme_path: {path} is not writable: {error.strerror}") from None
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(f"{where}: NVMe needs the library libaio with its headers: install libaio-dev (Debian, Ubuntu)")


def fill_buffers(offload: dict[str, Any], model: PreTrainedModel, world_size: int) -> None:
    """Buffers for a rank's part of the largest tensor, enough for two layers at once; there is no use in more."""
    sizes = [p.numel() for p in model.parameters()]
    per_layer = max(len(list(layer.parameters())) for layer in layers_of(model))
    if offload.get("buffer_size", "auto") == "auto":
        offload["buffer_size"] = ceil(max(sizes) / world_size)
    if offload.get("buffer_count", "auto") == "auto":
        offload["buffer_count"] = 2 * per_layer + 2
