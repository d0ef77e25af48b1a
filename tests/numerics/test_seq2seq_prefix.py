"""Prefix keys and values of encoder-decoders: against plain passes of each row alone, and against PEFT's.

Shapes: L layers, P positions, G key/value heads, Dh width of a head, V vocabulary.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.data.batches import Batch
from ptune_dist.families import FAMILIES
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.method import Contribution, Method
from ptune_dist.prompts.prefix_tuning import PrefixOptions, PrefixTuning
from ptune_dist.prompts.start import Start
from ptune_dist.run.job import base_facts
from ptune_dist.tiny.make import build_tokenizer
from tests.conftest import SEQ2SEQ
from tests.numerics.passes import assert_same, build_base, draw_batch, hold, weights_of

PLACEMENTS = ["encoder", "decoder", "both"]


@pytest.fixture(scope="module")
def bases() -> dict:
    return {kind: build_base(kind) for kind in SEQ2SEQ}


def draw_prefix(base: PreTrainedModel, placement: str, num: int = 4, seed: int = 0, **options) -> PrefixTuning:
    """Random keys and values that are felt."""
    facts = base_facts(base)
    start = Start(
        "random", seed, build_tokenizer(), lambda ids: torch.zeros(len(ids), 1), asked="random", placement=placement
    )
    prompt = PrefixTuning.build(PrefixOptions(**options), num, facts, start)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.mul_(2.0)
    return prompt


def build_model(base: PreTrainedModel, prompts: list[Method], placement: str, recompute: bool = False) -> PromptedModel:
    base = copy.deepcopy(base)
    if recompute:
        Recomputer(DEFAULTS, layers_of(base))
    return FAMILIES["seq2seq"].model_class(base, prompts, CrossEntropy(), placement).train()


def batch_of(placement: str, readers=None) -> Batch:
    return draw_batch("decoder" if placement == "decoder" else "encoder", readers=readers)[0]


class Before(DynamicCache):
    """Of one layer of an encoder: a prefix [1, G, P, Dh] that is read before its own positions."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self._first = keys, values

    def update(self, key_states, value_states, *_):
        return tuple(torch.cat(pair, dim=2) for pair in zip(self._first, (key_states, value_states), strict=True))

    def get_seq_length(self, *_):
        return self._first[0].shape[2]


def pairs_of(keys: torch.Tensor | None, values: torch.Tensor | None) -> list[list[torch.Tensor]]:
    """Keys and values [1, G, P, Dh] of every layer; none where there are none."""
    if keys is None or values is None:
        return []
    return [[part.transpose(0, 1)[None] for part in pair] for pair in zip(keys, values, strict=True)]


def plain_logits(base: PreTrainedModel, prompt: Contribution, read: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """[T, V] of a target of T tokens, by transformers' own caches; an encoder's are put in its attentions' calls."""
    ids = torch.from_numpy(read).long()[None]
    mask = torch.ones_like(ids)
    by_layer = {
        "encoder": pairs_of(prompt.encoder_keys, prompt.encoder_values),
        "own": pairs_of(prompt.keys, prompt.values),
        "cross": pairs_of(prompt.cross_keys, prompt.cross_values),
    }
    hooks = []
    encoder = base.get_encoder()
    attentions = [m for m in encoder.modules() if hasattr(m, "k") or hasattr(m, "k_proj")]
    assert len(attentions) == base.config.num_hidden_layers
    for attention, pair in zip(attentions, by_layer["encoder"], strict=False):
        given = {"past_key_values": Before(*pair)}
        hooks.append(attention.register_forward_pre_hook(lambda _, a, k, g=given: (a, k | g), with_kwargs=True))
    longer = torch.ones(1, len(read) + (prompt.encoder_keys.shape[1] if hooks else 0))
    hidden = encoder(input_ids=ids, attention_mask=longer)
    for hook in hooks:
        hook.remove()
    caches = [DynamicCache(pairs) if pairs else DynamicCache() for pairs in (by_layer["own"], by_layer["cross"])]
    cache = EncoderDecoderCache(*caches)
    cache.is_updated = {}
    num_cross = prompt.cross_keys.shape[1] if by_layer["cross"] else 0
    written = torch.tensor([[base.config.decoder_start_token_id, *target[:-1].tolist()]])
    return base(
        encoder_outputs=hidden,
        attention_mask=torch.cat([mask.new_ones(1, num_cross), mask], dim=1),
        decoder_input_ids=written,
        past_key_values=cache,
        use_cache=True,
    ).logits[0]


def ours(model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """Losses [S], and the gradient of each parameter under weights that differ from reader to reader."""
    model.zero_grad()
    losses = model.losses(batch)
    (losses * weights_of(batch)).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.prompts.parameters())]


def plain(base: PreTrainedModel, model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """What `ours` should give: every reader alone."""
    model.zero_grad()
    losses = []
    for row, member in batch.readers:
        read = np.concatenate([batch.contexts[row], batch.rests[row]])
        logits = plain_logits(base, model.prompt(member)(), read, batch.targets[row])
        target = torch.from_numpy(batch.targets[row]).long()
        losses.append(nn.functional.cross_entropy(logits, target, reduction="sum"))
    (torch.stack(losses) * weights_of(batch)).sum().backward()
    return [torch.stack(losses).detach(), *(p.grad.clone() for p in model.prompts.parameters())]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_losses_and_gradients_are_those_of_plain_passes(bases, kind, placement):
    batch = batch_of(placement)
    base = bases[kind]
    more = {"num_frozen": 1, "reparameterization": "mlp", "encoder_hidden_size": 5}
    prompts = [draw_prefix(base, placement), draw_prefix(base, placement, seed=1, **more)]
    for recompute in (False, True):
        model = build_model(base, prompts, placement, recompute)
        assert_same(ours(model, hold(model, batch)), plain(base, model, batch))
