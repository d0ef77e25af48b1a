"""Placement and the segment pass: batch + bank + base -> negative log-likelihood per reader.

Floor 3. Each token is computed once: virtual tokens that depend on no row once for all rows, a context once for all
members and without gradient, logits at targets alone. A reader is one member reading one row.

Shapes: S readers, B rows, T tokens, P virtual tokens, C context positions, D width, N live positions, U supervised
tokens, L layers, G key/value heads, V labels.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ptune_dist.base.trained_head import trained_parameters
from ptune_dist.data.batches import Batch, Unit, pad_rows
from ptune_dist.data.encode import Examples
from ptune_dist.model.attention import KeysValues, Segment, use_segments
from ptune_dist.model.attention_layouts import RecordedSegments, build_attention
from ptune_dist.model.given_cache import GivenCache, pad_contexts
from ptune_dist.model.head import HeadAtTargets
from ptune_dist.model.layout import lay_out, shares_context

# A mask of four dimensions goes through transformers untouched; this one would fit no keys, were it read.
NO_MASK = torch.zeros(1, 1, 1, 0)


@dataclass(frozen=True)
class Contexts:
    """Contexts to compute, all of which begin with the tokens of `lead`, whose keys/values are known."""

    tokens: list[np.ndarray]
    pad_id: int
    lead: KeysValues | None = None


class PromptedModel(nn.Module):
    """A frozen base and the prompts that are trained over it, with their virtual tokens where `placement` puts them."""

    def __init__(self, base: PreTrainedModel, prompts: list[nn.Module], family: str, placement: str = "prefix"):
        super().__init__()
        self.base, self.prompts, self.family, self.placement = base, nn.ModuleList(prompts), family, placement
        self.uses_segments = family == "causal" and use_segments(base)
        self._head = HeadAtTargets(base) if family != "encoder" else None
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def train(self, mode: bool = True) -> "PromptedModel":
        """The prompts follow `mode`; the base never leaves eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def trainable(self, member: int = 0) -> dict[str, nn.Parameter]:
        """What is trained and stored of a member, by name: its prompt's parameters and those of an encoder's head."""
        head = {f"head.{name}": p for name, p in trained_parameters(self.base).items()}
        return dict(self.prompts[member].named_parameters()) | head

    def forward(self, work: Batch | Contexts) -> Any:
        """Of a batch: the summed negative log-likelihood of each reader's target, [S] in float32.

        Of contexts: what later positions need of each, without its lead: keys and values [L, C, G, D], or what a
        seq2seq base's encoder leaves, [C, D]. Without gradient.
        """
        if isinstance(work, Contexts):
            return self._read_contexts(work)
        losses, reader = self._losses(work)
        return losses.new_zeros(len(work.readers)).index_add(0, self._tensor(reader), losses)

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        """Losses [U], and the number of each one's reader."""
        if self.family == "encoder":
            return self._label_losses(batch)
        if self.family == "seq2seq":
            return self._decoder_losses(batch)
        return self._segment_losses(batch) if self.uses_segments else self._padded_losses(batch)

    def count_positions(self, units: list[Unit], examples: Examples, *, with_contexts: bool = True) -> int:
        """Positions that a micro-batch of these units makes a rank hold at once, padding included."""
        rows = [example for example, _ in units]
        readers = [(example, self._num_virtual(member)) for example, members in units for member in members]
        if not units:
            return 0
        num_context = int(examples.num_context[rows].sum())
        contexts = num_context if with_contexts else 0
        if self.family == "causal" and self.uses_segments:
            num_virtual = [count for _, count in readers] if num_context else self._distinct_virtual(units)
            live = sum(int(examples.lengths[row] - examples.num_context[row]) - 1 for row, _ in readers)
            return max(contexts, live + sum(num_virtual))
        read, written = examples.widths[[row for row, _ in readers]].T
        if self.family == "causal":
            widest = int((read - examples.num_context[[row for row, _ in readers]] + written).max())
        else:
            widest = int(read.max()) + int(written.max())
        return max(contexts, len(readers) * (widest + max(count for _, count in readers)))

    def _distinct_virtual(self, units: list[Unit]) -> list[int]:
        return [self._num_virtual(member) for member in {member for _, members in units for member in members}]

    # ------------------------------------------------------------- causal bases

    def _segment_losses(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        """All texts as one row of live positions."""
        outside, numbers = collect_outside(batch)
        laid = lay_out(batch, [prompt.num_virtual_tokens for prompt in self.prompts], numbers)
        tokens = self._embed_tokens(laid.tokens)
        virtual = [prompt().to(tokens.dtype) for prompt in self.prompts]
        losses = self._head.losses(
            torch.zeros_like(places := self._tensor(laid.predicts)), places, self._tensor(laid.targets),
            most_targets=batch.most_targets,
            inputs_embeds=torch.cat([*virtual, tokens])[self._tensor(laid.source)][None],
            position_ids=self._tensor(laid.position_ids)[None], attention_mask=NO_MASK.to(tokens),
            segments=build_attention(laid.segments, outside, tokens.device),
        )  # fmt: skip
        return losses, laid.reader

    def _padded_losses(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        """A padded row [virtual tokens, rest, target] for each reader, after its row's context if there is one."""
        texts = [np.concatenate([batch.rests[row], batch.targets[row]])[:-1] for row, _ in batch.readers]
        vectors, mask = self._with_virtual(batch, texts)
        starts = [self._num_virtual(member) + len(batch.rests[row]) - 1 for row, member in batch.readers]
        inputs = {"inputs_embeds": vectors, "attention_mask": mask}
        if batch.held:
            inputs |= self._after_contexts([batch.held[row][0] for row, _ in batch.readers], mask)
        return self._head_losses(batch, starts, **inputs)

    def _after_contexts(self, held: list[KeysValues], mask: torch.Tensor) -> dict[str, Any]:
        """Inputs of padded rows that stand after contexts."""
        lengths = self._tensor(np.array([context.length for context in held]))
        before = torch.arange(int(lengths.max()), device=mask.device) >= lengths.max() - lengths[:, None]
        inputs = {
            "past_key_values": GivenCache(pad_contexts(held)),
            "attention_mask": torch.cat([before.to(mask), mask], dim=1),
        }
        if self._takes_positions:
            inputs["position_ids"] = lengths[:, None] + torch.arange(mask.shape[1], device=mask.device)
        return inputs

    # ------------------------------------------------------------- seq2seq and encoder bases

    def _decoder_losses(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        """A seq2seq base: virtual tokens before what its encoder reads, or before what its decoder does."""
        rows = [row for row, _ in batch.readers]
        start = [self.base.config.decoder_start_token_id]
        written = [np.concatenate([start, batch.targets[row][:-1]]) for row in rows]
        if self.placement == "decoder":
            hidden = [batch.held[row][0] for row in rows]
            read = self._tensor(pad_rows([np.ones(len(part)) for part in hidden], 0)[0])
            vectors, _ = self._with_virtual(batch, written, self.base.get_decoder().get_input_embeddings())
            inputs = {"encoder_outputs": (pad_sequence(hidden, batch_first=True),), "decoder_inputs_embeds": vectors}
            starts = [self._num_virtual(member) for _, member in batch.readers]
            return self._head_losses(batch, starts, attention_mask=read, **inputs)
        vectors, mask = self._with_virtual(batch, [batch.rests[row] for row in rows])
        ids = self._tensor(pad_rows(written, batch.pad_id)[0])
        return self._head_losses(
            batch, [0] * len(rows), inputs_embeds=vectors, attention_mask=mask, decoder_input_ids=ids
        )

    def _label_losses(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        labels = [batch.targets[row] for row, _ in batch.readers]
        supervised = np.array([number for number, label in enumerate(labels) if len(label)], np.int64)
        logits = self.label_logits(*self._with_virtual(batch, [batch.rests[row] for row, _ in batch.readers]))
        wanted = self._tensor(np.concatenate(labels))
        chosen = logits[self._tensor(supervised)].float()
        return nn.functional.cross_entropy(chosen, wanted, reduction="none"), supervised

    def label_logits(self, vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """An encoder's logits [S, V]."""
        return self.base(inputs_embeds=vectors, attention_mask=mask).logits

    # ------------------------------------------------------------- contexts

    @torch.no_grad()
    def _read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        if self.uses_segments:
            return self._record_segments(work)
        padded, present = pad_rows(work.tokens, work.pad_id)
        ids, mask = self._tensor(padded), self._tensor(present)
        if self.family == "seq2seq":
            hidden = self.base.get_encoder()(input_ids=ids, attention_mask=mask)[0]
            return [(row[: len(tokens)].clone(),) for row, tokens in zip(hidden, work.tokens, strict=True)]
        cache = GivenCache([], record=True)
        self._inner(input_ids=ids, attention_mask=mask, past_key_values=cache)
        return [
            tuple(torch.stack([part[row, :, : len(tokens)].transpose(0, 1) for part in parts])
                  for parts in zip(*cache.recorded, strict=True))
            for row, tokens in enumerate(work.tokens)
        ]  # fmt: skip

    def _record_segments(self, work: Contexts) -> list[tuple[torch.Tensor, torch.Tensor]]:
        num_lead = work.lead.length if work.lead else 0
        own = [tokens[num_lead:] for tokens in work.tokens]
        ends = np.cumsum([len(tokens) for tokens in own]).tolist()
        segments = [
            Segment(end - len(tokens), len(tokens), (0,) if num_lead else (), (), num_lead)
            for tokens, end in zip(own, ends, strict=True)
        ]
        vectors = self._embed_tokens(np.concatenate(own))
        places = np.concatenate([num_lead + np.arange(len(tokens)) for tokens in own])
        recorded = RecordedSegments(segments, [work.lead] if num_lead else [], vectors.device)
        self._inner(
            inputs_embeds=vectors[None], position_ids=self._tensor(places)[None], attention_mask=NO_MASK.to(vectors),
            segments=recorded, use_cache=False,
        )  # fmt: skip
        return recorded.cut()

    @property
    def _inner(self) -> nn.Module:
        """The base without its head."""
        return getattr(self.base, self.base.base_model_prefix)

    # ------------------------------------------------------------- parts of passes

    def _num_virtual(self, member: int) -> int:
        return self.prompts[member].num_virtual_tokens

    def _embed_tokens(self, tokens: np.ndarray, embeddings: nn.Module | None = None) -> torch.Tensor:
        """[len(tokens), D]."""
        return (embeddings or self.base.get_input_embeddings())(self._tensor(tokens)[None])[0]

    def _with_virtual(
        self, batch: Batch, texts: list[np.ndarray], embeddings: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [S, P + T, D] of every reader's virtual tokens and text, padded on the right, and their mask."""
        return self.embed(texts, [member for _, member in batch.readers], embeddings)

    def embed(
        self, texts: list[np.ndarray], members: list[int], embeddings: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[virtual tokens of a member, text] for each text: vectors [S, P + T, D] and their mask, padded right."""
        tokens = self._embed_tokens(np.concatenate(texts), embeddings)
        virtual = [prompt().to(tokens.dtype) for prompt in self.prompts]
        parts = tokens.split([len(text) for text in texts])
        rows = [torch.cat([virtual[member], part]) for member, part in zip(members, parts, strict=True)]
        mask = pad_rows([np.ones(len(row)) for row in rows], 0)[0]
        unread = sum(vector[:0].sum() for vector in virtual)  # 0: an idle rank too has something to go back through
        return pad_sequence(rows, batch_first=True) + unread, self._tensor(mask)

    def _head_losses(self, batch: Batch, starts: list[int], **inputs) -> tuple[torch.Tensor, np.ndarray]:
        """Losses of targets whose first is predicted at position `starts` of each reader's row."""
        targets = [batch.targets[row] for row, _ in batch.readers]
        reader = np.repeat(np.arange(len(targets)), [len(target) for target in targets])
        places = np.concatenate([start + np.arange(len(target)) for start, target in zip(starts, targets, strict=True)])
        losses = self._head.losses(
            self._tensor(reader), self._tensor(places), self._tensor(np.concatenate(targets)),
            most_targets=batch.most_targets, **inputs,
        )  # fmt: skip
        return losses, reader

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        device = next(self.prompts.parameters()).device
        return torch.from_numpy(np.asarray(array, np.int64)).to(device, non_blocking=True)


def collect_outside(batch: Batch) -> tuple[list[KeysValues], list[tuple[int, ...]]]:
    """Keys/values from outside, each once, and for each row the numbers of those that it reads."""
    outside: list[KeysValues] = []
    numbers: list[tuple[int, ...]] = []
    held = batch.held or [()] * len(batch.contexts)
    if shares_context(batch):  # the same tokens, perhaps held twice
        held = [held[0]] * len(held)
    known: dict[int, int] = {}
    for parts in held:
        for part in parts:
            if id(part.keys) not in known:
                known[id(part.keys)] = len(outside)
                outside.append(part)
        numbers.append(tuple(known[id(part.keys)] for part in parts))
    return outside, numbers
