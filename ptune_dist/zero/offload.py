"""What DeepSpeed's JSON says of places beside the GPU, and of shards within a node: checked and filled in.

DeepSpeed itself fails late here: in a collective, in a compiler, or in its swapper's assertions.
"""

import atexit
import copy
import shutil
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue] -- made at import
from transformers import PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.errors import UserError

# What DeepSpeed does while it cuts a whole tensor, and what does the same here.
OTHER_WAYS = {
    "zero_quantized_weights": "model.quantization=int8",
    "zero_quantized_nontrainable_weights": "model.quantization=int8",
    "zero_quantized_gradients": "float gradients, a prompt has few",
    "mics_shard_size": "zero_hpz_partition_size",
}


def settle_offload(content: dict[str, Any], model: PreTrainedModel, world_size: int | None, file: str) -> None:
    """Fill the NVMe buffers that are `auto`; raise UserError for what cannot work.

    Without a `world_size` nothing is asked of the machine.
    """
    zero = content["zero_optimization"]
    for key, instead in OTHER_WAYS.items():
        if zero.get(key) not in (None, False, -1):
            raise UserError(f"{file}: zero_optimization.{key} is not for a base that is loaded by parts: use {instead}")
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = int(zero["zero_hpz_partition_size"])
    if world_size:
        check_node_size(zero, world_size, file)
    for section in ("offload_param", "offload_optimizer"):
        offload = zero.get(section) or {}
        place = offload.get("device", "none")
        if place not in ("none", "cpu", "nvme"):
            raise UserError(f"{file}: zero_optimization.{section}.device is {place!r}, not none, cpu or nvme")
        if place == "nvme" and zero.get("zero_hpz_partition_size", 1) > 1:
            raise UserError(f"{file}: zero_optimization.zero_hpz_partition_size keeps weights in memory, not on nvme")
        if section == "offload_param" and place != "none" and zero.get("stage") != 3:
            raise UserError(f"{file}: zero_optimization.offload_param needs stage 3, not {zero.get('stage', 0)}")
        if place == "nvme" and world_size:
            check_nvme(offload, f"{file}: zero_optimization.{section}")
            offload["nvme_path"] = str(own_folder(Path(offload["nvme_path"])))
            check_single_rank(section, world_size, file)
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        fill_buffers(zero, model, world_size or 1)


def without_autos(content: dict[str, Any]) -> dict[str, Any]:
    """A copy for DeepSpeed's own check, which knows no `auto` for what follows from the base's tensors."""
    checked = copy.deepcopy(content)
    zero = checked["zero_optimization"]
    for section in (zero, zero.get("offload_param") or {}):
        for key in [key for key, value in section.items() if value == "auto"]:
            del section[key]
    return checked


def check_node_size(zero: dict[str, Any], world_size: int, file: str) -> None:
    """hpZ: as many ranks share a second cut as `zero_hpz_partition_size` says."""
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1 and (zero.get("stage") != 3 or world_size % size):
        raise UserError(
            f"{file}: zero_optimization.zero_hpz_partition_size is {size}: it needs stage 3 and a number of ranks "
            f"that it divides, here stage {zero.get('stage', 0)} and {world_size} ranks"
        )


def check_single_rank(section: str, world_size: int, file: str) -> None:
    """Alone on a CPU DeepSpeed computes in the swap buffer itself and fills it anew before backward has read it."""
    if section == "offload_param" and world_size == 1 and not torch.cuda.is_available():
        raise UserError(f"{file}: zero_optimization.offload_param: nvme needs a GPU, or 2 ranks on a CPU")


def own_folder(path: Path) -> Path:
    """A new folder of this process under `nvme_path`, gone when it ends: DeepSpeed's file names tell no two runs apart.

    What killed processes leave stays: host names and process ids do not tell whose a folder on a shared disk is.
    """
    own = tempfile.mkdtemp(prefix="ptune-", dir=path)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)


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


def fill_buffers(zero: dict[str, Any], model: PreTrainedModel, world_size: int) -> None:
    """Buffers for a rank's part of a layer's largest tensor, for the layer at work, the next and one on its way.

    What is larger than a buffer (embeddings, a head) stays in host memory: DeepSpeed's buffers are all of one size.
    """
    sizes = [[p.numel() for p in layer.parameters()] for layer in layers_of(model)]
    offload = zero["offload_param"]
    for key, value in (
        ("buffer_size", ceil(max(map(max, sizes)) / world_size)),
        ("buffer_count", 3 * max(map(len, sizes)) + 4),
    ):
        if offload.get(key, "auto") == "auto":
            offload[key] = value
