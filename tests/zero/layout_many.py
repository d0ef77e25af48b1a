"""Sharders that cut in other ways than DeepSpeed, on every rank. usage: layout_many.py OUT

Writes OUT/RANK.json: by name, the message that making each one ends with, empty where there is none.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from ptune_dist.base.load import Fill
from ptune_dist.distributed.world import init_distributed
from ptune_dist.errors import RunFault
from ptune_dist.zero.shard import Sharder

CONTENT = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


class Pads(Sharder):
    """Parts are longer than DeepSpeed's."""

    def shard(self, parameter: nn.Parameter, fill: Fill) -> None:
        super().shard(parameter, fill)
        parameter.ds_tensor = longer(parameter.ds_tensor)


def longer(part: torch.Tensor) -> torch.Tensor:
    made = torch.cat([part, part[:1]])
    vars(made).update(vars(part))
    return made


class Misplaces(Sharder):
    """A part holds what belongs to its neighbor."""

    def shard(self, parameter: nn.Parameter, fill: Fill) -> None:
        super().shard(parameter, lambda start, out: fill(0, out))


class ForgetsAField(Sharder):
    """As if DeepSpeed had begun to set another field."""

    def shard(self, parameter: nn.Parameter, fill: Fill) -> None:
        super().shard(parameter, fill)
        del parameter.ds_numel_aligned


class ForgetsAFieldOfThePart(Sharder):
    def shard(self, parameter: nn.Parameter, fill: Fill) -> None:
        super().shard(parameter, fill)
        del parameter.ds_tensor.final_location


class PadsOneRank(Pads):
    """The last part alone is longer: the ranks do not agree on what is wrong."""

    def shard(self, parameter: nn.Parameter, fill: Fill) -> None:
        cut = super().shard if torch.distributed.get_rank() else super(Pads, self).shard
        cut(parameter, fill)


class Miscounts(Sharder):
    def shard(self, parameter: nn.Parameter, fill: Fill) -> None:
        super().shard(parameter, fill)
        parameter.ds_numel_aligned += 1


def main() -> None:
    world = init_distributed()
    found = {}
    for kind in (Sharder, Pads, PadsOneRank, Misplaces, ForgetsAField, ForgetsAFieldOfThePart, Miscounts):
        try:
            kind(CONTENT, torch.float32)
            found[kind.__name__] = ""
        except RunFault as fault:
            found[kind.__name__] = str(fault)
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
