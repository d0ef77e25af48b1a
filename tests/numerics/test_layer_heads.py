"""Prefixes of bases whose layers differ in their keys and values, or of which some have none: those of transformers.

Shapes: P positions, G key/value heads, Dh width of a head, V vocabulary.
"""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.config.sections import PromptConfig
from ptune_dist.data.batches import Batch
from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.model.passes import Contexts
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.build import check_options
from ptune_dist.prompts.layer_tensors import heads_of
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.start import Start
from ptune_dist.run.parts import base_facts
from ptune_dist.tiny.make import build_tokenizer
from tests.architectures.bases import build_shape

DIFFERING = ["gemma4_text", "mimo_v2_flash"]
WITH_STATES = ["qwen3_5_text", "lfm3", "jamba", "nemotron_h"]
NUM_VIRTUAL = 5


def build_base(kind: str):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(build_shape(kind), dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return base


def build_prompt(base, seed: int = 3, num: int = NUM_VIRTUAL, **options) -> PrefixTuning:
    given = PromptConfig(method="prefix_tuning", init="random", num_virtual_tokens=num, **options)
    start = Start("random", seed, build_tokenizer(), lambda ids: torch.zeros(len(ids), 1), asked="random")
    return PrefixTuning.build(check_options(given), num, base_facts(base), start)


def draw_batch() -> Batch:
    draw = np.random.default_rng(0)
    texts = [draw.integers(5, 250, length).astype(np.int32) for length in (11, 30, 6)]
    targets = [draw.integers(5, 250, length).astype(np.int32) for length in (3, 1, 6)]
    nothing = np.zeros(0, np.int32)
    return Batch([nothing] * 3, texts, targets, [(0, 0), (1, 0), (1, 1), (2, 1)], 1)


def plain_losses(base, prompts: list[PrefixTuning], batch: Batch) -> torch.Tensor:
    """Of each reader's row alone, after a cache of transformers' own."""
    losses = []
    for row, member in batch.readers:
        found = prompts[member]()
        rest = batch.rests[row]
        target = batch.targets[row]
        cache = DynamicCache(config=base.config)
        for layer, parts in enumerate(zip(found.keys, found.values, strict=True)):
            if parts[0].shape[1]:
                cache.update(*(part.transpose(0, 1)[None] for part in parts), layer)
        ids = torch.from_numpy(np.concatenate([rest, target])).long()[None]
        places = NUM_VIRTUAL + torch.arange(ids.shape[1])[None]
        logits = base(input_ids=ids, past_key_values=cache, position_ids=places, use_cache=True).logits[0]
        wanted = ids[0, len(rest) :]
        losses.append(cross_entropy(logits[len(rest) - 1 : -1], wanted, reduction="sum"))
    return torch.stack(losses)


def gradients_of(losses: torch.Tensor, prompts: list[PrefixTuning]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(losses.sum(), [p for prompt in prompts for p in prompt.parameters()]))


@pytest.mark.parametrize("kind", DIFFERING + WITH_STATES)
def test_losses_and_gradients_are_those_after_transformers_own_cache(kind):
    base = build_base(kind)
    prompts = [build_prompt(base), build_prompt(base, seed=4)]
    assert len(set(heads_of(prompts[0]().keys))) > 1
    own = copy.deepcopy(base)
    Recomputer(DEFAULTS, layers_of(own))
    model = FAMILIES["causal"].model_class(own, prompts, CrossEntropy(), "prefix").train()
    batch = draw_batch()
    wanted = plain_losses(base, prompts, batch)
    losses = model.losses(batch)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients_of(losses, prompts), gradients_of(wanted, prompts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("kind", DIFFERING + WITH_STATES)
def test_it_starts_from_what_the_base_computes_of_a_text(kind):
    base = build_base(kind)
    prompt = build_prompt(base, num_frozen=2)
    model = FAMILIES["causal"].model_class(base, [prompt], CrossEntropy(), "prefix")
    ids = np.arange(7, 7 + NUM_VIRTUAL)
    prompt.begin_from(*model.read_contexts(Contexts([ids], 1))[0])
    cache = DynamicCache(config=base.config)
    base(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
    found = prompt()
    compared = 0
    for layer, (keys, values) in enumerate(zip(found.keys, found.values, strict=True)):
        if keys.shape[1]:
            torch.testing.assert_close(keys, cache.layers[layer].keys[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(values, cache.layers[layer].values[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared


def test_members_over_a_base_with_states_need_prefixes_of_one_length():
    base = build_base("lfm3")
    prompts = [build_prompt(base), build_prompt(base, num=3)]
    with pytest.raises(UserError, match="lfm3 models keep states, so in a sweep with prefix_tuning all members need"):
        FAMILIES["causal"].model_class(base, prompts, CrossEntropy(), "prefix")
