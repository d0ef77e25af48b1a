"""Which kind of attention a pass over segments takes on a device; and keys/values recorded on the way.

Floor 2. Shapes: L layers, C positions of a context, N live positions, G key/value heads, H heads, D width of a head.
"""

import torch

from ptune_dist.model.attention import CausalSegments, KeysValues, Segment
from ptune_dist.model.attention_contexts import ContextSegments
from ptune_dist.model.attention_flex import FlexSegments


def build_attention(segments: list[Segment], outside: list[KeysValues], device: torch.device):
    """What `attention.attend` takes as `segments`."""
    if device.type == "cuda":
        return FlexSegments(segments, outside, device)
    if outside and not any(segment.parents for segment in segments):
        return ContextSegments(segments, outside, device)
    return CausalSegments(segments, join_parts(outside), device)


class RecordedSegments:
    """Attention that keeps the keys/values of its segments."""

    def __init__(self, segments: list[Segment], outside: list[KeysValues], device: torch.device):
        is_cuda = device.type == "cuda"
        self._attention = (
            FlexSegments(segments, outside, device)
            if is_cuda
            else CausalSegments(segments, join_parts(outside), device)
        )
        self._segments, self._layers = segments, []

    def attend(self, q, k, v, **settings) -> torch.Tensor:
        self._layers.append((k, v))
        return self._attention.attend(q, k, v, **settings)

    def cut(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [L, C, G, D] of every segment."""
        runs = [slice(s.start, s.start + s.length) for s in self._segments]
        return [
            tuple(torch.stack([tensor[run] for tensor in tensors]) for tensors in zip(*self._layers, strict=True))
            for run in runs
        ]


def join_parts(parts: list[KeysValues]) -> KeysValues | None:
    """Parts one after another as one; None for no parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return KeysValues(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
