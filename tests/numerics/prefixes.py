"""Prompts of keys and values over random bases, and what transformers gives where it is handed the same numbers.

Shapes: L layers, P positions, C context positions, G key/value heads, Dh width of a head, V vocabulary.
"""

import dataclasses

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from ptune_dist.base.layers import key_value_heads
from ptune_dist.data.batches import Batch
from ptune_dist.prompts.method import BaseFacts, Contribution
from ptune_dist.prompts.prefix_mlp import PrefixMLP
from ptune_dist.prompts.prefix_options import PrefixOptions
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.start import Start
from ptune_dist.tiny.make import build_tokenizer


def facts_of(base: PreTrainedModel) -> BaseFacts:
    text = base.config.get_text_config()
    return BaseFacts(text.hidden_size, text.num_hidden_layers, *key_value_heads(text))


def draw_prefix(base: PreTrainedModel, num_positions: int, options: dict | None = None, seed: int = 0) -> PrefixTuning:
    """Random numbers under any options, an MLP's last layer among them, which adds nothing at most starts."""
    found = PrefixOptions(**options or {})
    facts = facts_of(base)
    widths = (facts.head_width, facts.value_width)
    shapes = [(facts.num_layers, num_positions, facts.num_key_value_heads, width) for width in widths]
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(shape, generator=draw) for shape in shapes)
    num_frozen = found.num_frozen or 0
    mlp = None
    if found.reparameterization == "mlp":
        start = Start("random", seed, build_tokenizer(), lambda ids: torch.zeros(len(ids), facts.width))
        mlp = PrefixMLP(shapes, num_frozen, found, start)
    return PrefixTuning(keys, values, num_frozen=num_frozen, train_keys=found.train_keys, mlp=mlp)


def with_rests(batch: Batch) -> Batch:
    """The last token of an input belongs to its rest: it predicts the first one of the target."""
    pairs = [(c, r) if len(r) else (c[:-1], c[-1:]) for c, r in zip(batch.contexts, batch.rests, strict=True)]
    contexts, rests = (list(parts) for parts in zip(*pairs, strict=True))
    return dataclasses.replace(batch, contexts=contexts, rests=rests)


def plain_prefix_logits(
    base: PreTrainedModel, prompt: Contribution, context: np.ndarray, rest: np.ndarray, target: np.ndarray
) -> torch.Tensor:
    """Logits [T, V] for a target of T tokens after a cache of [context, prompt], which the context does not read."""
    read = DynamicCache()
    if len(context):
        with torch.no_grad():
            base(input_ids=torch.from_numpy(context).long()[None], past_key_values=read, use_cache=True)
    assert prompt.keys is not None and prompt.values is not None
    cache = DynamicCache()
    for layer, parts in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        own = [part.transpose(0, 1)[None] for part in parts]
        before = [[read.layers[layer].keys], [read.layers[layer].values]] if len(context) else [[], []]
        cache.update(*(torch.cat([*some, part], dim=2) for some, part in zip(before, own, strict=True)), layer)
    ids = torch.from_numpy(np.concatenate([rest, target])).long()[None]
    mask = torch.ones(1, len(context) + prompt.num_prefix + ids.shape[1], dtype=torch.long)
    logits = base(input_ids=ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits
    return logits[0, -len(target) - 1 : -1]
