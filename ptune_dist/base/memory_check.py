"""What loading will take, against what there is: said before the first byte is read."""

import os
import shutil
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ptune_dist.base.layers import layers_of
from ptune_dist.errors import UserError

GIB = 1 << 30
CGROUP = Path("/sys/fs/cgroup")


def foresee(model: nn.Module, content: dict[str, Any], path: str, world_size: int, device: torch.device) -> None:
    """Raise UserError where the base will not fit where DeepSpeed's JSON puts it."""
    zero = content["zero_optimization"]
    offload = zero.get("offload_param") or {}
    place = offload.get("device", "none")
    num_parts = world_size if zero.get("stage") == 3 else 1
    node_parts = zero.get("zero_hpz_partition_size", 1) if num_parts > 1 else 1

    def part_bytes(parameters: Iterable[nn.Parameter]) -> int:
        sizes = {id(p): p.numel() * p.element_size() for p in parameters}.values()
        return sum(ceil(size / num_parts) + (ceil(size / node_parts) if node_parts > 1 else 0) for size in sizes)

    needed, local = part_bytes(model.parameters()), local_ranks(world_size)
    if place == "nvme":
        on_disk = part_bytes(p for layer in layers_of(model) for p in layer.parameters())
        folder = next(f for f in (Path(offload["nvme_path"]), *Path(offload["nvme_path"]).parents) if f.exists())
        check_room(on_disk * local, shutil.disk_usage(folder).free, f"on the disk of {folder}", path, local)
        needed -= on_disk
    if device.type == "cuda" and place == "none":
        check_room(needed, torch.cuda.mem_get_info(device)[0], f"on GPU {device.index}", path, 1)
    else:
        check_room(needed * local, free_host_bytes(), "in this host's memory", path, local)


def check_room(needed: int, free: int, where: str, path: str, num_ranks: int) -> None:
    """Raise UserError where `needed` bytes are more than `free`."""
    if needed > free:
        of = f" for {num_ranks} ranks" if num_ranks > 1 else ""
        raise UserError(
            f"model.path: {path} takes {needed / GIB:.1f} GiB {where}{of}, {free / GIB:.1f} GiB are free: use more "
            "ranks with ZeRO-3, model.quantization=int8, or offload_param in DeepSpeed's JSON"
        )


def check_room_for_copies(num_bytes: int, path: str) -> None:
    """Raise UserError where this host cannot hold a whole copy for each of its ranks."""
    local = local_ranks(1)
    check_room(num_bytes * local, free_host_bytes(), "in this host's memory, whole on every rank,", path, local)


def local_ranks(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def free_host_bytes() -> int:
    """Memory that can be had without swapping; the limits of a container or a Slurm job count (cgroup v2)."""
    free = psutil.virtual_memory().available
    own = next((line[3:] for line in read_lines(Path("/proc/self/cgroup")) if line.startswith("0::")), "/")
    group = CGROUP / own.strip("/")
    for folder in (group, *group.parents):
        limit = read_lines(folder / "memory.max")
        if limit and limit[0] != "max":
            used = int(read_lines(folder / "memory.current")[0])
            stat = dict(line.split() for line in read_lines(folder / "memory.stat"))
            reclaimable = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
            free = min(free, int(limit[0]) - used + reclaimable)
        if folder == CGROUP:
            break
    return free


def read_lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
