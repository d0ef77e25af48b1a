"""Rows of answers in progress, over a base whose passes are rows of segments.

Each pass reads the newest token of every row and, beside them, whole inputs of rows that enter; nothing is padded, and
what all inputs begin with is read once.

Shapes: n rows in progress, m rows that enter, V vocabulary, N live positions.
"""

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from ptune_dist.base.layers import keys_values_width
from ptune_dist.data.batches import Batch
from ptune_dist.families.segment_inputs import adapt, embed_laid, supervise_laid, to_index
from ptune_dist.model.attention import Segment
from ptune_dist.model.attention_layouts import RecordedSegments, SegmentAttention
from ptune_dist.model.decode import DecodePass, Pools
from ptune_dist.model.keys_values import KeysValues, join_parts
from ptune_dist.model.layout import Before, Layout, LayoutBuilder, collect_outside
from ptune_dist.model.members import keys_values_of
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.method import Contribution

# What training holds of a position in a layer, in widths: its input, its queries, and at least twice as much of an MLP.
WIDTHS_PER_LAYER = 4


class Entering(NamedTuple):
    """Rows whose input was read in the last pass: what they read from outside, beyond the lead, and the record."""

    before: list[list[KeysValues]]
    recorded: RecordedSegments


class SegmentDecoder:
    """`model.decode.Decoder` over segments."""

    enters_any_time = True
    shares_beginnings = True
    needs_contexts = False
    takes_contexts = True

    def __init__(self, model: PromptedModel, number: int):
        """`number`: of the contribution that all rows are read with."""
        self._model = model
        self._number = number
        self._found: Contribution | None = None
        self._pools = Pools(None)
        self._entering: Entering | None = None
        self._is_prompt_read = False  # the virtual tokens are in the lead

    @property
    def held_per_position(self) -> int:
        shape = self._model.base.config
        width = shape.get_text_config(decoder=True).hidden_size
        return max(1, WIDTHS_PER_LAYER * width // keys_values_width(shape))

    def own_length(self, context: np.ndarray, rest: np.ndarray) -> int:
        if self._is_prompt_read:
            return len(rest)
        is_own = self._model.prompt_of(self._number).stands_in_sequence or not self._is_prefix_first
        return len(context) + (self._model.num_virtual(self._number) if is_own else 0) + len(rest)

    @property
    def _is_prefix_first(self) -> bool:
        """Whether keys and values of the prompt stand before all that rows have of their own."""
        return self._model.placement == "prefix"

    @property
    def _contribution(self) -> Contribution:
        """The prompt's, computed in the first pass; its keys and values are the lead's first, or follow contexts."""
        if self._found is None:
            self._found = self._model.contributions()[self._number]
            prefix = keys_values_of(self._found)
            if prefix is not None and self._is_prefix_first:
                self._pools.lead = prefix.to(self._dtype)
        return self._found

    @property
    def _dtype(self) -> torch.dtype:
        return cast(nn.Embedding, self._model.base.get_input_embeddings()).weight.dtype

    def start(self, batch: Batch) -> None:
        outside, found = collect_outside(batch, [keys_values_of(self._contribution)])
        parts = [part.to(self._dtype) for part in found]
        builder = LayoutBuilder([self._contribution.num_vectors])
        source = np.concatenate([builder.virtual(0), builder.take(batch.rests[0])])
        self._is_prompt_read = True
        if len(source):
            builder.add(source, outside.of(0, 0), parent=None)
            builder.predict(np.array([len(source) - 1]), np.zeros(1), 0)
            laid = builder.finish()
            recorded = RecordedSegments(laid.segments, parts, self._model.device)
            self._run(laid, recorded)
            parts.append(recorded.cut()[0])
        self._pools.lead = join_parts(parts)

    def run(self, tokens: list[int], new: Batch, *, is_any_new: bool, is_new: bool) -> torch.Tensor:
        reads_new = is_new or not tokens
        builder = LayoutBuilder(self._count_vectors(new if reads_new else None))
        pools = self._pools.in_order
        for pool in pools:
            pool.make_room()
        for token, length in zip(tokens, self._pools.lengths, strict=True):
            run = builder.add(builder.take(np.array([token])), Before((), length), parent=None)
            builder.predict(np.array([run[0]]), np.zeros(1), 0)
        self._entering = None
        if reads_new:
            self._entering = self._lay_out_new(builder, new)
        laid = builder.finish()
        recorded = self._entering.recorded if self._entering else None
        logits = self._run(laid, DecodePass(pools, recorded, self._model.device))
        for pool in pools:
            pool.advance()
        return logits

    def settle(self, leaving: list[int], entering: list[int], needs: list[int]) -> list[int]:
        count = len(self._pools.lengths)
        new: dict[int, KeysValues] = {}
        if entering:
            assert self._entering is not None
            cut = self._entering.recorded.cut()
            for row in entering:
                new[count + row] = join_all([*self._entering.before[row], cut[row]])
        self._entering = None
        return self._pools.settle(leaving, new, dict(zip(new, needs, strict=True)))

    def _count_vectors(self, new: Batch | None) -> list[int]:
        """Of the virtual tokens that rows of `new` may read, so many belong to each number of `_number_of`."""
        return [self._contribution.num_vectors]

    def _number_of(self, row: int) -> int:
        """Which of those a row of a new batch reads."""
        return 0

    def _prefixes(self) -> list[KeysValues | None]:
        """What rows read before or after their contexts, of each number in their batch, unless it is in the lead."""
        is_in_lead = self._is_prompt_read or self._is_prefix_first
        return [None if is_in_lead else keys_values_of(self._contribution)]

    def _lay_out_new(self, builder: LayoutBuilder, new: Batch) -> Entering:
        """Segments of rows that enter, numbered from the first of them."""
        lead = self._pools.lead
        parts = [lead] if lead is not None else []
        outside, found = collect_outside(new, self._prefixes())
        first_part = len(parts)
        parts += [] if self._is_prompt_read else [part.to(self._dtype) for part in found]
        before: list[list[KeysValues]] = []
        num_decoded = len(self._pools.lengths)
        for row, rest in enumerate(new.rests):
            source = builder.take(rest)
            own = Before()
            if not self._is_prompt_read:
                source = np.concatenate([builder.virtual(self._number_of(row)), source])
                own = outside.of(row, new.readers[row][1])
            numbers = (*range(first_part), *(first_part + number for number in own.numbers))
            run = builder.add(source, Before(numbers, self._pools.num_lead + own.length), parent=None)
            builder.predict(np.array([sum(run) - 1]), np.zeros(1), 0)
            before.append([parts[number] for number in numbers[first_part:]])
        segments = [
            Segment(s.start - num_decoded, s.length, s.contexts, (), s.offset) for s in builder.segments[num_decoded:]
        ]
        return Entering(before, RecordedSegments(segments, parts, self._model.device))

    def _run(self, laid: Layout, attention: SegmentAttention) -> torch.Tensor:
        assert self._model.head is not None
        index = to_index(laid, self._model.device)
        vectors = embed_laid(self._model, index, [self._contribution])
        attention = adapt(self._model, attention, [self._contribution], laid.segments)
        return self._model.head.logits(supervise_laid(index, laid.reader, vectors, attention))


def join_all(parts: list[KeysValues]) -> KeysValues:
    joined = join_parts(parts)
    assert joined is not None
    return joined
