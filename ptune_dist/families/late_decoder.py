"""Rows of answers in progress, where the prompt enters at a later layer.

The layers below the prompt and those from there on each keep keys/values of their own: the first of the text alone, the
others of the virtual tokens too. Each pass reads the same tokens in both.

Shapes: N live positions, H hidden size, n rows in progress, m rows that enter, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ptune_dist.data.batches import Batch
from ptune_dist.families.segment_decoder import SegmentDecoder
from ptune_dist.families.segment_inputs import Late, embed_laid, no_mask, supervise_laid, to_index
from ptune_dist.model.attention_layouts import SegmentAttention
from ptune_dist.model.layout import Layout
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.method import Contribution


class LowerHalf(SegmentDecoder):
    """The layers below the prompt; `hidden` [N, H] is what the last pass left of its tokens, in their order."""

    hidden: torch.Tensor

    @property
    def _contribution(self) -> Contribution:
        """The keys and values that these layers read before every row, if any."""
        if self._found is None:
            before = self._model.lowers[self._number].before
            self._pools.lead = before
            self._found = Contribution() if before is None else Contribution(keys=before.keys, values=before.values)
        return self._found

    def start(self, batch: Batch) -> None:
        self.hidden = self._model.no_hidden(0)
        super().start(batch)

    def _run(self, laid: Layout, attention: SegmentAttention) -> torch.Tensor:
        index = to_index(laid, self._model.device)
        vectors = embed_laid(self._model, index, [])
        with self._model.layer_parts.below(self._model.start_layers[self._number]) as captured:
            cast(Any, self._model).inner(
                inputs_embeds=vectors[None],
                position_ids=index["position_ids"][None],
                attention_mask=no_mask(vectors),
                segments=attention,
                use_cache=False,
            )
        assert captured.hidden is not None
        self.hidden = captured.hidden[0]
        return self.hidden


class UpperHalf(SegmentDecoder):
    """The layers from the prompt on, which read the virtual tokens and what `lower` has left of the tokens.

    Where virtual tokens depend on rows, each row that enters has its own.
    """

    def __init__(self, model: Any, number: int, lower: LowerHalf):
        super().__init__(model, number)
        self._lower = lower
        self._lengths: list[int] = []  # of the inputs that the current pass reads

    def _count_vectors(self, new: Batch | None) -> list[int]:
        if not self._model.prompt_of(self._number).reads_rows:
            return super()._count_vectors(new)
        self._lengths = [] if new is None else [len(rest) for rest in new.rests]
        return [self._contribution.num_vectors] * len(self._lengths)

    def _number_of(self, row: int) -> int:
        return row if self._model.prompt_of(self._number).reads_rows else 0

    def _contributions(self) -> list[Contribution]:
        """By number; inputs stand after the newest tokens of rows in progress."""
        prompt = self._model.prompt_of(self._number)
        if not prompt.reads_rows:
            return [self._contribution]
        num_read = sum(self._lengths)
        inputs = self._lower.hidden[len(self._lower.hidden) - num_read :].split(self._lengths)
        return prompt.of_rows(list(inputs)) if self._lengths else []

    def _run(self, laid: Layout, attention: SegmentAttention) -> torch.Tensor:
        assert self._model.head is not None
        index = to_index(laid, self._model.device)
        vectors = embed_laid(self._model, index, self._contributions(), self._lower.hidden)
        late = Late(self._model, self._model.start_layers[self._number])
        return self._model.head.logits(supervise_laid(index, laid.reader, vectors, attention, late))


class LateDecoder:
    """`model.decode.Decoder` over segments, of rows without contexts."""

    enters_any_time = True
    needs_contexts = False
    takes_contexts = False

    def __init__(self, model: Any, number: int):
        self.shares_beginnings = not model.prompt_of(number).reads_rows  # virtual tokens stand before an input
        self._lower = LowerHalf(model, number)
        self._upper = UpperHalf(model, number, self._lower)

    @property
    def held_per_position(self) -> int:
        return self._upper.held_per_position

    def own_length(self, context: np.ndarray, rest: np.ndarray) -> int:
        return self._upper.own_length(context, rest)

    def start(self, batch: Batch) -> None:
        self._lower.start(batch)
        self._upper.start(batch)

    def run(self, tokens: list[int], new: Batch, *, is_any_new: bool, is_new: bool) -> torch.Tensor:
        self._lower.run(tokens, new, is_any_new=is_any_new, is_new=is_new)
        return self._upper.run(tokens, new, is_any_new=is_any_new, is_new=is_new)

    def settle(self, leaving: list[int], entering: list[int], needs: list[int]) -> list[int]:
        below = self._lower.settle(leaving, entering, needs)
        order = self._upper.settle(leaving, entering, needs)
        assert below == order, "both keep their rows in one order"
        return order


class Reread(NamedTuple):
    """The tokens of a row in progress."""

    context: np.ndarray
    rest: np.ndarray
    answer: np.ndarray


class RereadingDecoder:
    """`model.decode.Decoder` that keeps nothing of a row but its tokens, and reads it whole for each new one.

    For bases whose rows are padded, and for rows with contexts.
    """

    enters_any_time = True
    shares_beginnings = False
    needs_contexts = False
    takes_contexts = False
    held_per_position = 1

    def __init__(self, model: PromptedModel, number: int):
        self._model = model
        self._number = number
        self._rows: list[Reread] = []  # those in progress
        self._entering: list[Reread] = []

    def own_length(self, context: np.ndarray, rest: np.ndarray) -> int:
        return len(context) + self._model.num_virtual(self._number) + len(rest)

    def start(self, batch: Batch) -> None:
        raise NotImplementedError("every row is read whole")

    def run(self, tokens: list[int], new: Batch, *, is_any_new: bool, is_new: bool) -> torch.Tensor:
        nothing = np.zeros(0, np.int64)
        self._rows = [
            Reread(row.context, row.rest, np.append(row.answer, token))
            for row, token in zip(self._rows, tokens, strict=True)
        ]
        self._entering = []
        if is_new:
            self._entering = [Reread(*parts, nothing) for parts in zip(new.contexts, new.rests, strict=True)]
        rows = self._rows + self._entering
        if not rows:  # for a pass that only other ranks need
            rows = [Reread(nothing, np.array([new.pad_id]), nothing)]
        return self._read(rows, new.pad_id)

    def settle(self, leaving: list[int], entering: list[int], needs: list[int]) -> list[int]:
        count = len(self._rows)
        order = [row for row in range(count) if row not in leaving] + [count + row for row in entering]
        both = self._rows + self._entering
        self._rows = [both[row] for row in order]
        self._entering = []
        return order

    def _read(self, rows: list[Reread], pad_id: int) -> torch.Tensor:
        """Logits [n + m, V] after each row."""
        model = self._model
        assert model.head is not None
        contexts, rests, answers = (list(parts) for parts in zip(*rows, strict=True))
        targets = [np.append(answer, 0) for answer in answers]  # what stands after the row, which nothing reads
        member = model.member_of(self._number)
        readers = [(row, member) for row in range(len(rows))]
        batch = Batch(contexts, rests, targets, readers, pad_id, tasks=[0] * len(rows))
        asked = model.supervise(model.read_below(batch))
        lasts = np.cumsum([len(target) for target in targets]) - 1
        last = model.to_tensor(lasts)
        asked = dataclasses.replace(
            asked,
            rows=asked.rows[last],
            places=asked.places[last],
            targets=asked.targets[last],
            reader=asked.reader[lasts],
        )
        return model.head.logits(asked)
