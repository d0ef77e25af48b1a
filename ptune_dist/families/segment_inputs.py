"""The base's inputs for one row of live positions. Legend: N live positions, D width."""

from typing import Any

import torch

from ptune_dist.model.attention_layouts import SegmentAttention
from ptune_dist.model.layout import Layout
from ptune_dist.model.prompted_model import PromptedModel, Supervised, vectors_of
from ptune_dist.prompts.method import Contribution


def no_mask(like: torch.Tensor) -> torch.Tensor:
    """A mask of four dimensions, which goes through transformers untouched; it would fit no keys if it were read."""
    return like.new_zeros(1, 1, 1, 0)


def embed_laid(model: PromptedModel, laid: Layout, contributions: list[Contribution]) -> torch.Tensor:
    """The vectors of all live positions [N, D]."""
    tokens = model.embed_tokens(laid.tokens)
    vectors = [vectors_of(contribution, tokens) for contribution in contributions]
    return torch.cat([*vectors, tokens])[model.to_tensor(laid.source)]


def supervise_laid(
    model: PromptedModel, laid: Layout, vectors: torch.Tensor, attention: SegmentAttention
) -> Supervised:
    """The pass over live positions with vectors [N, D]."""
    places = model.to_tensor(laid.predicts)
    inputs: dict[str, Any] = {
        "inputs_embeds": vectors[None],
        "position_ids": model.to_tensor(laid.position_ids)[None],
        "attention_mask": no_mask(vectors),
        "segments": attention,
    }
    return Supervised(torch.zeros_like(places), places, model.to_tensor(laid.targets), laid.reader, inputs)
