"""Decoder-only language models over padded rows: for bases whose attention is their own (ALiBi, soft caps, states).

Shapes: S readers, B rows, T tokens, P virtual tokens, D width, L layers, G key/value heads, Dh width of a head.
"""

import dataclasses
import inspect
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.data.batches import Batch, pad_rows
from ptune_dist.data.encode import TokenPair
from ptune_dist.errors import UserError
from ptune_dist.families.below_contexts import below_contexts, fill_empty, own_texts, with_contexts
from ptune_dist.families.generation import name_vectors
from ptune_dist.model.given_cache import GivenCache, keeps_more, pad_contexts
from ptune_dist.model.keys_values import KeysValues, join_parts
from ptune_dist.model.layout import text_of
from ptune_dist.model.members import keys_values_of
from ptune_dist.model.passes import Contexts, Supervised
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.method import Contribution

# What transformers calls keys and values from before, up to 5.23 and from 5.24 on, which takes the older name too.
CACHE_ARGUMENTS = {"past_key_values", "cache"}


def keeps_keys(model: PreTrainedModel) -> bool:
    """Whether a base takes keys and values of earlier positions."""
    inner = cast(Any, getattr(model, model.base_model_prefix, model))  # the model without its head
    return bool(CACHE_ARGUMENTS & set(inspect.signature(inner.forward).parameters))


class PaddedCausal(PromptedModel):
    """Each reader's text is a row of its own, padded."""

    def __init__(self, base: PreTrainedModel, *args: Any, **options: Any):
        super().__init__(base, *args, **options)
        name_vectors(base)
        self._keeps_keys = keeps_keys(base) and not keeps_more(base)
        # Layers with states take no mask of keys; what is padded on the right does not reach what stands before it.
        self._takes_mask = not keeps_more(base)
        if not self._takes_mask and len(set(self.num_prefix)) > 1:
            kind = base.config.model_type
            raise UserError(
                f"prompt.num_virtual_tokens: {kind} models keep states, so in a sweep with prefix_tuning all members "
                "need prefixes of one length"
            )
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def supervise(self, batch: Batch) -> Supervised:
        """A padded row [virtual tokens, rest, target] for each reader, after its context or its member's prefix."""
        if batch.read is not None:
            return self._supervise_after_inputs(batch, batch.read)
        start = self.start_of(batch)
        below = self.below_of(batch)
        batch = self.by_contribution(batch)
        contributions = self.contributions(start)
        texts = [text_of(batch, row) for row, _ in batch.readers]
        members = [member for _, member in batch.readers]
        num_input = [len(batch.rests[row]) for row, _ in batch.readers]
        vectors, mask = self.embed(texts, members, contributions, below=below, num_input=num_input)
        starts = [contributions[member].num_vectors + len(batch.rests[row]) - 1 for row, member in batch.readers]
        inputs = {"inputs_embeds": vectors, "attention_mask": mask}
        before = self._before(batch, contributions, vectors.dtype)
        if before:
            inputs |= self._after(before, mask, start)
        asked = self.supervise_rows(batch, starts, **inputs)
        return self.enter_rows(asked, start) if start else asked

    def _before(self, batch: Batch, contributions: list[Contribution], dtype: torch.dtype) -> list[KeysValues]:
        """What each reader reads first: its row's context and then its member's prefix, or either, or nothing."""
        parts: list[list[KeysValues]] = []
        held = batch.held or []
        some = next((found[0] for found in held if found), None)
        if some is not None:
            nothing = some.cut(slice(0))
            parts.append([held[row][0] if held[row] else nothing for row, _ in batch.readers])
        if any(contribution.keys is not None for contribution in contributions):
            parts.append(self._prefixes_of([member for _, member in batch.readers], contributions, dtype))
        joined = [join_parts(list(some)) for some in zip(*parts, strict=True)]
        return [part for part in joined if part is not None]

    @torch.no_grad()
    def read_inputs(self, batch: Batch) -> Batch:
        """Each reader's keys/values of all but the last position of its input, and that position's vector.

        A base without keys and values that can be given back reads the whole input again with every target.
        """
        if not self._keeps_keys or self.late_starts:
            return batch
        contributions = self.contributions()
        asked = self.by_contribution(batch)
        texts = [asked.rests[row] for row, _ in asked.readers]
        vectors, mask = self.embed(texts, [member for _, member in asked.readers], contributions)
        before = self._before(asked, contributions, vectors.dtype)
        inputs = {"attention_mask": mask} | (self._after(before, mask) if before else {})
        cache = GivenCache(pad_contexts(before) if before else [], record=True)
        self.inner(inputs_embeds=vectors, **inputs | {"past_key_values": cache})
        if len(cache.recorded) < len(layers_of(self.base)):  # some layers keep something else
            return batch
        read = []
        for reader, length in enumerate(mask.sum(dim=1).tolist()):
            keys_values = join_parts([*before[reader : reader + 1], cache.cut(reader, length - 1)])
            assert keys_values is not None
            read.append((keys_values, vectors[reader, length - 1]))
        return dataclasses.replace(batch, read=read)

    def _supervise_after_inputs(self, batch: Batch, read: list[tuple[KeysValues, torch.Tensor]]) -> Supervised:
        """A padded row [last position of the input, target] for each reader, after the rest of its input."""
        targets = [batch.targets[row][:-1] for row, _ in batch.readers]
        tokens = self.embed_tokens(np.concatenate(targets)).split([len(target) for target in targets])
        rows = [torch.cat([last[None], own]) for (_, last), own in zip(read, tokens, strict=True)]
        mask = self.to_tensor(pad_rows([np.ones(len(row)) for row in rows], 0)[0])
        inputs = {"inputs_embeds": pad_sequence(rows, batch_first=True), "attention_mask": mask}
        inputs |= self._after([keys_values for keys_values, _ in read], mask)
        return self.supervise_rows(batch, [0] * len(rows), **inputs)

    def _prefixes_of(self, members: list[int], contributions: list, dtype: torch.dtype) -> list[KeysValues]:
        """Each reader's prefix; that of a member without keys/values is empty."""
        found = [keys_values_of(contribution) for contribution in contributions]
        some = next(prefix for prefix in found if prefix is not None)
        empty = some.cut(slice(0))
        return [(found[member] or empty).to(dtype) for member in members]

    def _after(self, before: list[KeysValues], mask: torch.Tensor, start: int = 0) -> dict[str, Any]:
        """Inputs of padded rows that stand after keys/values of their own in the layers from `start` on."""
        longest = max(part.length for part in before)
        lengths = self.to_tensor(np.array([part.length for part in before]))
        present = torch.arange(longest, device=mask.device) >= longest - lengths[:, None]
        inputs: dict[str, Any] = {"past_key_values": GivenCache(pad_contexts(before), first_layer=start)}
        inputs["attention_mask"] = torch.cat([present.to(mask), mask], dim=1) if self._takes_mask else None
        if self._takes_positions:
            inputs["position_ids"] = lengths[:, None] + torch.arange(mask.shape[1], device=mask.device)
        return inputs

    @torch.no_grad()
    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        if work.start_layer:
            return self._read_padded_below(work)
        padded, present = pad_rows(work.tokens, work.pad_id)
        cache = GivenCache([], record=True)
        inputs = {"input_ids": self.to_tensor(padded), "attention_mask": self.to_tensor(present)}
        self.inner(**inputs, past_key_values=cache)
        return [cache.cut(row, len(tokens)).tensors for row, tokens in enumerate(work.tokens)]

    def _read_padded_below(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        """What the layers below leave of each row after its context, and the context's keys/values in those above."""
        held = self.read_contexts_of(work) if self.has_contexts else []
        own = own_texts(work)
        padded, present = pad_rows([tokens if len(tokens) else np.array([work.pad_id]) for tokens in own], work.pad_id)
        inputs = {"input_ids": self.to_tensor(padded), "attention_mask": self.to_tensor(present)}
        before, outside = below_contexts(held, work)
        joined = [join_parts([outside[number] for number in some.numbers]) for some in before]
        if outside:
            inputs |= self._after(fill_empty(joined), inputs["attention_mask"])
        with self.layer_parts.below(work.start_layer) as captured:
            self.inner(**inputs, use_cache=False)
        assert captured.hidden is not None
        hidden = [row[: len(tokens)] for row, tokens in zip(captured.hidden, own, strict=True)]
        return with_contexts(hidden, held, work.start_layer)

    def read_contexts_of(self, work: Contexts) -> list[KeysValues]:
        """The keys and values [L, C, G, Dh] of rows' contexts; every rank makes this pass, also where none has one."""
        nothing = np.array([work.pad_id])
        texts = [tokens[:count] if count else nothing for tokens, count in zip(work.tokens, work.lengths, strict=True)]
        found = zip(self.read_contexts(Contexts(texts, work.pad_id)), work.lengths, strict=True)
        return [KeysValues.of(some).cut(slice(count)) for some, count in found]

    def run_layers(self, vectors: torch.Tensor) -> None:
        self.inner(inputs_embeds=vectors, use_cache=False)

    def plain_outputs(self, batch: Batch, virtual: np.ndarray) -> torch.Tensor:
        losses = []
        for context, rest, target in zip(batch.contexts, batch.rests, batch.targets, strict=True):
            ids = self.to_tensor(np.concatenate([context, virtual, rest, target]))[None]
            logits = self.base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            wanted = ids[0, -len(target) :]
            losses.append(self.objective.validation_losses(logits[-len(target) - 1 : -1], wanted))
        return torch.cat(losses)

    @property
    def inner(self) -> nn.Module:
        """The base without its head."""
        found = getattr(self.base, self.base.base_model_prefix, None)
        return found if found is not None else self.base.model  # Llama 4 has the prefix of its whole model

    # ------------------------------------------------------------- answers

    def count_before_answer(self, num_virtual: int, num_tokens: int) -> int:
        return num_virtual + num_tokens

    def generate(self, inputs: list[TokenPair], number: int, options: dict[str, Any]) -> torch.Tensor:
        """Rows are padded on the left, so that each row's next token stands at the end.

        They are [padding, context, virtual tokens, rest], after the prompt's keys and values if it has some. Keys and
        values that follow a context are not part of a text, so what precedes the last token is read beforehand.
        """
        contributions = self.contributions()
        prefix = keys_values_of(contributions[number])
        if prefix is not None and self.placement != "prefix":
            return self._generate_after_inputs(inputs, number, options)
        texts = [np.array([*context, *rest], np.int64) for context, rest in inputs]
        embedded, mask = self.embed(texts, [number] * len(texts), contributions)
        num_virtual = contributions[number].num_vectors
        rows = []
        for row, length, (context, _) in zip(embedded, mask.sum(dim=1).tolist(), inputs, strict=True):
            virtual, before, after = row[:length].tensor_split([num_virtual, num_virtual + len(context)])
            rows.append(torch.cat([before, virtual, after]))
        vectors = pad_sequence(rows, batch_first=True, padding_side="left")
        if prefix is None:
            return self.generate_with_base(inputs_embeds=vectors, attention_mask=mask.flip(1), **options)
        before = [prefix.to(vectors.dtype)] * len(vectors)
        return self._generate_after(before, vectors, mask.flip(1), options)

    def _generate_after_inputs(self, inputs: list[TokenPair], number: int, options: dict[str, Any]) -> torch.Tensor:
        """Tokens after [context, keys and values of the prompt, rest]; rests have one token at least.

        Always one pass for contexts and one for the rests, even where there are none: under ZeRO-3 all ranks make the
        same passes.
        """
        pad_id = options["generation_config"].pad_token_id
        contexts = [np.array(context, np.int64) for context, _ in inputs]
        read = self.read_contexts(Contexts([c if len(c) else np.array([pad_id]) for c in contexts], pad_id))
        lengths = map(len, contexts)
        held = [KeysValues.of(some).cut(slice(length)) for some, length in zip(read, lengths, strict=True)]
        batch = Batch(
            contexts=contexts,
            rests=[np.array(rest, np.int64) for _, rest in inputs],
            targets=[np.zeros(0, np.int64)] * len(inputs),
            readers=[(row, self.member_of(number)) for row in range(len(inputs))],
            pad_id=pad_id,
            held=[(part,) for part in held],
            tasks=[0] * len(inputs),  # keys and values are of no task
        )
        read_inputs = PaddedCausal.read_inputs(self, batch).read
        assert read_inputs is not None, "bases that keep something else have no placements with contexts"
        vectors = torch.stack([last for _, last in read_inputs])[:, None]
        ones = torch.ones(vectors.shape[:2], dtype=torch.long, device=vectors.device)
        return self._generate_after([part for part, _ in read_inputs], vectors, ones, options)

    def _generate_after(
        self, before: list[KeysValues], vectors: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """Tokens after vectors [B, T, D] of this mask, before which each row reads keys and values of C positions.

        transformers wants the vectors and the mask of the whole text: it leaves out the first vectors, as many as there
        are positions in the cache.
        """
        longest = max(part.length for part in before)
        lengths = self.to_tensor(np.array([part.length for part in before]))
        present = torch.arange(longest, device=mask.device) >= longest - lengths[:, None]
        cache = DynamicCache(config=self.base.config.get_text_config(decoder=True))
        for layer, (keys, values) in enumerate(pad_contexts(before)):
            cache.update(keys, values, layer)
        unread = vectors.new_zeros(len(vectors), longest, vectors.shape[2])
        return self.generate_with_base(
            inputs_embeds=torch.cat([unread, vectors], dim=1),
            attention_mask=torch.cat([present.to(mask), mask], dim=1),
            past_key_values=cache,
            **options,
        )
