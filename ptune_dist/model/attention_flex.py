"""Attention over segments with torch's flex attention: ragged rows and shared keys in one kernel, nothing padded.

It is for CUDA, where the kernel is compiled once and skips blocks of keys that no query of a block reads.
Shapes: N live positions, X positions given from outside, H heads, G key/value heads, D width of a head.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ptune_dist.model.attention import KeysValues, Segment

# flex attention's mask function: batch, head, query and key as scalar tensors -> whether the query reads the key
Reads = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@functools.cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True)


class FlexSegments:
    """Any segments, over any keys/values given from outside."""

    def __init__(self, segments: list[Segment], outside: list[KeysValues], device: torch.device):
        self._outside = outside
        self._device = device
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

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        if self._several:  # segments share blocks of the kernel: what is not a number in one must not reach another
            k = k.nan_to_num(0.0, 0.0, 0.0)
            v = v.nan_to_num(0.0, 0.0, 0.0)
        k = torch.cat([*(part.keys[layer] for part in self._outside), k])
        v = torch.cat([*(part.values[layer] for part in self._outside), v])
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        run = compiled_flex_attention() if q.is_cuda else flex_attention
        return run(q, k, v, block_mask=self._mask(window), scale=scale, enable_gqa=True)[0].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        if window not in self._masks:
            num_queries = len(self._segment_of_query)
            num_keys = len(self._run_of_key)
            reads = self._build_reads() if window is None else self._build_reads_near(window)
            self._masks[window] = create_block_mask(reads, None, None, num_queries, num_keys, device=self._device)
        return self._masks[window]

    def _build_reads(self) -> Reads:
        """A query reads its own segment causally, and the runs that its segment names."""

        def reads(_b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            segment = self._segment_of_query[query]
            run = self._run_of_key[key]
            own = (run == segment + len(self._outside)) & (key - self._num_outside <= query)
            return self._table[segment, run] | own

        return reads

    def _build_reads_near(self, window: int) -> Reads:
        """The same, of the last `window` positions only."""
        reads = self._build_reads()
        position_of_key = self._positions_of_keys()

        def reads_near(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            is_near = self._position_of_query[query] - position_of_key[key] < window
            return reads(b, h, query, key) & is_near

        return reads_near

    def _positions_of_keys(self) -> torch.Tensor:
        """[X + N]: each key's position in its text. A lead, if there is one, is the first of `outside`."""
        before = 0
        parts = []
        for number, part in enumerate(self._outside):
            parts.append(torch.arange(part.length, device=self._device) + before)
            before = part.length if number == 0 and self._table[:, 0].all() else before
        return torch.cat([*parts, self._position_of_query])
