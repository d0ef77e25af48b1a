"""ZeRO-3's partitions without the whole tensor: each rank makes and fills its own part of a parameter, and no other.

`deepspeed.zero.Init` allocates every parameter whole on every rank, broadcasts it and then cuts it. Here its own
bookkeeping is kept and that is left out. What is set on a parameter mirrors `Init._partition_param` and
`Init._partition_param_sec` of DeepSpeed 0.19; `layout_check.py` holds it against what this release does.
"""

import itertools
from math import ceil
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from deepspeed.utils import groups
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.load import Fill, loading_line, place_parameters
from ptune_dist.base.open import OpenedBase
from ptune_dist.zero.layout_check import check_layout
from ptune_dist.zero.setup import join_deepspeed

ALIGNMENT = 512  # bytes, of a part in pinned memory, as torch aligns its tensors on a GPU


def fill_sharded(opened: OpenedBase, sharder: "Sharder") -> PreTrainedModel:
    """The base with this rank's part of every tensor. Buffers are whole, on the device. Raises UserError."""

    def place(parameter: nn.Parameter, fill: Fill) -> nn.Parameter:
        made = nn.Parameter(torch.empty(1, dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)
        sharder.shard(made, fill)
        return made

    model = place_parameters(opened, place, sharder.device)
    sharder.fill_parts()
    return model


class Sharder:
    """Cuts parameters over the ranks as DeepSpeed's JSON asks.

    Making one is collective: every rank must call. Raises RunFault where this DeepSpeed cuts in another way.
    """

    def __init__(self, content: dict[str, Any], swapped_dtype: torch.dtype):
        """`swapped_dtype` is what goes to NVMe: DeepSpeed's swapper has buffers of one dtype; the rest, and
        what is larger than a buffer, stays in memory.
        """
        join_deepspeed()
        offload = content["zero_optimization"].get("offload_param", {})
        is_hpz = content["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        swapper = None
        if offload.get("device") == "nvme":
            swapper = AsyncPartitionedParameterSwapper(DeepSpeedConfig(content), swapped_dtype)
        self._init: Any = deepspeed.zero.Init(
            config_dict_or_path=content,
            remote_device=offload.get("device"),
            param_swapper=swapper,
            # hpZ's, if an earlier job of this process has made it: DeepSpeed makes it once
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group() if is_hpz else None,
        )
        self._unfilled: list[tuple[torch.Tensor, int, int, Fill]] = []
        self._unpinned: list[tuple[torch.Tensor, int]] = []  # without memory yet, and their numbers of elements
        check_layout(self)

    @property
    def device(self) -> torch.device:
        """Where gathered parameters and buffers are."""
        return self._init.local_device

    def shard(self, parameter: nn.Parameter, fill: Fill) -> None:
        """Make `parameter`, which may be an expanded scalar, a ZeRO-3 parameter; `fill` is for this rank's part.

        Parts that stay in memory are filled by `fill_parts`: made one after another before anything is read, they leave
        no holes between them where what reading needs for a moment stood.
        """
        init = self._init
        init._convert_to_deepspeed_param(parameter)
        described = cast(Any, parameter)  # with the attributes that DeepSpeed adds
        aligned = described.aligned_size()
        described.ds_numel_aligned = aligned
        size = aligned // init.dp_world_size
        on_nvme = init.remote_device == OffloadDeviceEnum.nvme and self._is_swapped(parameter, size)
        part = self._take_buffer(parameter, size) if on_nvme else self._allocate(parameter, size)
        described.ds_tensor = mark(part, size)
        if on_nvme:
            fill_part(part, size * init.rank, described.ds_numel, fill)
            cast(Any, part).final_location = OffloadDeviceEnum.nvme
            init.param_swapper.swap_out_and_release([parameter])
        else:
            self._unfilled.append((part, size * init.rank, described.ds_numel, fill))
        if init.zero_param_process_group is not None:  # hpZ: a second cut, over the ranks of this node
            size = aligned // init.num_ranks_in_param_group
            part = self._allocate(parameter, size)
            self._unfilled.append((part, size * init.rank_in_group, described.ds_numel, fill))
            described.ds_secondary_tensor = mark(part, size)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=init.local_device)
        described.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def fill_parts(self) -> None:
        """Fill what `shard` has made."""
        pin_together(self._unpinned)
        self._unpinned.clear()
        line = loading_line(part[0] for part in self._unfilled)
        for part in self._unfilled:
            fill_part(*part)
            line.count(part[0].nbytes)
        self._unfilled.clear()

    def _is_swapped(self, parameter: nn.Parameter, size: int) -> bool:
        swapper = self._init.param_swapper
        fits = size <= swapper.elements_per_buffer and swapper.swappable_tensor(numel=size)
        return parameter.dtype == swapper.dtype and fits

    def _take_buffer(self, parameter: nn.Parameter, size: int) -> torch.Tensor:
        part = torch.empty(0, dtype=parameter.dtype)
        part.data = self._init.param_swapper.get_buffer(parameter, size).data
        return part

    def _allocate(self, parameter: nn.Parameter, size: int) -> torch.Tensor:
        place = self._init.remote_device
        place = OffloadDeviceEnum.cpu.value if place == OffloadDeviceEnum.nvme else place
        if torch.device(place).type == "cpu" and self._init.pin_memory:
            part = torch.empty(0, dtype=parameter.dtype)
            self._unpinned.append((part, size))
            return part
        return torch.empty(size, dtype=parameter.dtype, device=place)


def pin_together(parts: list[tuple[torch.Tensor, int]]) -> None:
    """Give parts their memory, so many elements each, in one block of pinned memory.

    torch's own pinned memory comes in powers of two, which would be a third more for a base.
    """
    sizes = [size * part.itemsize for part, size in parts]
    starts = [0, *itertools.accumulate(ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes)]
    block = torch.empty(starts[-1], dtype=torch.uint8)
    if torch.cuda.is_available() and len(block):
        torch.cuda.check_error(cast(Any, torch.cuda.cudart()).cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    for (part, _), start, size in zip(parts, starts, sizes, strict=False):
        part.data = block[start : start + size].view(part.dtype)


def fill_part(part: torch.Tensor, start: int, num_elements: int, fill: Fill) -> None:
    """Fill a part that begins at element `start`; what reaches beyond the tensor's end is padding."""
    count = max(0, min(len(part), num_elements - start))
    if count:
        fill(start, part[:count])
    part[count:].zero_()


def mark(part: torch.Tensor, size: int) -> torch.Tensor:
    """What DeepSpeed keeps on a partition."""
    part.requires_grad = False
    described = cast(Any, part)  # with the attributes that DeepSpeed reads
    described.ds_numel = size
    described.status = PartitionedParamStatus.AVAILABLE
    described.final_location = None
    return part
