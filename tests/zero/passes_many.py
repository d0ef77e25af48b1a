"""Passes of every kind over a sharded base on every rank, compared with the whole base, and what each kind gathers.

usage: passes_many.py OUT BASE. Writes OUT/RANK.json, for each setting: for each pass its kind, the largest difference
from the whole base's numbers, the gathers that it took and the sizes of what stays gathered; tensors that have changed.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from ptune_dist.base.layers import layers_of
from ptune_dist.base.load import fill_whole
from ptune_dist.base.recompute import Recomputer, read_settings
from ptune_dist.distributed.world import init_distributed
from ptune_dist.families.find import open_any
from ptune_dist.zero.passes import Passes, ShardedPasses, WholePasses
from ptune_dist.zero.residency import settle_residency
from ptune_dist.zero.shard import Sharder, fill_sharded

RELEASES = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
SETTINGS = {
    "resident": {},
    "small": RELEASES | {"stage3_param_persistence_threshold": 64},
    "released": RELEASES,
    "prefetched": {"stage3_param_persistence_threshold": 0},
}
RECOMPUTED = {"activation_checkpointing": {}}
IDS = torch.arange(2, 14).view(2, 6)


def train_pass(passes: Passes, base) -> torch.Tensor:
    """The gradient of a loss with respect to what stands before the embedded tokens."""
    prompt = torch.linspace(-1, 1, 64).view(1, 2, 32).requires_grad_()

    def work() -> torch.Tensor:
        tokens = base.get_input_embeddings()(IDS)
        logits = base(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), tokens], dim=1)).logits
        return torch.nn.functional.cross_entropy(logits[:, 2:].flatten(0, 1), IDS.flatten())

    passes.backward(passes.run(work))
    return prompt.grad


@torch.no_grad()
def read_pass(passes: Passes, base) -> torch.Tensor:
    return passes.run(lambda: base(input_ids=IDS).logits)


@torch.no_grad()
def inner_pass(passes: Passes, base) -> torch.Tensor:
    """Without the head, as contexts are read."""
    return passes.run(lambda: base.model(input_ids=IDS)[0])


@torch.no_grad()
def generate(passes: Passes, base) -> torch.Tensor:
    return base.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, use_cache=True).float()


KINDS = {"train": train_pass, "read": read_pass, "inner": inner_pass, "generate": generate}
ORDER = ["train", "train", "train", "read", "generate", "inner", "train", "generate", "read", "inner", "train"]


def check(folder: str, zero: dict, more: dict) -> dict:
    """Collective: every rank must call."""
    opened = open_any(folder, dtype=torch.float32)
    content = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3} | zero} | more
    settle_residency(content, opened.model)
    base = fill_sharded(opened, Sharder(content, torch.float32))
    whole = fill_whole(open_any(folder, dtype=torch.float32))
    settings = read_settings(more, len(layers_of(base)), "test")
    if settings:
        Recomputer(settings, layers_of(base))
    passes = ShardedPasses(base, layers_of(base), content)
    found: dict = {"passes": []}
    for kind in ORDER:
        before = passes.gathers.copy()
        ours, theirs = KINDS[kind](passes, base), KINDS[kind](WholePasses(), whole)
        difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else torch.inf
        held = [p.ds_numel for p in base.parameters() if p.ds_status.name == "AVAILABLE"]
        found["passes"].append([kind, difference, passes.gathers.since(before).num, held])
    wanted = dict(whole.named_parameters())
    found["sizes"] = [p.numel() for p in wanted.values()]
    found["changed"] = []
    for name, parameter in base.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found["changed"] += [] if torch.equal(parameter, wanted[name]) else [name]
    return found


def main() -> None:
    world = init_distributed()
    out, folder = sys.argv[1:]
    found = {name: check(folder, zero, {}) for name, zero in SETTINGS.items()}
    found |= {f"{name} recomputed": check(folder, SETTINGS[name], RECOMPUTED) for name in ("resident", "released")}
    Path(out, f"{world.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
