"""Count what ZeRO-3 gathers: how often, how many bytes, and how many of them come from another node."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.comm import comm

from ptune_dist.zero.setup import join_deepspeed


@dataclass
class Gathers:
    """Sums since this process began. Bytes are those that a rank receives; its own part is not among them."""

    num: int = 0
    num_bytes: int = 0
    num_bytes_between_nodes: int = 0

    def since(self, before: "Gathers") -> "Gathers":
        return Gathers(**{name: value - getattr(before, name) for name, value in vars(self).items()})

    def copy(self) -> "Gathers":
        return Gathers(**vars(self))

    def __iter__(self) -> Iterator[int]:
        return iter(vars(self).values())


def watch_gathers() -> Gathers:
    """The running count of this process, where DeepSpeed calls the process group. Nothing is timed or waited for."""
    join_deepspeed()
    backend = cast(Any, comm.cdb)  # the count is kept on it, as an attribute of ours
    if not hasattr(backend, "ptune_gathers"):
        backend.ptune_gathers = Gathers()
        backend.all_gather_into_tensor = counted(backend.all_gather_into_tensor, backend.ptune_gathers)
    return backend.ptune_gathers


def counted(gather: Any, gathers: Gathers) -> Any:
    """`gather`, DeepSpeed's all-gather, that adds each call to `gathers`."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or dist.get_world_size()

    def run(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, **options: Any) -> Any:
        ranks = dist.get_process_group_ranks(group)
        near = sum(rank // ranks_per_node == dist.get_rank() // ranks_per_node for rank in ranks)
        gathers.num += 1
        gathers.num_bytes += output_tensor.nbytes - input_tensor.nbytes
        gathers.num_bytes_between_nodes += input_tensor.nbytes * (len(ranks) - near)
        return gather(output_tensor=output_tensor, input_tensor=input_tensor, group=group, **options)

    return run
