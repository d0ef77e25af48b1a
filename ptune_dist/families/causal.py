"""Decoder-only language models (GPT-2, Llama, Qwen, ...): [virtual tokens, input, target] is read as one text.

Shapes: S readers, B rows, T tokens, P virtual tokens, C context positions, D width, N live positions, L layers,
G key/value heads, Dh width of a head.
"""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptune_dist.data.batches import Batch, Unit, pad_rows
from ptune_dist.data.encode import Examples, TokenPair
from ptune_dist.data.framing import Framing
from ptune_dist.errors import UserError
from ptune_dist.families.family import Family
from ptune_dist.model.attention import KeysValues, Segment, use_segments, windows_of
from ptune_dist.model.attention_flex import FlexTables
from ptune_dist.model.attention_layouts import RecordedSegments, build_attention, takes_flex
from ptune_dist.model.flex_plan import plan_attention
from ptune_dist.model.given_cache import GivenCache, pad_contexts
from ptune_dist.model.layout import Layout, Outside, lay_out, plan_outside
from ptune_dist.model.packing import Packed, pack
from ptune_dist.model.prompted_model import Contexts, PromptedModel, Supervised, keys_values_of, vectors_of

# A mask of four dimensions goes through transformers untouched; this one would fit no keys, were it read.
NO_MASK_SHAPE = (1, 1, 1, 0)
# What transformers calls keys and values from before, up to 5.23 and from 5.24 on, which takes the older name too.
CACHE_ARGUMENTS = {"past_key_values", "cache"}


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


class PromptedCausal(PromptedModel):
    """All texts of a pass are one row of segments, where the base's attention allows it; else rows are padded."""

    def __init__(self, base: PreTrainedModel, *args: Any, **options: Any):
        super().__init__(base, *args, **options)
        self.uses_segments = use_segments(base)
        self._windows = windows_of(base)
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters

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

    def prepare(self, batch: Batch) -> PreparedSegments | None:
        return self._prepare_segments(batch) if self.uses_segments else None

    def _prepare_segments(self, batch: Batch) -> PreparedSegments:
        """The layout of a pass, and what attention needs of it on a GPU."""
        outside = plan_outside(batch, self.num_prefix)
        laid = lay_out(batch, self.num_vectors, outside)
        names = ("tokens", "source", "position_ids", "predicts", "targets")
        arrays = {name: getattr(laid, name) for name in names}
        shapes: dict[int | None, list[tuple[int, ...]]] = {}
        if self.device.type == "cuda" and takes_flex(head_width(self.base.config)):
            lengths = [source.length for source in outside.sources]
            for window in self._windows:
                arrays[f"tables {window}"], shapes[window] = plan_attention(laid.segments, lengths, window).pack()
        return PreparedSegments(laid, outside, pack(arrays, self.device), shapes)

    def supervise(self, batch: Batch) -> Supervised:
        return self._supervise_segments(batch) if self.uses_segments else self._supervise_padded(batch)

    def _supervise_segments(self, batch: Batch) -> Supervised:
        """All texts as one row of live positions."""
        prepared = batch.prepared or self._prepare_segments(batch)
        contributions = self.contributions()
        outside = prepared.outside.collect(batch, [keys_values_of(contribution) for contribution in contributions])
        index = prepared.packed.unpack(self.device)
        tokens = self.base.get_input_embeddings()(index["tokens"][None])[0]
        vectors = [vectors_of(contribution, tokens) for contribution in contributions]
        parts = [part.to(tokens.dtype) for part in outside]
        inputs = {
            "inputs_embeds": torch.cat([*vectors, tokens])[index["source"]][None],
            "position_ids": index["position_ids"][None],
            "attention_mask": tokens.new_zeros(NO_MASK_SHAPE),
            "segments": build_attention(prepared.layout.segments, parts, tokens.device, prepared.tables(index)),
        }
        places = index["predicts"]
        return Supervised(torch.zeros_like(places), places, index["targets"], prepared.layout.reader, inputs)

    def _supervise_padded(self, batch: Batch) -> Supervised:
        """A padded row [virtual tokens, rest, target] for each reader, after its context or its member's prefix."""
        contributions = self.contributions()
        texts = [np.concatenate([batch.rests[row], batch.targets[row]])[:-1] for row, _ in batch.readers]
        members = [member for _, member in batch.readers]
        vectors, mask = self.embed(texts, members, contributions)
        starts = [contributions[member].num_vectors + len(batch.rests[row]) - 1 for row, member in batch.readers]
        inputs = {"inputs_embeds": vectors, "attention_mask": mask}
        before: list[KeysValues] = []
        if batch.held:
            before = [batch.held[row][0] for row, _ in batch.readers]
        elif any(contribution.keys is not None for contribution in contributions):
            before = self._prefixes_of(members, contributions, vectors.dtype)
        if before:
            inputs |= self._after(before, mask)
        return self.supervise_rows(batch, starts, **inputs)

    def _prefixes_of(self, members: list[int], contributions: list, dtype: torch.dtype) -> list[KeysValues]:
        """Each reader's prefix; that of a member without keys/values is empty."""
        found = [keys_values_of(contribution) for contribution in contributions]
        some = next(prefix for prefix in found if prefix is not None)
        empty = KeysValues(some.keys[:, :0], some.values[:, :0])
        return [(found[member] or empty).to(dtype) for member in members]

    def _after(self, before: list[KeysValues], mask: torch.Tensor) -> dict[str, Any]:
        """Inputs of padded rows that stand after keys/values of their own."""
        longest = max(part.length for part in before)
        lengths = self.to_tensor(np.array([part.length for part in before]))
        present = torch.arange(longest, device=mask.device) >= longest - lengths[:, None]
        inputs: dict[str, Any] = {
            "past_key_values": GivenCache(pad_contexts(before)),
            "attention_mask": torch.cat([present.to(mask), mask], dim=1),
        }
        if self._takes_positions:
            inputs["position_ids"] = lengths[:, None] + torch.arange(mask.shape[1], device=mask.device)
        return inputs

    # ------------------------------------------------------------- answers

    def count_before_answer(self, num_virtual: int, num_tokens: int) -> int:
        return num_virtual + num_tokens

    def generate(self, inputs: list[TokenPair], member: int, options: dict[str, Any]) -> torch.Tensor:
        """Rows are padded on the left, so that each row's next token stands at the end.

        They are [padding, context, virtual tokens, rest], after the prompt's keys and values if it has some.
        """
        contributions = self.contributions()
        texts = [np.array([*context, *rest], np.int64) for context, rest in inputs]
        embedded, mask = self.embed(texts, [member] * len(texts), contributions)
        num_virtual = contributions[member].num_vectors
        rows = []
        for row, length, (context, _) in zip(embedded, mask.sum(dim=1).tolist(), inputs, strict=True):
            virtual, before, after = row[:length].tensor_split([num_virtual, num_virtual + len(context)])
            rows.append(torch.cat([before, virtual, after]))
        vectors = pad_sequence(rows, batch_first=True, padding_side="left")
        prefix = keys_values_of(contributions[member])
        if prefix is None:
            return self.generate_with_base(inputs_embeds=vectors, attention_mask=mask.flip(1), **options)
        return self._generate_after_prefix(vectors, mask.flip(1), prefix.to(vectors.dtype), options)

    def _generate_after_prefix(
        self, vectors: torch.Tensor, mask: torch.Tensor, prefix: KeysValues, options: dict[str, Any]
    ) -> torch.Tensor:
        """Tokens after vectors [B, T, D], before which every row reads a prefix that takes P positions, as in PEFT.

        transformers wants the vectors and the mask of the whole text: it leaves out the first vectors, as many as there
        are positions in the cache.
        """
        num_rows = len(vectors)
        cache = DynamicCache(config=self.base.config.get_text_config(decoder=True))
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            rows = [part.transpose(0, 1).expand(num_rows, -1, -1, -1) for part in (keys, values)]
            cache.update(rows[0], rows[1], layer)
        unread = vectors.new_zeros(num_rows, prefix.length, vectors.shape[2])
        return self.generate_with_base(
            inputs_embeds=torch.cat([unread, vectors], dim=1),
            attention_mask=torch.cat([mask.new_ones(num_rows, prefix.length), mask], dim=1),
            past_key_values=cache,
            **options,
        )

    # ------------------------------------------------------------- contexts

    @torch.no_grad()
    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        if self.uses_segments:
            return self._record_segments(work)
        padded, present = pad_rows(work.tokens, work.pad_id)
        cache = GivenCache([], record=True)
        self._inner(input_ids=self.to_tensor(padded), attention_mask=self.to_tensor(present), past_key_values=cache)
        return [
            tuple(
                torch.stack([part[row, :, : len(tokens)].transpose(0, 1) for part in parts])
                for parts in zip(*(cache.recorded or ()), strict=True)
            )
            for row, tokens in enumerate(work.tokens)
        ]

    def _record_segments(self, work: Contexts) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
        self._inner(
            inputs_embeds=vectors[None],
            position_ids=self.to_tensor(places)[None],
            attention_mask=vectors.new_zeros(NO_MASK_SHAPE),
            segments=recorded,
            use_cache=False,
        )
        return recorded.cut()

    @property
    def _inner(self) -> nn.Module:
        """The base without its head."""
        return getattr(self.base, self.base.base_model_prefix)


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
        inner = cast(Any, getattr(model, model.base_model_prefix, model))  # the model without its head
        has_cache = CACHE_ARGUMENTS & set(inspect.signature(inner.forward).parameters)
        if placement != "prefix" and not has_cache:
            kind = model.config.model_type
            raise UserError(f"prompt.placement: {kind} models keep no keys and values: use prefix")

    def context_bytes_per_token(self, shape: PretrainedConfig, dtype: torch.dtype) -> int:
        """Keys and values of every layer."""
        text = shape.get_text_config(decoder=True)
        num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return 2 * text.num_hidden_layers * num_heads * head_width(shape) * dtype.itemsize


def head_width(shape: PretrainedConfig) -> int:
    """Of attention."""
    text = shape.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
