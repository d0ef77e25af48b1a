"""Whether this release of DeepSpeed cuts a parameter as `shard.py` does: a small one is cut both ways and gathered.

Another release may pad, order or describe its partitions differently, and training would continue with wrong weights.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ptune_dist.distributed.world import World, raise_together
from ptune_dist.errors import RunFault
from ptune_dist.zero.gathers import watch_gathers

PARTS = ("ds_tensor", "ds_secondary_tensor")
NUM_PER_RANK = 3  # elements; one more in all, so that the last part is padded
FACTS = ("ds_numel", "ds_shape", "ds_numel_aligned", "ds_status", "ds_persist", "ds_param_type")
FACTS_OF_PART = ("ds_numel", "status", "final_location")


class Cutter(Protocol):
    @property
    def device(self) -> torch.device: ...

    def shard(self, parameter: nn.Parameter, fill: Callable[[int, torch.Tensor], None]) -> None: ...

    def fill_parts(self) -> None: ...


def check_layout(cutter: Cutter) -> None:
    """Raise RunFault on every rank where DeepSpeed describes or fills its partitions differently. Collective."""
    world = World(dist.get_rank(), dist.get_world_size(), cutter.device)
    whole = torch.arange(1.0, NUM_PER_RANK * world.size + 2, device=world.device)
    try:
        ours, theirs = cut_both_ways(cutter, whole)
        found = difference(ours, theirs)
    except AttributeError as error:  # a name that this release no longer has: the same on every rank
        found = str(error)
    raise_together(fault(found), world)
    gathers = watch_gathers()
    num_before = gathers.num
    for parameter in (ours, theirs):
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.detach(), whole):
                found = "what it gathers is not what was cut"
    if world.size > 1 and gathers.num == num_before:
        found = "its gathers do not pass where they are counted"
    raise_together(fault(found), world)


def cut_both_ways(cutter: Cutter, whole: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """A parameter as `cutter` cuts it, and one that DeepSpeed itself has cut from the whole tensor. Collective."""
    ours = nn.Parameter(torch.empty(1).expand(whole.shape), requires_grad=False)

    def fill(start: int, out: torch.Tensor) -> None:
        out.copy_(whole[start : start + len(out)])

    cutter.shard(ours, fill)
    cutter.fill_parts()
    theirs = nn.Parameter(whole.clone(), requires_grad=False)
    cast(Any, ours).convert_to_zero_parameters(param_list=[theirs])
    return ours, theirs


def fault(found: str | None) -> RunFault | None:
    """The error to raise for what was found."""
    if found is None:
        return None
    return RunFault(
        f"DeepSpeed {deepspeed.__version__} cuts parameters otherwise than ptune_dist expects: {found}: "
        "install a release that pyproject.toml allows"
    )


def difference(ours: nn.Parameter, theirs: nn.Parameter) -> str | None:
    """What differs between two cut parameters of equal content."""
    if vars(ours).keys() != vars(theirs).keys():
        return f"attributes {', '.join(sorted(vars(ours).keys() ^ vars(theirs).keys()))}"
    for name in FACTS:
        if getattr(ours, name) != getattr(theirs, name):
            return f"{name} is {getattr(theirs, name)}, not {getattr(ours, name)}"
    for name in PARTS:
        found = difference_of_parts(getattr(ours, name), getattr(theirs, name))
        if found is not None:
            return f"{name}: {found}"
    return None


def difference_of_parts(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> str | None:
    """What differs between this rank's parts; `ours` is None without hpZ's second cut."""
    if ours is None or theirs is None:
        return None if ours is theirs else "only one is there"
    if vars(ours).keys() != vars(theirs).keys():
        return f"attributes {', '.join(sorted(vars(ours).keys() ^ vars(theirs).keys()))}"
    for name in FACTS_OF_PART:
        if getattr(ours, name) != getattr(theirs, name):
            return f"{name} is {getattr(theirs, name)}, not {getattr(ours, name)}"
    if ours.shape != theirs.shape or ours.device != theirs.device:
        return f"{tuple(theirs.shape)} on {theirs.device}, not {tuple(ours.shape)} on {ours.device}"
    return None
