"""Prompts that start from what a sharded base computes of a text: how much of the base is gathered at once for that.

usage: starts_many.py OUT BASE. Writes OUT/RANK.json: the elements of the base, of its largest layer and of its
embeddings; and for each case the most elements that were gathered, or on their way, and how far the start is from what
transformers computes of the whole base.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from ptune_dist.base.layers import layers_of
from ptune_dist.config.deepspeed_json import fill_deepspeed_json
from ptune_dist.distributed.world import World, init_distributed
from ptune_dist.families import FAMILIES
from ptune_dist.families.find import open_any
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.optim.prompt_state import PromptState
from ptune_dist.prompts.late_prompt import LatePrompt
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.zero.engine import Engine
from ptune_dist.zero.passes import ShardedPasses
from ptune_dist.zero.prefetch import settle_prefetch
from ptune_dist.zero.residency import count_elements
from ptune_dist.zero.shard import Sharder, fill_sharded
from tests.config.test_deepspeed_json import build

TOKENS = [5, 9, 7, 30]
START = 3


class Watch:
    """The most elements of a base that were gathered, or on their way, when a module had asked for its parameters."""

    def __init__(self, coordinator: Any, base: torch.nn.Module):
        self.most = 0
        self._fetch = coordinator.fetch_sub_module
        self._parameters: list[Any] = list(base.parameters())
        coordinator.fetch_sub_module = self.fetch

    def fetch(self, module: torch.nn.Module, forward: bool) -> None:
        self._fetch(module, forward)
        live = sum(p.ds_numel for p in self._parameters if p.ds_status.name != "NOT_AVAILABLE")
        self.most = max(self.most, live)


def build_prompt(case: str, config: Any) -> Method:
    if case == "late":
        return LatePrompt(torch.zeros(len(TOKENS), config.hidden_size), START)
    first = START if case == "upper" else 0
    width = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, len(TOKENS), config.num_key_value_heads, width)
    return PrefixTuning(torch.zeros(shape), torch.zeros(shape), from_layer=first, has_lower=first > 0)


@torch.no_grad()
def difference(folder: str, prompt: Method) -> float:
    """How far the start of a prompt is from transformers' own numbers."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    cache = DynamicCache()
    found = whole(torch.tensor([TOKENS]), past_key_values=cache, output_hidden_states=True)
    if isinstance(prompt, LatePrompt):
        return (prompt.late_tokens - found.hidden_states[START][0]).abs().max().item()
    keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
    plain = prompt.plain()
    own = torch.cat([plain[name] for name in ("lower_keys", "prefix_keys") if name in plain])
    return (own - keys).abs().max().item()


def check(folder: str, case: str, world: World) -> dict[str, Any]:
    """Collective: every rank must call."""
    opened = open_any(folder, dtype=torch.float32)
    layer = max(count_elements(layer) for layer in layers_of(opened.model))
    # As of a base that is much larger than what may be live.
    sizes = {"stage3_max_live_parameters": 2 * layer, "stage3_max_reuse_distance": 0}
    content = fill_deepspeed_json(
        build({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0} | sizes}), hidden_size=32
    )
    settle_prefetch(content, opened.model)
    base = fill_sharded(opened, Sharder(content, torch.float32))
    prompt = build_prompt(case, base.config)
    prompt.start_tokens = TOKENS
    model = FAMILIES["causal"].model_class(base, [prompt], CrossEntropy(), "prefix").train()
    passes = ShardedPasses(base, layers_of(base), content)
    engine = Engine(model, passes, PromptState({}, world), world, 3)
    watch = Watch(passes._engine.optimizer.param_coordinator, base)
    engine.read_starts()
    embeddings: Any = base.get_input_embeddings().weight
    return {
        "most": watch.most,
        "layer": layer,
        "base": sum(p.ds_numel for p in base.parameters()),
        "embeddings": embeddings.ds_numel,
        "difference": difference(folder, prompt),
    }


def main() -> None:
    world = init_distributed()
    out, folder = sys.argv[1:]
    found = {case: check(folder, case, world) for case in ("late", "keys", "upper")}
    Path(out, f"{world.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
