"""The base's inputs for one row of live positions. Legend: N live positions, D width."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ptune_dist.model.adapters import AdaptedSegments, positions_of
from ptune_dist.model.attention import Segment
from ptune_dist.model.attention_layouts import SegmentAttention
from ptune_dist.model.attention_trees import PlacedTree
from ptune_dist.model.entry import FromLayer
from ptune_dist.model.layout import Layout
from ptune_dist.model.members import vectors_of
from ptune_dist.model.packing import pack
from ptune_dist.model.passes import Supervised
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.method import Contribution

Index = dict[str, torch.Tensor]  # the arrays of a layout, by their names


class Late(NamedTuple):
    """Where a pass begins at a later layer."""

    model: PromptedModel
    start: int

    def enter(self, asked: Supervised) -> Supervised:
        """A pass over live positions with its vectors as the input of that layer."""
        hidden = asked.inputs["inputs_embeds"]
        inputs = asked.inputs | {
            "inputs_embeds": self.model.no_vectors(*hidden.shape[:2]),
            "segments": FromLayer(asked.inputs["segments"], self.start),
        }
        return dataclasses.replace(asked, inputs=inputs, layers=self.model.enter(self.start, hidden))


def no_mask(like: torch.Tensor) -> torch.Tensor:
    """A mask of four dimensions, which goes through transformers untouched; it would fit no keys if it were read."""
    return like.new_zeros(1, 1, 1, 0)


def arrays_of(laid: Layout) -> dict[str, np.ndarray]:
    """What a pass needs of a layout on the device."""
    return {name: getattr(laid, name) for name in ("tokens", "source", "position_ids", "predicts", "targets")}


def to_index(laid: Layout, device: torch.device) -> Index:
    """A layout's arrays on the device, in one copy."""
    return pack(arrays_of(laid), device).unpack(device)


def embed_laid(
    model: PromptedModel, index: Index, contributions: list[Contribution], below: torch.Tensor | None = None
) -> torch.Tensor:
    """The vectors of all live positions [N, D]; `below`: what stands for all tokens where layers have read them."""
    tokens = model.embed_tokens(index["tokens"]) if below is None else below
    vectors = [vectors_of(contribution, tokens) for contribution in contributions]
    return torch.cat([*vectors, tokens])[index["source"]]


def adapt(
    model: PromptedModel,
    attention: SegmentAttention,
    contributions: list[Contribution],
    segments: list[Segment],
    trees: Sequence[PlacedTree] = (),
) -> SegmentAttention:
    """The attention of a pass with the members' adapter tokens, where they have some."""
    if not model.adapted_attentions:
        return attention
    positions = positions_of(segments, trees, len(contributions), model.device)
    return AdaptedSegments(attention, model.adapted_attentions, contributions, positions)


def supervise_laid(
    index: Index, reader: np.ndarray, vectors: torch.Tensor, attention: SegmentAttention, late: Late | None = None
) -> Supervised:
    """The pass over live positions with vectors [N, D]; `reader` as in `Layout`."""
    inputs: dict[str, Any] = {
        "inputs_embeds": vectors[None],
        "position_ids": index["position_ids"][None],
        "attention_mask": no_mask(vectors),
        "segments": attention,
    }
    places = index["predicts"]
    asked = Supervised(torch.zeros_like(places), places, index["targets"], reader, inputs)
    return asked if late is None else late.enter(asked)
