"""Compare the memory that the base needs with the memory that is free, before any weights are read."""

import os
import shutil
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from ptune_dist.base.layers import layers_of
from ptune_dist.errors import UserError

GIB = 1 << 30
CGROUP = Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Where a rank's tensors are and how much is free for it there; `base`: bytes of its part of the base there."""

    base: int
    free: int
    where: str


def find_room(model: nn.Module, content: dict[str, Any], world_size: int, device: torch.device) -> Room:
    """The memory that a rank computes in, before the base is loaded."""
    offload = content["zero_optimization"].get("offload_param") or {}
    place = offload.get("device", "none")
    part = part_bytes(model.parameters(), content, world_size)
    if device.type == "cuda":
        return Room(0 if place != "none" else part, torch.cuda.mem_get_info(device)[0], f"on GPU {device.index}")
    if place == "nvme":
        part -= part_bytes((p for layer in layers_of(model) for p in layer.parameters()), content, world_size)
    return Room(part, free_host_bytes() // local_ranks(world_size), "of this host's memory on each rank")


def check_memory(model: nn.Module, content: dict[str, Any], path: str, world_size: int, device: torch.device) -> None:
    """Raise UserError if the base does not fit where DeepSpeed's JSON (`content`) places it."""
    offload = content["zero_optimization"].get("offload_param") or {}
    place = offload.get("device", "none")
    local = local_ranks(world_size)
    needed = part_bytes(model.parameters(), content, world_size)
    if place == "nvme":
        on_disk = part_bytes((p for layer in layers_of(model) for p in layer.parameters()), content, world_size)
        folder = existing_folder(Path(offload["nvme_path"]))
        check_room(on_disk * local, shutil.disk_usage(folder).free, f"on the disk of {folder}", path, local)
        needed -= on_disk
    if device.type == "cuda" and place == "none":
        check_room(needed, torch.cuda.mem_get_info(device)[0], f"on GPU {device.index}", path, 1)
    else:
        check_room(needed * local, free_host_bytes(), "in this host's memory", path, local)


def part_bytes(parameters: Iterable[nn.Parameter], content: dict[str, Any], world_size: int) -> int:
    """Bytes of one rank's part of the parameters, including hpZ's second copy within a node."""
    zero = content["zero_optimization"]
    num_parts = world_size if zero.get("stage") == 3 else 1
    parts_per_node = zero.get("zero_hpz_partition_size", 1) if num_parts > 1 else 1
    sizes = {id(p): p.numel() * p.element_size() for p in parameters}.values()
    total = sum(ceil(size / num_parts) for size in sizes)
    if parts_per_node > 1:
        total += sum(ceil(size / parts_per_node) for size in sizes)
    return total


def existing_folder(path: Path) -> Path:
    """The nearest folder above a path, or the path itself, that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_room(needed: int, free: int, where: str, path: str, num_ranks: int) -> None:
    """Raise UserError if `needed` bytes are more than `free`."""
    if needed > free:
        of = f" for {num_ranks} ranks" if num_ranks > 1 else ""
        raise UserError(
            f"model.path: {path} needs {needed / GIB:.1f} GiB {where}{of}, but {free / GIB:.1f} GiB are free: use more "
            "ranks with ZeRO-3, model.quantization=int8, or offload_param in DeepSpeed's JSON"
        )


def check_room_for_copies(num_bytes: int, path: str) -> None:
    """Raise UserError if this host cannot hold a whole copy for each of its ranks."""
    local = local_ranks(1)
    check_room(num_bytes * local, free_host_bytes(), "in this host's memory, whole on every rank,", path, local)


def local_ranks(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def free_host_bytes() -> int:
    """Memory available without swapping, within the limits of a container or a Slurm job (cgroup v2)."""
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
