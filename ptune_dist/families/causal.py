"""Decoder-only language models (GPT-2, Llama, Qwen, ...): [virtual tokens, input, target] is read as one text.

Shapes: S readers, B rows, T tokens, P virtual tokens, C context positions, D width, N live positions, L layers,
G key/value heads, Dh width of a head.
"""

import inspect
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptune_dist.data.batches import Batch, Unit
from ptune_dist.data.encode import Examples
from ptune_dist.data.framing import Framing
from ptune_dist.errors import UserError
from ptune_dist.families.causal_padded import PaddedCausal, keeps_keys
from ptune_dist.families.family import Family
from ptune_dist.families.segment_decoder import SegmentDecoder
from ptune_dist.families.segment_inputs import NO_MASK, embed_laid, supervise_laid
from ptune_dist.model.attention import Segment, use_segments
from ptune_dist.model.attention_layouts import RecordedSegments, build_attention
from ptune_dist.model.attention_trees import build_tree_attention
from ptune_dist.model.layout import collect_outside, lay_out, lay_out_labels
from ptune_dist.model.prompted_model import Contexts, Supervised, keys_values_of


class PromptedCausal(PaddedCausal):
    """All texts of a pass are one row of segments, where the base's attention allows it; else rows are padded."""

    def __init__(self, base: PreTrainedModel, *args: Any, **options: Any):
        super().__init__(base, *args, **options)
        self.uses_segments = use_segments(base)
        self.scores_trees = self.uses_segments

    def count_positions(self, units: list[Unit], examples: Examples, *, with_contexts: bool = True) -> int:
        if not units:
            return 0
        rows = [example for example, _ in units]
        readers = [(example, self.num_virtual(member)) for example, members in units for member in members]
        num_context = int(examples.num_context[rows].sum())
        contexts = num_context if with_contexts else 0
        if self.uses_segments:
            live = sum(int(examples.lengths[row] - examples.num_context[row]) - 1 for row, _ in readers)
            if num_context:
                return max(contexts, live + sum(count for _, count in readers))
            members = {member for _, some in units for member in some}
            return live + sum(self.num_virtual(member) for member in members)
        read, written = examples.widths[[row for row, _ in readers]].T
        widest = int((read - examples.num_context[[row for row, _ in readers]] + written).max())
        return max(contexts, len(readers) * (widest + max(count for _, count in readers)))

    def supervise(self, batch: Batch) -> Supervised:
        if not self.uses_segments:
            return super().supervise(batch)
        contributions = self.contributions()
        outside = collect_outside(batch, [keys_values_of(contribution) for contribution in contributions])
        laid = lay_out(batch, [contribution.num_vectors for contribution in contributions], outside)
        vectors = embed_laid(self, laid, contributions)
        parts = [part.to(vectors.dtype) for part in outside.parts]
        return supervise_laid(self, laid, vectors, build_attention(laid.segments, parts, vectors.device))

    def label_losses(self, batch: Batch) -> list[np.ndarray]:
        assert batch.trees is not None and self.head is not None
        contributions = self.contributions()
        outside = collect_outside(batch, [keys_values_of(contribution) for contribution in contributions])
        laid = lay_out_labels(batch, [contribution.num_vectors for contribution in contributions], outside)
        vectors = embed_laid(self, laid.layout, contributions)
        parts = [part.to(vectors.dtype) for part in outside.parts]
        attention = build_tree_attention(laid.layout.segments, laid.trees, parts, vectors.device)
        order = np.argsort(laid.places, kind="stable")
        losses = np.empty(len(order))
        losses[order] = self.head.token_losses(
            supervise_laid(self, laid.layout, vectors, attention),
            laid.places[order],
            laid.targets[order],
            self.objective.validation_losses,
            most_targets=batch.most_targets,
        ).tolist()
        trees = [batch.trees[row] for row, _ in batch.readers]
        ends = np.cumsum([len(tree.targets) for tree in trees])
        return [tree.sum_paths(part) for tree, part in zip(trees, np.split(losses, ends[:-1]), strict=True)]

    def open_decoder(self, member: int) -> SegmentDecoder | None:
        return SegmentDecoder(self, member) if self.uses_segments and self.writes_text else None

    @torch.no_grad()
    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        if not self.uses_segments:
            return super().read_contexts(work)
        num_lead = work.lead.length if work.lead else 0
        own = [tokens[num_lead:] for tokens in work.tokens]
        ends = np.cumsum([len(tokens) for tokens in own]).tolist()
        segments = [
            Segment(end - len(tokens), len(tokens), (0,) if num_lead else (), (), num_lead)
            for tokens, end in zip(own, ends, strict=True)
        ]
        vectors = self.embed_tokens(np.concatenate(own))
        places = np.concatenate([num_lead + np.arange(len(tokens)) for tokens in own])
        recorded = RecordedSegments(segments, [work.lead] if work.lead else [], vectors.device)
        self.inner(
            inputs_embeds=vectors[None],
            position_ids=self.to_tensor(places)[None],
            attention_mask=NO_MASK.to(vectors),
            segments=recorded,
            use_cache=False,
        )
        return list(recorded.cut())


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

    def frame_text(self) -> Framing:
        return Framing(ends_input=False, reads_plain_text=True)

    def check_model(self, model: PreTrainedModel, path: str) -> None:
        prepare = cast(Any, model.prepare_inputs_for_generation)  # pyright takes it for a tensor
        if "inputs_embeds" not in inspect.signature(prepare).parameters:
            raise UserError(self.describe_no_vectors(model, path))

    def check_contexts(self, model: PreTrainedModel, placement: str) -> None:
        if placement != "prefix" and not keeps_keys(model):
            kind = model.config.model_type
            raise UserError(f"prompt.placement: {kind} models keep no keys and values: use prefix")

    def context_bytes_per_token(self, shape: PretrainedConfig, dtype: torch.dtype) -> int:
        """Keys and values of every layer."""
        text = shape.get_text_config(decoder=True)
        num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * num_heads * head_width * dtype.itemsize
