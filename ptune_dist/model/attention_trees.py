"""Attention of label trees: many short texts after one input, each of which reads the input and its own branch.

Flex attention takes every run of a tree as a segment, which it reads where it stands. Elsewhere a tree is one call, so
that the keys of an input are read in place and not once for each label.

Shapes: N live positions, T positions of a tile, C positions before a tree, H heads, G key/value heads, R = H / G,
D width of a head.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ptune_dist.data.label_tree import LabelTree
from ptune_dist.model.attention import KeysValues, Segment, additive
from ptune_dist.model.attention_flex import FlexSegments
from ptune_dist.model.attention_layouts import CudaSegments, SegmentAttention, build_attention


class PlacedTree(NamedTuple):
    """A tree whose tokens are live positions from `start` on.

    contexts, parents, offset: what all of them read first, as in a `Segment`. member: whose they are.
    """

    tree: LabelTree
    start: int
    contexts: tuple[int, ...]
    parents: tuple[tuple[int, int], ...]
    offset: int
    member: int

    def segments(self) -> list[Segment]:
        """The runs of the tree."""
        runs = [(self.start + first, count) for first, count, _ in self.tree.runs]
        return [
            Segment(
                *run,
                self.contexts,
                (*self.parents, *(runs[number] for number in before)),
                self.offset + int(self.tree.depths[first]),
                self.member,
            )
            for run, (first, _, before) in zip(runs, self.tree.runs, strict=True)
        ]


def build_tree_attention(
    segments: list[Segment], trees: list[PlacedTree], outside: list[KeysValues], device: torch.device
) -> SegmentAttention:
    """The attention of segments, and of trees that stand after all of them."""
    apart = partial(SegmentsAndTrees, segments, trees, outside, device)
    if device.type != "cuda":
        return apart()
    runs = [run for placed in trees for run in placed.segments()]
    return CudaSegments(partial(FlexSegments, [*segments, *runs], outside, device), apart)


class SegmentsAndTrees:
    """Segments as in a pass without trees, then one tree after another."""

    def __init__(
        self, segments: list[Segment], trees: list[PlacedTree], outside: list[KeysValues], device: torch.device
    ):
        self._segments = build_attention(segments, outside, device)
        self._trees = trees
        self._outside = outside
        self._device = device
        self._masks: dict[tuple[int, int, tuple[int, int] | None, torch.dtype], torch.Tensor] = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        parts = [self._segments.attend(q, k, v, layer=layer, scale=scale, window=window)]
        for placed in self._trees:
            keys, values = self._before(placed, k, v, layer)
            for number, (first, end, _) in enumerate(placed.tree.tiles):
                own = slice(placed.start + first, placed.start + end)
                mask = self._mask(placed, number, window, q.dtype)
                parts.append(attend_tile(q[own] * scale, (keys, k[own]), (values, v[own]), mask))
        return torch.cat(parts)

    def _before(
        self, placed: PlacedTree, k: torch.Tensor, v: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [C, G, D] of what a tree reads first."""
        outside = [self._outside[number] for number in placed.contexts]
        runs = [slice(start, start + length) for start, length in placed.parents]
        keys = [part.keys[layer] for part in outside] + [k[run] for run in runs]
        values = [part.values[layer] for part in outside] + [v[run] for run in runs]
        return torch.cat([k[:0], *keys]), torch.cat([v[:0], *values])

    def _mask(self, placed: PlacedTree, number: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of a tile [T, C + T]; without a window it is the same for all inputs: [T, T]."""
        key = (id(placed.tree), number, None if window is None else (window, placed.offset), dtype)
        if key not in self._masks:
            self._masks[key] = additive(torch.from_numpy(tile_reads(placed, number, window)), dtype).to(self._device)
        return self._masks[key]


def tile_reads(placed: PlacedTree, number: int, window: int | None) -> np.ndarray:
    """Whether the tokens of a tile read each other [T, T], or, with a window, what is before them too [T, C + T]."""
    first, end, reads = placed.tree.tiles[number]
    if window is None:
        return reads
    depths = placed.tree.depths[first:end]
    positions = np.concatenate([np.arange(placed.offset), placed.offset + depths])
    is_near = placed.offset + depths[:, None] - positions < window
    return np.concatenate([np.ones((end - first, placed.offset), bool), reads], axis=1) & is_near


def attend_tile(
    q: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """[T, H, D] from scaled queries [T, H, D]; keys and values before them [C, G, D] and of their own [T, G, D]."""
    num_before, num_groups, _ = keys[0].shape
    grouped = q.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)  # [G, R, T, D]
    before, own = (grouped.flatten(1, 2) @ part.permute(1, 2, 0) for part in keys)  # [G, R * T, C] and [G, R * T, T]
    scores = torch.cat([before, own], dim=2).unflatten(1, grouped.shape[1:3])  # [G, R, T, C + T]
    scores[..., scores.shape[-1] - mask.shape[-1] :] += mask
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype).flatten(1, 2)
    over_before, over_own = shares.split([num_before, len(q)], dim=2)
    out = over_before @ values[0].transpose(0, 1) + over_own @ values[1].transpose(0, 1)  # [G, R * T, D]
    return out.unflatten(1, grouped.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)
