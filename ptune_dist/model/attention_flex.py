"""Attention over segments with torch's flex attention: ragged rows and shared keys in one kernel, nothing padded.

Floor 2. For CUDA, where the kernel is compiled once and skips blocks of keys that no query of a block reads.
Shapes: N live positions, X positions given from outside, H heads, G key/value heads, D width of a head.
"""

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ptune_dist.model.attention import KeysValues, Segment


@functools.cache
def compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=True)


class FlexSegments:
    """Any segments, over any keys/values given from outside."""

    def __init__(self, segments: list[Segment], outside: list[KeysValues], device: torch.device):
        self._outside, self._device = outside, device
        self._num_outside = sum(part.length for part in outside)
        self._several = len(segments) > 1
        lengths = [part.length for part in outside] + [s.length for s in segments]
        self._run_of_key = torch.repeat_interleave(torch.tensor(lengths)).to(device)
        self._segment_of_query = self._run_of_key[self._num_outside :] - len(outside)
        offsets = torch.tensor([s.offset - s.start for s in segments], device=device)
        self._position_of_query = torch.arange(len(self._segment_of_query), device=device)
        self._position_of_query = self._position_of_query + offsets[self._segment_of_query]
        starts = {s.start: len(outside) + number for number, s in enumerate(segments)}
        table = torch.zeros(len(segments), len(lengths), dtype=torch.bool)
        for number, s in enumerate(segments):
            table[number, list(s.contexts)] = True
            for start, length in s.parents:
                assert lengths[starts[start]] == length, "a parent is a whole segment"
                table[number, starts[start]] = True
        self._table = table.to(device)
        self._masks: dict[int | None, BlockMask] = {}

    def attend(self, q, k, v, *, layer: int, scale: float, window: int | None) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        if self._several:  # segments share blocks of the kernel: what is not a number in one must not reach another
            k, v = k.nan_to_num(0.0, 0.0, 0.0), v.nan_to_num(0.0, 0.0, 0.0)
        k = torch.cat([*(part.keys[layer] for part in self._outside), k])
        v = torch.cat([*(part.values[layer] for part in self._outside), v])
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        run = compiled_flex_attention() if q.is_cuda else flex_attention
        return run(q, k, v, block_mask=self._mask(window), scale=scale, enable_gqa=True)[0].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        if window not in self._masks:
            num_queries, num_keys = len(self._segment_of_query), len(self._run_of_key)
            position_of_key = self._positions_of_keys() if window is not None else None

            def reads(_b, _h, query, key):
                segment, run = self._segment_of_query[query], self._run_of_key[key]
                own = (run == segment + len(self._outside)) & (key - self._num_outside <= query)
                read = self._table[segment, run] | own
                if window is None:
                    return read
                return read & (self._position_of_query[query] - position_of_key[key] < window)

            self._masks[window] = create_block_mask(reads, None, None, num_queries, num_keys, device=self._device)
        return self._masks[window]

    def _positions_of_keys(self) -> torch.Tensor:
        """[X + N]: each key's position in its text. A lead, if there is one, is the first of `outside`."""
        before, parts = 0, []
        for number, part in enumerate(self._outside):
            parts.append(torch.arange(part.length, device=self._device) + before)
            before = part.length if number == 0 and self._table[:, 0].all() else before
        return torch.cat([*parts, self._position_of_query])
