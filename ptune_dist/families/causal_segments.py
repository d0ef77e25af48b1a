"""The passes of a decoder-only model over segments: all texts of a pass are one row of live positions.

Shapes: S readers, B rows, T tokens, P virtual tokens, C context positions, D width, N live positions, L layers,
G key/value heads, Dh width of a head.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ptune_dist.base.layers import head_width
from ptune_dist.data.batches import Batch, Unit
from ptune_dist.data.examples import Examples
from ptune_dist.errors import UserError
from ptune_dist.families.below_contexts import below_contexts, own_texts, with_contexts
from ptune_dist.families.causal_padded import PaddedCausal
from ptune_dist.families.segment_inputs import Late, adapt, arrays_of, embed_laid, no_mask, supervise_laid
from ptune_dist.model.adapters import prepare_attentions
from ptune_dist.model.attention import Segment, use_segments, windows_of
from ptune_dist.model.attention_flex import FlexTables
from ptune_dist.model.attention_layouts import RecordedSegments, SegmentAttention, build_attention, takes_flex
from ptune_dist.model.flex_plan import plan_attention
from ptune_dist.model.layout import Layout, LayoutBuilder, Outside, lay_out, plan_outside
from ptune_dist.model.members import keys_values_of
from ptune_dist.model.packing import Packed, pack
from ptune_dist.model.passes import Contexts, Supervised


@dataclass(frozen=True)
class PreparedSegments:
    """A pass over segments as far as it is known before anything is computed.

    `packed` has the arrays of the layout and the tables of flex attention, whose `shapes` are by window.
    """

    layout: Layout
    outside: Outside
    packed: Packed
    shapes: dict[int | None, list[tuple[int, ...]]]

    def tables(self, index: dict[str, torch.Tensor]) -> dict[int | None, FlexTables]:
        """By window, from the arrays on the device."""
        return {window: FlexTables.unpack(index[f"tables {window}"], shapes) for window, shapes in self.shapes.items()}


class SegmentCausal(PaddedCausal):
    """All texts of a pass are one row of segments, where the base's attention allows it; else rows are padded."""

    def __init__(self, base: PreTrainedModel, *args: Any, **options: Any):
        super().__init__(base, *args, **options)
        self.uses_segments = use_segments(base)
        self.read_base()
        # Contexts of prompts that enter late are not read along with labels.
        self.scores_trees = self.uses_segments and not (self.late_starts and self.has_contexts)
        if any(prompt.is_gated for prompt in self.members()):
            if not self.uses_segments:
                raise UserError("prompt.method: this base's layers have an attention that takes no gated tokens")
            self.adapted_attentions = prepare_attentions(base)

    def read_base(self) -> None:
        self._windows = windows_of(self.base)

    def count_positions(self, units: list[Unit], examples: Examples, *, with_contexts: bool = True) -> int:
        if not units:
            return 0
        rows = [example for example, _ in units]
        lengths = [prompt.num_virtual_tokens for prompt in self.members()]
        readers = [(example, lengths[member]) for example, members in units for member in members]
        num_context = int(examples.num_context[rows].sum())
        contexts = num_context if with_contexts else 0
        if self.uses_segments:
            own = [row for row, _ in readers]
            live = int((examples.lengths_of(own) - examples.num_context[own]).sum()) - len(own)
            members = {member for _, some in units for member in some}
            if num_context:
                numbers = {member: self.number_of(member) for member in members}
                shared = sum(self.num_prefix[numbers[member]] for member in members)
                shared += sum(self.num_vectors[numbers[member]] for _, some in units for member in some)
            else:
                num_tasks = self.count_tasks(units, examples)
                shared = sum(lengths[member] * num_tasks.get(member, 1) for member in members)
                of_rows = [member for _, some in units for member in some if self.prompt(member).reads_rows]
                shared += sum(lengths[member] for member in of_rows)
            return max(contexts, live + shared)
        read, written = examples.widths_of([row for row, _ in readers]).T
        widest = int((read - examples.num_context[[row for row, _ in readers]] + written).max())
        return max(contexts, len(readers) * (widest + max(count for _, count in readers)))

    def prepare(self, batch: Batch) -> list[PreparedSegments] | None:
        """Of each part of the batch."""
        return [self._prepare_segments(part.batch) for part in self.parts(batch)] if self.uses_segments else None

    def _prepare_segments(self, batch: Batch) -> PreparedSegments:
        """The layout of a pass, and what attention needs of it on a GPU."""
        start = self.start_of(batch)
        num_prefix = self.counts_for(batch, self.num_prefix, start)
        num_vectors = self.counts_for(batch, self.num_vectors, start)
        batch = self.number_readers(batch)
        outside = plan_outside(batch, num_prefix)
        laid = lay_out(batch, num_vectors, outside)
        arrays = arrays_of(laid)
        shapes: dict[int | None, list[tuple[int, ...]]] = {}
        if self.device.type == "cuda" and takes_flex(head_width(self.base.config) or 0):
            lengths = [source.length for source in outside.sources]
            for window in self._windows:
                arrays[f"tables {window}"], shapes[window] = plan_attention(laid.segments, lengths, window).pack()
        return PreparedSegments(laid, outside, pack(arrays, self.device), shapes)

    def supervise(self, batch: Batch) -> Supervised:
        return self._supervise_segments(batch) if self.uses_segments else super().supervise(batch)

    def _supervise_segments(self, batch: Batch) -> Supervised:
        """All texts as one row of live positions."""
        prepared = batch.prepared or self._prepare_segments(batch)
        start = self.start_of(batch)
        below = self.below_of(batch)
        contributions = self.contributions_for(batch, start, below)
        outside = prepared.outside.collect(batch, [keys_values_of(contribution) for contribution in contributions])
        index = prepared.packed.unpack(self.device)
        vectors = embed_laid(self, index, contributions, None if below is None else torch.cat(below))
        parts = [part.to(vectors.dtype) for part in outside]
        attention = build_attention(prepared.layout.segments, parts, vectors.device, prepared.tables(index))
        attention = adapt(self, attention, contributions, prepared.layout.segments)
        late = Late(self, start) if start else None
        return supervise_laid(index, prepared.layout.reader, vectors, attention, late)

    @torch.no_grad()
    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        if not self.uses_segments:
            return super().read_contexts(work)
        if work.start_layer:
            return self._read_below(work)
        num_lead = work.lead.length if work.lead else 0
        own = [tokens[num_lead:] for tokens in work.tokens]
        ends = np.cumsum([len(tokens) for tokens in own]).tolist()
        segments = [
            Segment(end - len(tokens), len(tokens), (0,) if num_lead else (), (), num_lead)
            for tokens, end in zip(own, ends, strict=True)
        ]
        recorded = RecordedSegments(segments, [work.lead] if work.lead else [], self.device)
        places = np.concatenate([num_lead + np.arange(len(tokens)) for tokens in own])
        self._run_segments(self.embed_tokens(np.concatenate(own)), places, recorded)
        return [part.tensors for part in recorded.cut()]

    def _read_below(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        """What the layers below leave of each row after its context, and the context's keys/values in those above."""
        start = work.start_layer
        held = self.read_contexts_of(work) if self.has_contexts else []
        own = own_texts(work)
        texts = [tokens if len(tokens) else np.array([work.pad_id]) for tokens in own]
        before, outside = below_contexts(held, work)
        builder = LayoutBuilder([])
        for text, some in zip(texts, before, strict=True):
            builder.add(builder.take(text), some, parent=None)
        laid = builder.finish()
        vectors = self.embed_tokens(laid.tokens)
        with self.layer_parts.below(start) as captured:
            self._run_segments(vectors, laid.position_ids, build_attention(laid.segments, outside, vectors.device))
        assert captured.hidden is not None
        rows = captured.hidden[0].split(list(map(len, texts)))
        hidden = [row[: len(tokens)] for row, tokens in zip(rows, own, strict=True)]
        return with_contexts(hidden, held, start)

    def _run_segments(self, vectors: torch.Tensor, places: np.ndarray, attention: SegmentAttention) -> None:
        """The layers over vectors [N, D] of live positions, whose places in their texts are `places` [N]."""
        self.inner(
            inputs_embeds=vectors[None],
            position_ids=self.to_tensor(places)[None],
            attention_mask=no_mask(vectors),
            segments=attention,
            use_cache=False,
        )
