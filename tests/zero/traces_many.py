"""Training passes with batches of different sizes over a sharded base: DeepSpeed's trace, and how much is prefetched.

usage: traces_many.py OUT BASE. Writes OUT/RANK.json: for each setting and micro-batch whether the trace was complete at
its end, how many chunks its targets took, and of each use of a layer the share of its elements that was gathered, or on
its way, before the layer asked for it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import ptune_dist.model.head
from ptune_dist.base.layers import layers_of
from ptune_dist.config.deepspeed_json import fill_deepspeed_json
from ptune_dist.distributed.world import World, init_distributed
from ptune_dist.families import FAMILIES
from ptune_dist.families.find import open_any
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.optim.prompt_state import PromptState
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.zero.engine import Engine
from ptune_dist.zero.passes import ShardedPasses
from ptune_dist.zero.prefetch import settle_prefetch
from ptune_dist.zero.residency import count_elements
from ptune_dist.zero.shard import Sharder, fill_sharded
from tests.config.test_deepspeed_json import build
from tests.numerics.passes import draw_batch

CHUNK = 3  # targets
INT8 = {"include": [], "threshold": None}
SETTINGS: dict[str, dict] = {"prefix": {}, "infix": {}, "int8": {"int8": INT8}}
# Rows of the micro-batches, by rank.
LENGTHS = [[(5, 9, 30), (4,)], [(7,), (3, 8)], [(20, 6, 6, 6, 9), (12,)], [(3,), (2, 2)], [(9, 40), (8, 3, 5, 6)]]


class Watch:
    """What is gathered, or on its way, when a layer asks for its parameters."""

    def __init__(self, coordinator: Any, layers: list[torch.nn.Module]):
        self.ahead: list[float] = []
        self._fetch = coordinator.fetch_sub_module
        self._layers = layers
        coordinator.fetch_sub_module = self.fetch

    def fetch(self, module: torch.nn.Module, forward: bool) -> None:
        if any(module is layer for layer in self._layers):
            parameters: list[Any] = list(module.parameters())
            ahead = sum(p.ds_numel for p in parameters if p.ds_status.name != "NOT_AVAILABLE")
            self.ahead.append(ahead / count_elements(module))
        self._fetch(module, forward)


def check(folder: str, name: str, world: World) -> dict[str, Any]:
    """Collective: every rank must call."""
    opened = open_any(folder, dtype=torch.float32, **SETTINGS[name])
    layer = max(count_elements(layer) for layer in layers_of(opened.model))
    # As of a base that is much larger than what may be live.
    sizes = {"stage3_max_live_parameters": 2 * layer, "stage3_max_reuse_distance": 0}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0} | sizes
    content = fill_deepspeed_json(build({"zero_optimization": zero}), hidden_size=32)
    settle_prefetch(content, opened.model)
    base = fill_sharded(opened, Sharder(content, torch.float32))
    prompts: list = [PromptTuning(torch.full((count, 32), 0.1)) for count in (4, 7)]
    placement = "infix" if name == "infix" else "prefix"
    model = FAMILIES["causal"].model_class(base, prompts, CrossEntropy(), placement).train()
    layers = layers_of(base)
    passes = ShardedPasses(base, layers, content)
    engine = Engine(model, passes, PromptState({}, world), world, 3)
    engine.members = ["one", "other"]
    coordinator = passes._engine.optimizer.param_coordinator
    steps = []
    watch = Watch(coordinator, layers)
    for lengths in LENGTHS:
        own = lengths[world.rank]
        batch, _ = draw_batch(placement, own, readers=[(row, row % 2) for row in range(len(own))])
        watch.ahead.clear()
        engine.accumulate(batch, scales=torch.ones(2))
        num_targets = sum(len(batch.targets[row]) for row, _ in batch.readers)
        step = {"ahead": list(watch.ahead), "num_chunks": -(-num_targets // CHUNK)}
        steps.append(step | {"is_complete": coordinator.is_complete_trace()})
    return {name: steps, "num_layers": len(layers), "has_timed": passes._engine.tput_timer.initialized}


def main() -> None:
    world = init_distributed()
    out, folder = sys.argv[1:]
    ptune_dist.model.head.CHUNK_BYTES = 4 * 272 * CHUNK
    found: dict[str, Any] = {}
    for name in SETTINGS:
        found |= check(folder, name, world)
    Path(out, f"{world.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
