"""Attention of short segments over long contexts, for devices without a kernel for ragged rows.

All segments that attend to a context share one copy of its keys and values, and all that attend to a member's own keys
and values after it share those. No segment's values enter another's sums.

Shapes: E contexts, M segments per context, S positions of a segment, C positions of a context, P positions of a
member's own, N live positions, H heads, G key/value heads, R = H / G, D width of a head.
"""

import math

import torch

from ptune_dist.model.attention import KeysValues, Segment, additive, find_places, pad_index, reads
from ptune_dist.model.attention_members import MemberParts

CONTEXT_CALL_SCORES = 4000  # a padded call costs as much as this many scores


class ContextSegments:
    """Segments that attend to given contexts and to themselves; contexts of similar length are padded together."""

    def __init__(self, segments: list[Segment], outside: list[KeysValues], device: torch.device):
        groups: dict[tuple[int, ...], list[Segment]] = {}
        for segment in segments:
            groups.setdefault(segment.of_row, []).append(segment)
        lengths = {named: sum(outside[number].length for number in named) for named in groups}
        buckets = split_groups(list(groups.values()), lengths)
        self._buckets = [ContextBucket(bucket, lengths, outside, device) for bucket in buckets]
        self._places = find_places(self._buckets).to(device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        padded = [bucket.attend(q, k, v, layer, scale, window) for bucket in self._buckets]
        return torch.cat(padded).index_select(0, self._places)


def split_groups(groups: list[list[Segment]], lengths: dict[tuple[int, ...], int]) -> list[list[list[Segment]]]:
    """Join groups, each of the segments over one context, as long as padding them costs less than another call."""
    buckets: list[list[list[Segment]]] = []
    longest = 0  # context of the bucket
    for group in sorted(groups, key=lambda group: -lengths[group[0].of_row]):
        length = lengths[group[0].of_row]
        queries = sum(segment.length for segment in group)
        if not buckets or (longest - length) * queries > CONTEXT_CALL_SCORES:
            buckets.append([])
            longest = length
        buckets[-1].append(group)
    return buckets


class ContextBucket:
    """Segments in groups that attend to one context each, padded to one size."""

    def __init__(
        self,
        groups: list[list[Segment]],
        lengths: dict[tuple[int, ...], int],
        outside: list[KeysValues],
        device: torch.device,
    ):
        """`lengths`: of the contexts, by the numbers of their parts."""
        self._outside = outside
        self._named = [group[0].of_row for group in groups]
        num_members = max(map(len, groups))
        longest = max(segment.length for group in groups for segment in group)
        self._shape = (len(groups), num_members, longest)  # [E, M, S]
        self._longest_context = max(lengths[named] for named in self._named)
        self._lengths = torch.tensor([lengths[named] for named in self._named], device=device)
        self._masks: dict[tuple[torch.dtype, int | None], tuple[torch.Tensor, torch.Tensor]] = {}
        index: list[torch.Tensor] = []
        live: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        readers: list[Segment] = []  # of the E * M places
        for e, group in enumerate(groups):
            for m in range(num_members):
                s = group[min(m, len(group) - 1)]  # if a context has fewer segments, its last one is repeated
                positions = torch.arange(s.start, s.start + s.length)
                readers.append(s)
                index.append(pad_index(positions, longest))
                if m < len(group):
                    live.append(positions)
                    kept.append((e * num_members + m) * longest + torch.arange(s.length))
        self._index = torch.cat(index).to(device)
        self.live = torch.cat(live)
        self.kept = torch.cat(kept)
        self.size = math.prod(self._shape)
        self._own = MemberParts(readers, outside, self._shape, device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [E * M * S, H, D]."""
        longest = self._shape[2]
        repeats = q.shape[1] // k.shape[1]
        q, k, v = (t.index_select(0, self._index).unflatten(0, self._shape) for t in (q * scale, k, v))
        q = q.unflatten(3, (-1, repeats)).permute(0, 3, 1, 4, 2, 5)  # [E, G, M, R, S, D]
        k = k.permute(0, 3, 1, 4, 2)  # [E, G, M, D, S]
        v = v.permute(0, 3, 1, 2, 4)  # [E, G, M, S, D]
        context_k, context_v = self._pad(layer)  # [E, G, C, D]
        context_mask, own_mask = self._mask(q.dtype, window, context_v.shape[2])
        over_context = (q.flatten(2, 4) @ context_k.transpose(2, 3)).unflatten(2, q.shape[2:5])  # [E, G, M, R, S, C]
        over_own = (q.flatten(3, 4) @ k).unflatten(3, q.shape[3:5])  # [E, G, M, R, S, S]
        over_member = self._own.scores(q, layer, window)  # [E, G, M, R, S, P]
        scores = torch.cat([over_context + context_mask, *over_member, over_own + own_mask], dim=-1)
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        of_context, of_member, of_own = shares.split([context_v.shape[2], self._own.width, longest], dim=-1)
        out = (of_context.flatten(2, 4) @ context_v).unflatten(2, q.shape[2:5])
        out = out + (of_own.flatten(3, 4) @ v).unflatten(3, q.shape[3:5])
        for part in self._own.sums(of_member, layer):
            out = out + part
        return out.permute(0, 2, 4, 1, 3, 5).reshape(-1, q.shape[1] * repeats, out.shape[-1])

    def _pad(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values of all contexts, [E, G, C, D] each, padded with zeros."""
        width = self._longest_context
        like = [part[layer] for part in self._outside[0]]  # [C, G, D]
        padded = [t.new_zeros(len(self._named), t.shape[1], width, t.shape[2]) for t in like]
        for row, named in enumerate(self._named):
            start = 0
            for part in (self._outside[number] for number in named):
                for whole, tensor in zip(padded, part, strict=True):
                    whole[row, :, start : start + part.length] = tensor[layer].transpose(0, 1)
                start += part.length
        return padded[0], padded[1]

    def _mask(self, dtype: torch.dtype, window: int | None, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Additive masks of the scores over contexts and over own positions.

        [E, 1, 1, 1, 1, C], or with a window [E, 1, M, 1, S, C]; and [S, S].
        """
        if (dtype, window) not in self._masks:
            own = torch.arange(self._shape[2], device=self._lengths.device)
            keys = torch.arange(width, device=self._lengths.device)
            in_context = keys < self._lengths[:, None, None, None]  # [E, 1, 1, C]
            if window is not None:
                first = self._lengths[:, None] + self._own.lengths  # [E, M]
                in_context = in_context & reads(first[:, :, None, None] + own[:, None], keys, window)
            context_mask = additive(in_context, dtype)[:, None, :, None]
            own_mask = additive(reads(own[:, None], own, window), dtype)
            self._masks[dtype, window] = (context_mask, own_mask)
        return self._masks[dtype, window]
