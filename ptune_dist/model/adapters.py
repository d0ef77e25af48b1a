"""Adapter tokens of LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): a second, gated attention in the upper layers.

Every position attends to the adapter tokens of its member by a softmax of their own, and a gate scales what it finds.
Keys and values of the tokens are made by the layer's own projections, without rotation, so it happens inside the layer.
Shapes: N live positions, P adapter tokens, H heads, G key/value heads, D width of a head, C width of the base, A layers
that have adapter tokens, K members.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.layers import attentions_of
from ptune_dist.base.merge import MergedPart
from ptune_dist.base.trained import change_class
from ptune_dist.model.attention import Segment
from ptune_dist.model.attention_layouts import SegmentAttention
from ptune_dist.model.attention_trees import PlacedTree
from ptune_dist.prompts.method import Contribution

JOINT = "c_attn"  # GPT-2's projection to queries, keys and values
FOUND = "found_of_adapters"  # of GPT-2's attention: what is added after its output projection


def prepare_attentions(base: PreTrainedModel) -> list[nn.Module]:
    """The attention of every layer, in order. GPT-2's gets a class that adds to its output what `Adapters` found.

    PEFT adds it there without the output projection.
    """
    found = [module for _, module in attentions_of(base)]
    for module in found:
        if hasattr(module, JOINT) and FOUND not in module.__dict__:
            module.__dict__[FOUND] = None
            change_class(module, {"forward": add_found(type(module).forward)})
    return found


def add_found(forward: Any) -> Any:
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        output, *others = forward(self, *args, **kwargs)
        found = self.__dict__[FOUND]
        self.__dict__[FOUND] = None
        return (output if found is None else output + found, *others)

    return run


class AdaptedSegments:
    """The attention of a pass, and that of the members' adapter tokens beside it."""

    def __init__(
        self,
        attention: SegmentAttention,
        modules: Sequence[nn.Module],
        contributions: Sequence[Contribution],
        positions: Sequence[torch.Tensor | None],
    ):
        """`modules` are those of `prepare_attentions`. `positions`: the live ones of each member; None: all."""
        self._attention = attention
        self._modules = modules
        self._contributions = contributions
        self._positions = positions

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        out = self._attention.attend(q, k, v, layer=layer, scale=scale, window=window)
        module = self._modules[layer]
        for contribution, positions in zip(self._contributions, self._positions, strict=True):
            number = layer - len(self._modules) + contribution.num_adapted
            if number < 0:
                continue
            assert contribution.adapters is not None and contribution.gate is not None
            own = q if positions is None else q.index_select(0, positions)
            tokens = contribution.adapters[number].to(q.dtype)
            added = attend_gated(module, own, tokens, contribution.gate[number].to(q.dtype), scale)
            if positions is not None:
                added = torch.zeros_like(q).index_copy(0, positions, added)
            if FOUND in module.__dict__:
                before = module.__dict__[FOUND]
                added = added.flatten(1)[None]
                module.__dict__[FOUND] = added if before is None else before + added
            else:
                out = out + added
        return out


def attend_gated(
    module: nn.Module, q: torch.Tensor, tokens: torch.Tensor, gate: torch.Tensor, scale: float
) -> torch.Tensor:
    """[N, H, D] of queries [N, H, D] over the keys and values of tokens [P, C]."""
    k, v = project(module, tokens, q.shape[-1])
    repeats = q.shape[1] // k.shape[0]
    k, v = (part.repeat_interleave(repeats, dim=0) for part in (k, v))
    scores = torch.softmax(q.transpose(0, 1) @ k.transpose(1, 2) * scale, dim=-1, dtype=torch.float32)
    return (gate * scores.to(q.dtype) @ v).transpose(0, 1)


def project(module: Any, tokens: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [G, P, D] of tokens [P, C], by the layer's own projections."""
    if hasattr(module, JOINT):
        _, k, v = getattr(module, JOINT)(tokens[None]).chunk(3, dim=-1)
    else:
        given = tokens[None]
        k, v = module.k_proj(given), module.v_proj(given)
        if isinstance(module.q_proj, MergedPart):
            module.q_proj(given)  # the product of all three is held until the last of them has taken its part
    k, v = (part[0].unflatten(-1, (-1, width)) for part in (k, v))
    if hasattr(module, "k_norm"):  # Qwen 3's queries have been through one
        k = module.k_norm(k)
    return k.transpose(0, 1), v.transpose(0, 1)


def positions_of(
    segments: Sequence[Segment], trees: Sequence[PlacedTree], num_members: int, device: torch.device
) -> list[torch.Tensor | None]:
    """The live positions of each member; None where there is only one."""
    if num_members == 1:
        return [None]
    runs = [(s.member, np.arange(s.start, s.start + s.length)) for s in segments]
    runs += [(placed.member, placed.start + np.arange(len(placed.tree.tokens))) for placed in trees]
    nothing = np.zeros(0, np.int64)
    own = [np.concatenate([nothing, *(run for of, run in runs if of == member)]) for member in range(num_members)]
    return [cast(torch.Tensor, torch.from_numpy(part).to(device)) for part in own]
