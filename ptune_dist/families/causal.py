"""Decoder-only language models (GPT-2, Llama, Qwen, ...): [virtual tokens, input, target] is read as one text.

Shapes: S readers, B rows, T tokens, P virtual tokens, C context positions, D width, N live positions, L layers,
G key/value heads, Dh width of a head.
"""

import dataclasses
import inspect

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptune_dist.base.layers import keys_values_width, layers_differ
from ptune_dist.data.batches import Batch
from ptune_dist.data.framing import Framing
from ptune_dist.errors import UserError
from ptune_dist.families.bank_decoder import BankDecoder
from ptune_dist.families.causal_padded import keeps_keys
from ptune_dist.families.causal_segments import SegmentCausal
from ptune_dist.families.family import Family
from ptune_dist.families.generation import generates_from_vectors
from ptune_dist.families.late_decoder import LateDecoder, RereadingDecoder
from ptune_dist.families.segment_decoder import SegmentDecoder
from ptune_dist.families.segment_inputs import Late, adapt, embed_laid, supervise_laid, to_index
from ptune_dist.model.attention_trees import build_tree_attention
from ptune_dist.model.decode import Decoder
from ptune_dist.model.entry import Lower
from ptune_dist.model.given_cache import keeps_more
from ptune_dist.model.layout import lay_out_labels, plan_outside
from ptune_dist.model.members import keys_values_of


class PromptedCausal(SegmentCausal):
    """Answers and scores labels over the passes of segments, or of padded rows."""

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
