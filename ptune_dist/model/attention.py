"""Attention over segments: texts stand one after another without padding and share what precedes them.

`attend` is an attention function of transformers' own interface. Without a layout it is torch's scaled-dot-product
attention. With one, all texts of a pass are one row of N live positions, each there once, and the layout says which
keys a position reads; linear layers, norms and rotations need not know.

Shapes: N live positions, E entries of a padded call, Q queries and J keys of an entry, H heads, G key/value heads,
D width of a head (of its values, where an architecture gives them another than queries and keys: MLA), L layers,
C positions of a context.
"""

import inspect
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptune_dist.base.layers import setting_of
from ptune_dist.model.attention_calls import hands_on
from ptune_dist.model.attention_products import attend_by_products, most_keys_by_products
from ptune_dist.model.keys_values import KeysValues

NAME = "ptune_segments"
WINDOW = "sliding_window"  # of configs and of attention layers
# A padded call costs as much as so many scores (queries x keys): what needs more padding gets a call of its own.
CALL_SCORES = 2000


class Segment(NamedTuple):
    """A run of live positions. It reads itself causally, and before that all of what it names, in this order.

    contexts: numbers of keys/values given from outside. parents: runs (start, length) of live positions.
    offset: its first position in its text. member: whose it is; on CUDA no kernel lets what is not a number in one
    member reach another. num_own: how many of the contexts, the last ones, are its member's own; the others belong to
    its row, and members share them.
    """

    start: int
    length: int
    contexts: tuple[int, ...] = ()
    parents: tuple[tuple[int, int], ...] = ()
    offset: int = 0
    member: int = 0
    num_own: int = 0

    @property
    def of_row(self) -> tuple[int, ...]:
        """The contexts that belong to the row; all, where there are no others."""
        return self.contexts[: len(self.contexts) - self.num_own] or self.contexts

    @property
    def of_member(self) -> tuple[int, ...]:
        """The contexts beside those of the row."""
        return self.contexts[len(self.of_row) :]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    segments: Any = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, N, D], key and value [B, G, N, D] -> ([B, N, H, D], None).

    `segments` is a `SegmentAttention` or None. The signature is transformers'.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **others
        )
    window = sliding_window if sliding_window is not None else window_of(module)
    # Not tensor[0]: its backward fills and copies a whole tensor, in another layout.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    scale = scaling if scaling is not None else 1 / math.sqrt(q.shape[-1])
    return segments.attend(q, k, v, layer=module.layer_idx, scale=scale, window=window)[None], None


def window_of(module: Any) -> int | None:
    """The window of a layer whose attention leaves it to the mask; a pass with a layout has no mask."""
    settings = getattr(module, "config", None)
    kinds = getattr(settings, "layer_types", None)
    if kinds and module.layer_idx is not None and kinds[module.layer_idx] != "sliding_attention":
        return None  # EXAONE 4's layers name the window whether they have it or not
    own = getattr(module, WINDOW, None)
    if own is None and masks_windows(type(module)):
        return setting_of(settings, WINDOW) if settings is not None else None
    return own


def masks_windows(kind: type[nn.Module]) -> bool:
    """Whether an architecture has masks with windows: Moshi's has the number, which nothing reads."""
    others = not kind.__module__.startswith("transformers.models.")
    return others or hasattr(sys.modules[kind.__module__], "create_sliding_window_causal_mask")


def windows_of(model: nn.Module) -> set[int | None]:
    """The windows of a model's layers; None: a layer reads everything."""
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    return {window_of(module) for module in attentions}


@contextmanager
def narrow_windows(model: nn.Module, width: int) -> Iterator[None]:
    """All sliding windows that are wider have a width of so many positions: short rows tell where they are."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    distinct = {id(config): config for config in configs if isinstance(config, PretrainedConfig)}
    uniform = [config for config in distinct.values() if setting_of(config, WINDOW) is not None]
    owners = [*model.modules(), *uniform]
    wide = [owner for owner in owners if isinstance(getattr(owner, WINDOW, None), int) and owner.sliding_window > width]
    if any(isinstance(inspect.getattr_static(type(owner), WINDOW, None), property) for owner in wide):
        wide = []  # it follows from other settings
    before = [getattr(owner, WINDOW) for owner in wide]
    for owner in wide:
        setattr(owner, WINDOW, width)
    try:
        yield
    finally:
        for owner, window in zip(wide, before, strict=True):
            setattr(owner, WINDOW, window)


def use_segments(model: PreTrainedModel) -> bool:
    """Have a model's layers call `attend`, where they can; False where they compute attention in a way of their own."""
    settings = model.config.get_text_config()
    capped = getattr(settings, "attn_logit_softcapping", None) is not None
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    # Convolutions, states and chunks run over what stands beside a text too.
    others = set(getattr(settings, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not model._supports_attention_backend or capped or sinks or others or not hands_on(model):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


class CausalSegments:
    """Segments that read live ones before them, and what they name of `outside`, which is copied for each of them.

    For devices without a kernel for ragged rows: entries of like size are padded to one call.
    """

    def __init__(self, segments: list[Segment], outside: list[KeysValues], device: torch.device):
        named = sorted({number for segment in segments for number in segment.contexts})
        self._outside = [outside[number] for number in named]
        ends = itertools.accumulate(part.length for part in self._outside)
        self._runs = {n: range(end - outside[n].length, end) for n, end in zip(named, ends, strict=True)}
        self._segments = segments
        self._device = device
        self._buckets: list[Bucket] = []
        self._places: torch.Tensor | None = None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        if self._places is None:
            self._places = self._fill_buckets(q, k)
        if self._outside:
            k = torch.cat([*(part.keys[layer] for part in self._outside), k])
            v = torch.cat([*(part.values[layer] for part in self._outside), v])
        padded = [bucket.attend(q, k, v, scale, window).flatten(0, 1) for bucket in self._buckets]
        return torch.cat(padded).index_select(0, self._places)

    def _fill_buckets(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The buckets of the first layer's tensors, which are those of all layers; where live positions stand [N]."""
        most_keys = 0
        if self._device.type == "cpu":
            most_keys = most_keys_by_products(q.dtype, is_grouped=q.shape[1] > k.shape[1])
        buckets = split_buckets(self._segments)
        self._buckets = [Bucket(bucket, self._runs, self._device, most_keys) for bucket in buckets]
        return find_places(self._buckets).to(self._device)


def find_places(buckets: list) -> torch.Tensor:
    """Where each live position [N] stands among the padded queries of all buckets, end to end.

    A bucket has `live`, its live positions, `kept`, where they are among its own queries, and `size`, how many it has.
    """
    starts = [sum(bucket.size for bucket in buckets[:i]) for i in range(len(buckets))]
    kept = torch.cat([start + bucket.kept for start, bucket in zip(starts, buckets, strict=True)])
    return kept[torch.cat([bucket.live for bucket in buckets]).argsort()]


def split_buckets(segments: list[Segment]) -> list[list[Segment]]:
    """Segments of one offset and like size together: they take one mask, and padding them wastes little."""
    buckets: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (s.offset, -s.length, s.start)):
        first = buckets[-1][0] if buckets else None
        if first is None or first.offset != segment.offset or count_scores(first) - count_scores(segment) > CALL_SCORES:
            buckets.append([])
        buckets[-1].append(segment)
    return buckets


def count_scores(segment: Segment) -> int:
    return segment.length * (segment.offset + segment.length)


class Bucket:
    """Segments of one offset as the entries of one padded call; keys are numbered [outside, live positions].

    live: the live positions of all entries [n]. kept: where they stand among the E * Q padded queries [n].
    """

    def __init__(
        self, segments: list[Segment], runs: dict[int, range], device: torch.device, most_keys_by_products: int
    ):
        """`runs`: where each part from outside stands among the keys."""
        num_outside = sum(map(len, runs.values()))
        longest = max(s.length for s in segments)
        self._offset = segments[0].offset
        self._by_products = self._offset + longest <= most_keys_by_products
        # torch's causal kernel skips what is masked but wants a square: where little precedes, it is worth as many
        # idle queries in front.
        self._is_square = self._offset <= longest // 2 and not self._by_products
        self._num_idle = self._offset if self._is_square else 0
        self.num_entries = len(segments)
        self.num_queries = self._num_idle + longest
        self._longest = longest
        self.size = self.num_entries * self.num_queries
        self._masks: dict = {}
        self.live = torch.cat([torch.arange(s.start, s.start + s.length) for s in segments])
        self.kept = torch.cat(
            [e * self.num_queries + self._num_idle + torch.arange(s.length) for e, s in enumerate(segments)]
        )
        queries = []
        keys = []
        for s in segments:
            # Padding repeats a position of the entry's own: where another's is not a number, this one's still is.
            own = pad_index(torch.arange(s.start, s.start + s.length), longest)
            before = [torch.arange(runs[number].start, runs[number].stop) for number in s.contexts]
            before += [num_outside + torch.arange(start, start + length) for start, length in s.parents]
            queries.append(torch.cat([own[:1].expand(self._num_idle), own]))
            keys.append(torch.cat([*before, num_outside + own]))
        self._queries = torch.cat(queries).to(device)
        self._keys = torch.cat(keys).to(device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """[E, Q, H, D]."""
        q, k, v = (
            whole.index_select(0, index).unflatten(0, (self.num_entries, -1)).transpose(1, 2)
            for whole, index in ((q, self._queries), (k, self._keys), (v, self._keys))
        )
        if self._by_products:
            return attend_by_products(q, k, v, mask=self._mask(q, window), scale=scale).transpose(1, 2)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        if self._is_square and window is None:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=self._mask(q, window), scale=scale)
        return out.transpose(1, 2)

    def _mask(self, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """What is added to the scores [Q, J]."""
        if (q.dtype, window) not in self._masks:
            first = self._offset - self._num_idle
            queries = torch.arange(first, first + self.num_queries, device=q.device)[:, None]
            keys = torch.arange(self._offset + self._longest, device=q.device)
            self._masks[q.dtype, window] = additive(reads(queries, keys, window), q.dtype)
        return self._masks[q.dtype, window]


def reads(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether positions `queries` of a text read its positions `keys`."""
    causal = keys <= queries
    return causal if window is None else causal & (queries - keys < window)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def pad_index(index: torch.Tensor, length: int) -> torch.Tensor:
    """An index repeated from its first on to `length`."""
    return torch.cat([index, index[:1].expand(length - len(index))])
