"""Rows of answers in progress, each read with its own prompt: many members of a sweep answer in the same passes."""

import numpy as np
import torch

from ptune_dist.data.batches import Batch
from ptune_dist.families.segment_decoder import Entering, SegmentDecoder
from ptune_dist.families.segment_inputs import embed_laid, supervise_laid, to_index
from ptune_dist.model.attention_layouts import SegmentAttention
from ptune_dist.model.keys_values import KeysValues
from ptune_dist.model.layout import Layout, LayoutBuilder
from ptune_dist.model.members import keys_values_of
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.method import Contribution


class BankDecoder(SegmentDecoder):
    """As its parent, with the prompt of each row's reader; so nothing that rows begin with is read once for all."""

    shares_beginnings = False

    def __init__(self, model: PromptedModel):
        super().__init__(model, number=0)
        self._contributions: list[Contribution] = []
        self._numbers: list[int] = []  # of the rows that enter in the current pass, those of their contributions

    def own_length(self, context: np.ndarray, rest: np.ndarray) -> int:
        """The most that a row can have, whoever reads it."""
        most = max(self._model.num_virtual(number) for number in range(len(self._model.num_vectors)))
        return len(context) + most + len(rest)

    def _all_contributions(self) -> list[Contribution]:
        """Of all members, computed in the first pass."""
        if not self._contributions:
            self._contributions = self._model.contributions()
        return self._contributions

    def _count_vectors(self, new: Batch | None) -> list[int]:
        return [contribution.num_vectors for contribution in self._all_contributions()]

    def _number_of(self, row: int) -> int:
        return self._numbers[row]

    def _prefixes(self) -> list[KeysValues | None]:
        return [keys_values_of(contribution) for contribution in self._all_contributions()]

    def _lay_out_new(self, builder: LayoutBuilder, new: Batch) -> Entering:
        self._numbers = [number for _, number in new.readers]
        return super()._lay_out_new(builder, new)

    def _run(self, laid: Layout, attention: SegmentAttention) -> torch.Tensor:
        assert self._model.head is not None
        index = to_index(laid, self._model.device)
        vectors = embed_laid(self._model, index, self._all_contributions())
        return self._model.head.logits(supervise_laid(index, laid.reader, vectors, attention))
