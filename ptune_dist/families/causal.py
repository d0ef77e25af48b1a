"""Decoder-only language models (GPT-2, Llama, Qwen, ...): [virtual tokens, input, target] is read as one text.

Shapes: S readers, B rows, T tokens, P virtual tokens, C context positions, D width, N live positions, L layers,
G key/value heads, Dh width of a head.
"""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptune_dist.base.layers import head_width, keys_values_width, layers_differ
from ptune_dist.data.batches import Batch, Unit
from ptune_dist.data.examples import Examples
from ptune_dist.data.framing import Framing
from ptune_dist.errors import UserError
from ptune_dist.families.bank_decoder import BankDecoder
from ptune_dist.families.below_contexts import below_contexts, own_texts, with_contexts
from ptune_dist.families.causal_padded import PaddedCausal, keeps_keys
from ptune_dist.families.family import Family
from ptune_dist.families.generation import generates_from_vectors
from ptune_dist.families.late_decoder import LateDecoder, RereadingDecoder
from ptune_dist.families.segment_decoder import SegmentDecoder
from ptune_dist.families.segment_inputs import Late, adapt, arrays_of, embed_laid, no_mask, supervise_laid, to_index
from ptune_dist.model.adapters import prepare_attentions
from ptune_dist.model.attention import Segment, use_segments, windows_of
from ptune_dist.model.attention_flex import FlexTables
from ptune_dist.model.attention_layouts import RecordedSegments, SegmentAttention, build_attention, takes_flex
from ptune_dist.model.attention_trees import build_tree_attention
from ptune_dist.model.decode import Decoder
from ptune_dist.model.entry import Lower
from ptune_dist.model.flex_plan import plan_attention
from ptune_dist.model.given_cache import keeps_more
from ptune_dist.model.layout import Layout, LayoutBuilder, Outside, lay_out, lay_out_labels, plan_outside
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


class PromptedCausal(PaddedCausal):
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

    def _label_losses(self, batch: Batch) -> list[np.ndarray]:
        row_trees = batch.trees
        assert row_trees is not None and self.head is not None
        start = self.start_of(batch)
        inputs, labels = self._labels_below(batch, start) if start else ([], [])
        contributions = self.contributions_for(batch, start, inputs)
        num_vectors = self.counts_for(batch, self.num_vectors, start)
        outside = plan_outside(batch, self.counts_for(batch, self.num_prefix, start))
        batch = self.number_readers(batch)
        laid = lay_out_labels(batch, num_vectors, outside)
        index = to_index(laid.layout, self.device)
        vectors = embed_laid(self, index, contributions, torch.cat([*inputs, *labels]) if start else None)
        found = outside.collect(batch, [keys_values_of(contribution) for contribution in contributions])
        parts = [part.to(vectors.dtype) for part in found]
        attention = build_tree_attention(laid.layout.segments, laid.trees, parts, vectors.device)
        attention = adapt(self, attention, contributions, laid.layout.segments, laid.trees)
        order = np.argsort(laid.places, kind="stable")
        losses = np.empty(len(order))
        losses[order] = self.head.token_losses(
            supervise_laid(index, laid.layout.reader, vectors, attention, Late(self, start) if start else None),
            laid.places[order],
            laid.targets[order],
            self.objective.validation_losses,
        ).tolist()
        trees = [row_trees[row] for row, _ in batch.readers]
        ends = np.cumsum([len(tree.targets) for tree in trees])
        return [tree.sum_paths(part) for tree, part in zip(trees, np.split(losses, ends[:-1]), strict=True)]

    def open_decoder(self, number: int) -> Decoder | None:
        if not self.writes_text:
            return None
        can_keep = self.uses_segments and not layers_differ(self.base.config)
        if self.start_layers[number]:
            return LateDecoder(self, number) if can_keep and not self.has_contexts else RereadingDecoder(self, number)
        if self.num_prefix[number] and keeps_more(self.base):
            return RereadingDecoder(self, number)
        return SegmentDecoder(self, number) if can_keep else None

    def open_bank_decoder(self) -> Decoder | None:
        is_plain = not (self.late_starts or self.reads_rows or any(prompt.is_gated for prompt in self.members()))
        has_tasks = any(prompt.num_tasks > 1 for prompt in self.members())
        if not (self.writes_text and self.uses_segments and is_plain) or has_tasks or layers_differ(self.base.config):
            return None
        return None if any(self.num_prefix) and keeps_more(self.base) else BankDecoder(self)

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

    def _labels_below(self, batch: Batch, start: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the layers below leave of the tokens of each reader's input, and of those of its labels."""
        found: dict[tuple[tuple[int, str], int], tuple[torch.Tensor, torch.Tensor]] = {}
        for lower in self.distinct_lowers:
            if lower.start == start:
                rows = {row for row, member in batch.readers if self.lower_of(member).key == lower.key}
                # Every rank makes this pass, also where it has no reader for it.
                for row, parts in self._rows_with_labels_below(batch, sorted(rows) or [0], lower).items():
                    found[lower.key, row] = parts
        parts = [found[self.lower_of(member).key, row] for row, member in batch.readers]
        return [of_input for of_input, _ in parts], [of_labels for _, of_labels in parts]

    def _rows_with_labels_below(
        self, batch: Batch, rows: list[int], lower: Lower
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By row, what the layers below leave of its input and of its tree of labels."""
        assert batch.trees is not None
        once = dataclasses.replace(batch, readers=[(row, 0) for row in rows])
        outside = plan_outside(once, [lower.before.length if lower.before else 0])
        laid = lay_out_labels(once, [0], outside)
        index = to_index(laid.layout, self.device)
        vectors = self.embed_tokens(index["tokens"])[index["source"]]
        before = outside.collect(once, [lower.before])
        attention = build_tree_attention(laid.layout.segments, laid.trees, before, vectors.device)
        with self.layer_parts.below(lower.start) as captured:
            self._run_segments(vectors, laid.layout.position_ids, attention)
        assert captured.hidden is not None
        hidden = torch.empty_like(captured.hidden[0])
        hidden[index["source"]] = captured.hidden[0]  # in the order of the tokens
        lengths = [len(batch.rests[row]) for row in rows] + [len(batch.trees[row].tokens) for row in rows]
        parts = hidden.split(lengths)
        return {row: (parts[place], parts[len(rows) + place]) for place, row in enumerate(rows)}

    def _run_segments(self, vectors: torch.Tensor, places: np.ndarray, attention: SegmentAttention) -> None:
        """The layers over vectors [N, D] of live positions, whose places in their texts are `places` [N]."""
        self.inner(
            inputs_embeds=vectors[None],
            position_ids=self.to_tensor(places)[None],
            attention_mask=no_mask(vectors),
            segments=attention,
            use_cache=False,
        )


def check_inputs(shape: PretrainedConfig, path: str) -> None:
    """Raise UserError where the base's layers look token ids up again, or each position reads the later ones."""
    if shape.model_type == "bert-generation" and not shape.is_decoder:
        raise UserError(
            f"model.path: {path}/config.json has is_decoder false, so a position would read its own target: set it true"
        )
    if shape.model_type == "blt":
        raise UserError(
            f"model.path: {path}: blt models group bytes by their ids and look up embeddings of such groups, which "
            "virtual tokens do not have: choose another base"
        )
    text = shape.get_text_config(decoder=True)
    if getattr(text, "hidden_size_per_layer_input", None):
        raise UserError(
            f"model.path: {path} is a {shape.model_type} model with per-layer embeddings of token ids "
            "(hidden_size_per_layer_input), which virtual tokens do not have: choose another base"
        )


class Causal(Family):
    """Reads on from input to target; may read a context before the virtual tokens."""

    name = "causal"
    auto_class = AutoModelForCausalLM
    architectures = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model_class = PromptedCausal
    placements = ("prefix", "infix", "template")
    peft_task = "CAUSAL_LM"
    shares_leads = True

    def is_own(self, shape: PretrainedConfig) -> bool:
        return not shape.is_encoder_decoder and self.knows(shape)

    def prepare_shape(self, shape: PretrainedConfig, labels: list[str] | None) -> None:
        if getattr(shape, "rescale_every", 0):  # RWKV divides weights in place in eval mode, for float16's range
            shape.rescale_every = 0

    def frame_text(self) -> Framing:
        return Framing(ends_input=False, reads_plain_text=True)

    def check_model(self, model: PreTrainedModel, path: str) -> None:
        check_inputs(model.config, path)
        inner = getattr(model, model.base_model_prefix, model)  # a user's own class may hand all inputs on to it
        takes_vectors = "inputs_embeds" in inspect.signature(inner.forward).parameters
        if not takes_vectors or not generates_from_vectors(type(model)):
            raise UserError(self.describe_no_vectors(model, path))

    def check_contexts(self, model: PreTrainedModel, placement: str) -> None:
        kind = model.config.model_type
        if placement != "prefix" and not keeps_keys(model):
            raise UserError(f"prompt.placement: {kind} models keep no keys and values: use prefix")
        if placement != "prefix" and keeps_more(model):
            raise UserError(f"prompt.placement: {kind} models keep states beside keys and values: use prefix")
        if placement != "prefix" and layers_differ(model.config):
            raise UserError(
                f"prompt.placement: keys and values of {kind} models differ in width from layer to layer, and contexts "
                "need one width: use prefix"
            )

    def context_bytes_per_token(self, shape: PretrainedConfig, dtype: torch.dtype) -> int:
        """Keys and values of every layer."""
        text = shape.get_text_config(decoder=True)
        return text.num_hidden_layers * keys_values_width(shape) * dtype.itemsize
