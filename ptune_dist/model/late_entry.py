"""Prompts that enter the base at a later layer: what the layers below them read and leave, and passes that begin there.

Shapes: B rows, T tokens, C positions of a context, D width, H hidden size.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.layer_parts import LayerParts
from ptune_dist.base.layers import hidden_size
from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS
from ptune_dist.data.batches import Batch
from ptune_dist.model.entry import Below, Lower, Part, hold_above, split_by_start
from ptune_dist.model.layout import text_of
from ptune_dist.model.members import MemberPrompts, contributions_in_eval
from ptune_dist.model.passes import Contexts, Supervised
from ptune_dist.prompts.method import Contribution, Method


class LateEntry(MemberPrompts):
    """Prompts of which each enters the base at a layer of its own."""

    def __init__(self, base: PreTrainedModel, prompts: list[Method], placement: str):
        super().__init__(base, prompts)
        self.placement = placement
        self._layer_parts: LayerParts | None = None
        self._lowers: list[Lower] | None = None

    def run_layers(self, vectors: torch.Tensor) -> None:
        """All layers of the base's first stack over input embeddings [B, T, D]."""
        raise NotImplementedError

    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        """What later positions need of each context, without its lead; without gradient.

        Keys and values [L, C, G, Dh], or the output of a seq2seq base's encoder [C, D].
        """
        raise NotImplementedError

    def read_start(self, work: Contexts) -> tuple[torch.Tensor, ...]:
        """What a prompt starts from that starts from the only text of `work`: see `Method.begin_from`."""
        return self.read_contexts(work)[0]

    @property
    def reads_rows(self) -> bool:
        """Whether what some prompt contributes depends on the row."""
        return any(prompt.reads_rows for prompt in self.members())

    def vectors_for(
        self, numbers: list[int], below: list[torch.Tensor] | None, num_input: list[int]
    ) -> dict[int, Contribution]:
        """What readers get whose prompts depend on their rows, by reader.

        numbers: of the readers' contributions. below: what the layers below left of their texts, [T, H] each, of which
        so many tokens are input.
        """
        found: dict[int, Contribution] = {}
        for number in dict.fromkeys(numbers):
            prompt = self.prompt_of(number)
            if prompt.reads_rows and below is not None:
                own = [reader for reader, other in enumerate(numbers) if other == number]
                inputs = [below[reader][: num_input[reader]] for reader in own]
                found |= dict(zip(own, prompt.of_rows(inputs), strict=True))
        return found

    @property
    def late_starts(self) -> list[int]:
        """The layers, but for the first, at which members' prompts enter."""
        return sorted(set(self.start_layers) - {0})

    def read_prompts(self) -> None:
        """What is known of the prompts' fixed numbers is forgotten: they have changed."""
        self._lowers = None

    @property
    def lowers(self) -> list[Lower]:
        """Of each contribution, how the layers below it read rows."""
        if self._lowers is None:
            dtype = self.no_hidden(0).dtype
            contributions = contributions_in_eval(list(self.members()))
            self._lowers = [Lower.of(contribution, dtype) for contribution in contributions]
        return self._lowers

    @property
    def distinct_lowers(self) -> list[Lower]:
        """Those of the members whose prompts enter late, each once, in the same order on every rank."""
        if not self.late_starts:
            return []
        late = {lower.key: lower for lower, start in zip(self.lowers, self.start_layers, strict=True) if start}
        return [late[key] for key in sorted(late)]

    def below_of(self, batch: Batch, numbers: list[int] | None = None) -> list[torch.Tensor] | None:
        """What the layers below have left of each reader's text, [T - C, H] each; None where there are none.

        `numbers`: of the readers' contributions, where these are known already.
        """
        numbers = numbers or [self.number_of(member) for _, member in batch.readers]
        if not self.start_layers[numbers[0]]:
            return None
        assert batch.below is not None, "the layers below have read the rows"
        pairs = zip(batch.readers, numbers, strict=True)
        return [batch.below[self.lowers[number].key][row].hidden for (row, _), number in pairs]

    def start_of(self, batch: Batch) -> int:
        """The layer at which the prompts of a batch's readers enter; it is one for all in a part of a batch."""
        return self.start_layers[self.number_of(batch.readers[0][1])]

    def lower_of(self, member: int) -> Lower:
        return self.lowers[self.number_of(member)]

    def parts(self, batch: Batch) -> list[Part]:
        """The batch by the layers at which prompts enter."""
        starts = [self.start_layers[self.number_of(member)] for member in range(len(self.prompts))]
        return split_by_start(batch, starts, self._idle_below, with_contexts=self.has_contexts)

    def _idle_below(self, member: int) -> dict[Any, list[Below]]:
        return {self.lower_of(member).key: [Below(self.no_hidden(2))]}

    def read_below(self, batch: Batch) -> Batch:
        """A batch whose readers are of one member, with what the layers below its prompt leave of the rows now."""
        lower = self.lower_of(batch.readers[0][1])
        if not lower.start:
            return batch
        texts, lengths = zip(*[self.row_below(batch, row) for row in range(len(batch.rests))], strict=True)
        work = Contexts(list(texts), batch.pad_id, lower.before, start_layer=lower.start, lengths=list(lengths))
        batch = replace(batch, below={lower.key: [Below.of(tensors) for tensors in self.read_contexts(work)]})
        return hold_above(batch, lower.start) if self.has_contexts else batch

    def row_below(self, batch: Batch, row: int) -> tuple[np.ndarray, int]:
        """The tokens that the layers below a prompt read of a row, and how many of them are its context."""
        context = batch.contexts[row]
        return np.concatenate([context, text_of(batch, row)]), len(context)

    @property
    def has_contexts(self) -> bool:
        """Whether virtual tokens stand after contexts."""
        return self.placement in PLACEMENTS_WITH_CONTEXTS

    def no_hidden(self, count: int) -> torch.Tensor:
        """Hidden states [count, H] that stand for nothing."""
        dtype = cast(nn.Embedding, self.base.get_input_embeddings()).weight.dtype
        return torch.zeros(count, hidden_size(self.base), dtype=dtype, device=self.device)

    def number_readers(self, batch: Batch) -> Batch:
        """As `by_contribution`, where a reader whose vectors depend on its row has a number of its own, after all."""
        batch = self.by_contribution(batch)
        if not self.reads_rows:
            return batch
        first = len(self.num_vectors)
        readers = [
            (row, first + place if self.prompt_of(number).reads_rows else number)
            for place, (row, number) in enumerate(batch.readers)
        ]
        return replace(batch, readers=readers)

    def counts_for(self, batch: Batch, counts: list[int], start: int) -> list[int]:
        """Counts of contributions that enter at layer `start`, by the numbers of `number_readers`."""
        own = self.only_at(counts, start)
        if not self.reads_rows:
            return own
        is_own = [self.prompt(member).reads_rows for _, member in batch.readers]
        numbers = [self.number_of(member) for _, member in batch.readers]
        return own + [own[number] if reads else 0 for number, reads in zip(numbers, is_own, strict=True)]

    def contributions_for(self, batch: Batch, start: int, below: list[torch.Tensor] | None) -> list[Contribution]:
        """What the members add to a pass from layer `start` on, by the numbers of `number_readers`."""
        found = self.contributions(start)
        if not self.reads_rows:
            return found
        num_input = [len(batch.rests[row]) for row, _ in batch.readers]
        numbers = [self.number_of(member) for _, member in batch.readers]
        own = self.vectors_for(numbers, below, num_input)
        return found + [own.get(reader, Contribution()) for reader in range(len(batch.readers))]

    def only_at(self, counts: list[int], start: int) -> list[int]:
        """Counts of the contributions that enter at layer `start`, and 0 for the others."""
        return [n if layer == start else 0 for n, layer in zip(counts, self.start_layers, strict=True)]

    @property
    def layer_parts(self) -> LayerParts:
        """The base's layers, to run some of them. The first use makes a pass: it is collective."""
        if self._layer_parts is None:
            self._layer_parts = LayerParts(self.base)
        if not self._layer_parts.is_known:
            with torch.no_grad():
                self._layer_parts.learn(lambda: self.run_layers(self.no_vectors(1, 1)))
        return self._layer_parts

    def no_vectors(self, *shape: int) -> torch.Tensor:
        """Input embeddings [*shape, D] in place of those that no layer reads."""
        like = cast(nn.Embedding, self.base.get_input_embeddings())
        return torch.zeros(1, dtype=like.weight.dtype, device=self.device).expand(*shape, like.embedding_dim)

    def enter(self, start: int, hidden: torch.Tensor) -> Callable[[], AbstractContextManager[None]]:
        """For `Supervised.layers`: the pass begins with layer `start`, from hidden states [B, T, H]."""
        return functools.partial(self.layer_parts.above, start, hidden)

    def enter_rows(self, asked: Supervised, start: int) -> Supervised:
        """A pass over padded rows with its vectors as the input of layer `start`."""
        hidden = asked.inputs["inputs_embeds"]
        inputs = asked.inputs | {"inputs_embeds": self.no_vectors(*hidden.shape[:2])}
        return replace(asked, inputs=inputs, layers=self.enter(start, hidden))
