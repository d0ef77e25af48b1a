"""Which kind of attention a pass over segments takes on a device; and keys/values recorded on the way.

Shapes: L layers, C positions of a context, N live positions, G key/value heads, H heads, D width of a head.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from ptune_dist.model.attention import CausalSegments, KeysValues, Segment
from ptune_dist.model.attention_contexts import ContextSegments
from ptune_dist.model.attention_flex import FlexSegments, FlexTables

FEWEST_WIDTH = 16  # flex attention refuses narrower heads
FIRST_CAPABILITY = (8, 0)  # Triton compiles no matrix products for GPUs before Ampere anymore


class SegmentAttention(Protocol):
    """What `attention.attend` takes as `segments`."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        ...


def build_attention(
    segments: list[Segment],
    outside: list[KeysValues],
    device: torch.device,
    tables: Mapping[int | None, FlexTables] | None = None,
) -> SegmentAttention:
    """The attention of a pass. `tables`: those of flex attention, by window, where they were prepared."""
    if device.type == "cuda":
        padded = partial(build_padded, segments, outside, device)
        return CudaSegments(partial(FlexSegments, segments, outside, device, tables), padded)
    return build_padded(segments, outside, device)


def build_padded(segments: list[Segment], outside: list[KeysValues], device: torch.device) -> SegmentAttention:
    """Padded calls of torch's own attention, by what the segments read: for where no kernel takes ragged rows."""
    if not any(segment.parents for segment in segments):
        is_causal = not outside or has_short_prefixes(segments)
        return (CausalSegments if is_causal else ContextSegments)(segments, outside, device)
    parents = {run for segment in segments for run in segment.parents}
    alone = [s for s in segments if s.contexts and not s.parents and (s.start, s.length) not in parents]
    if not alone:
        return CausalSegments(segments, outside, device)
    return MixedSegments(segments, alone, outside, device)


def has_short_prefixes(segments: list[Segment]) -> bool:
    """Whether all that is read from outside is members' own, and shorter than the segments: copies cost little."""
    if any(segment.num_own < len(segment.contexts) for segment in segments):
        return False
    return sum(segment.offset for segment in segments) <= sum(segment.length for segment in segments)


class CudaSegments:
    """Flex attention where the GPU and the base's heads allow it, else padded calls."""

    def __init__(self, build_flex: Callable[[], SegmentAttention], build_padded: Callable[[], SegmentAttention]):
        self._build_flex = build_flex
        self._build_padded = build_padded
        self._chosen: SegmentAttention | None = None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        if self._chosen is None:  # how wide the heads are is known from the first layer on
            narrower = min(q.shape[-1], v.shape[-1])
            self._chosen = self._build_flex() if takes_flex(narrower) else self._build_padded()
        return self._chosen.attend(q, k, v, layer=layer, scale=scale, window=window)


def takes_flex(width: int) -> bool:
    """Whether flex attention's kernels run on this GPU with heads so wide."""
    return width >= FEWEST_WIDTH and torch.cuda.get_device_capability() >= FIRST_CAPABILITY


class MixedSegments:
    """Some segments read nothing but keys/values from outside, others live ones too."""

    def __init__(self, segments: list[Segment], alone: list[Segment], outside: list[KeysValues], device: torch.device):
        chained = [segment for segment in segments if segment not in alone]
        self._parts = [CausalSegments(chained, outside, device), build_padded(alone, outside, device)]
        live = [torch.arange(s.start, s.start + s.length) for part in (chained, alone) for s in by_start(part)]
        self._places = torch.cat(live).argsort().to(device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        found = [part.attend(q, k, v, layer=layer, scale=scale, window=window) for part in self._parts]
        return torch.cat(found).index_select(0, self._places)


def by_start(segments: list[Segment]) -> list[Segment]:
    return sorted(segments, key=lambda segment: segment.start)


class RecordedSegments:
    """Attention that keeps the keys/values of its segments."""

    def __init__(self, segments: list[Segment], outside: list[KeysValues], device: torch.device):
        self._attention: SegmentAttention
        if device.type == "cuda":
            self._attention = build_attention(segments, outside, device)
        elif len({segment.contexts for segment in segments}) > 1:
            self._attention = ContextSegments(segments, outside, device)
        else:
            self._attention = CausalSegments(segments, outside, device)
        self._segments = segments
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> torch.Tensor:
        self._layers.append((k, v))
        return self._attention.attend(q, k, v, **settings)

    def cut(self) -> list[KeysValues]:
        """Keys and values [L, C, G, D] of every segment."""
        runs = [slice(s.start, s.start + s.length) for s in self._segments]
        return [KeysValues.of_layers([(k[run], v[run]) for k, v in self._layers]) for run in runs]
