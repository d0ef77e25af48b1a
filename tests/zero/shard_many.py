"""Fill several bases by parts on every rank, gather them again and compare with the whole: one launch for many checks.

usage: shard_many.py OUT KIND=FOLDER ... Writes OUT/RANK.json: for each base what this rank read, holds and gathered,
and the names of the tensors that differ from those of the base loaded whole.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ptune_dist.base.layers import held_bytes
from ptune_dist.base.load import fill_whole
from ptune_dist.distributed.world import init_distributed
from ptune_dist.families.find import open_any
from ptune_dist.zero.gathers import watch_gathers
from ptune_dist.zero.shard import Sharder, fill_sharded
from tests.conftest import LABELS

CONTENT: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
PINNED = copy.deepcopy(CONTENT)
PINNED["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
INT8 = {"include": [], "threshold": None}


def check(folder: str, sharder: Sharder, **options) -> dict:
    """Collective: every rank must call."""
    options = {"dtype": torch.float32, "labels": LABELS} | options
    opened = open_any(folder, **options)
    base, gathers = fill_sharded(opened, sharder), watch_gathers()
    facts = {"bytes_read": opened.weights.bytes_read, "bytes_held": held_bytes(base), "different": []}
    whole = fill_whole(open_any(folder, **options))
    wanted, before = dict(whole.named_parameters()), gathers.copy()
    for name, parameter in base.named_parameters():
        if not parameter.requires_grad:  # a trained head is whole
            assert tuple(parameter.ds_shape) == tuple(wanted[name].shape) and parameter.numel() == 0
        with deepspeed.zero.GatheredParameters([parameter], enabled=not parameter.requires_grad):
            same = torch.equal(parameter, wanted[name]) and parameter.dtype == wanted[name].dtype
            facts["different"] += [] if same else [name]
    buffers = dict(whole.named_buffers())
    facts["different"] += [n for n, buffer in base.named_buffers() if not torch.equal(buffer, buffers[n])]
    facts["frozen"] = [[p.numel(), p.nbytes] for p in wanted.values() if not p.requires_grad]
    facts["gathers"] = dict(vars(gathers.since(before)))
    return facts


def main() -> None:
    init_distributed()
    out, *bases = sys.argv[1:]
    sharder = Sharder(CONTENT, torch.float32)
    pinned = Sharder(PINNED, torch.float32)
    found = {}
    for kind, folder in (base.split("=", 1) for base in bases):
        found[kind] = check(folder, sharder)
        found[f"{kind} int8"] = check(folder, sharder, int8=INT8)
        found[f"{kind} pinned"] = check(folder, pinned)
        found[f"{kind} random"] = check(folder, sharder, random_init=True, dtype=torch.bfloat16)
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
