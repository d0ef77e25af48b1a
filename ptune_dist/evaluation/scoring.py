"""Score held-out rows with prompts: losses, predicted numbers, and the losses of every label.

Rows are shared among the ranks; every rank gets all scores.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ptune_dist.common.progress_line import ProgressLine
from ptune_dist.data.batches import Unit, collate
from ptune_dist.data.candidates import Candidates
from ptune_dist.data.examples import Examples
from ptune_dist.distributed.world import gather_from_ranks
from ptune_dist.zero.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True)
class Scorer:
    """What scoring needs besides the rows; `members` are numbers. Every method is collective.

    `between_batches` is called on every rank after each batch, and may communicate or raise.
    """

    engine: Engine
    members: Sequence[int]
    micro_batch_tokens: int
    pad_id: int
    between_batches: Callable[[], None] = lambda: None

    def losses(self, examples: Examples) -> list[list[float]]:
        """For each member, each example's summed negative log-likelihood of its target."""

        def losses_of(shares: list[list[Unit]]) -> list[float]:
            batch = collate(examples, shares, self.engine.world.rank, self.pad_id)
            return self.engine.row_losses(batch).double().tolist()

        return self._of_readers(losses_of, examples)

    def values(self, examples: Examples) -> list[list[float]]:
        """For each member, the number that it predicts for each example."""

        def values_of(shares: list[list[Unit]]) -> list[float]:
            return self.engine.row_values(collate(examples, shares, self.engine.world.rank, self.pad_id))

        return self._of_readers(values_of, examples)

    def label_losses(self, candidates: Candidates, num_rows: int) -> np.ndarray:
        """The negative log-likelihood of every label: [members, rows, labels]."""
        score = self._score_trees if self.engine.model.scores_trees else self._score_one_by_one
        found = self._of_readers(lambda shares: score(candidates, shares), candidates.examples)
        losses = np.empty((len(self.members), num_rows, candidates.num_labels))
        for of_member, into in zip(found, losses, strict=True):
            for row, labels, scores in zip(candidates.rows.tolist(), candidates.labels, of_member, strict=True):
                into[row, list(labels)] = scores
        return losses

    def _score_trees(self, candidates: Candidates, shares: list[list[Unit]]) -> list[np.ndarray]:
        return self.engine.row_label_losses(candidates.collate(shares, self.engine.world.rank, self.pad_id))

    def _score_one_by_one(self, candidates: Candidates, shares: list[list[Unit]]) -> list[np.ndarray]:
        """One pass over the inputs, then one for each label. All ranks make as many passes."""
        batch = candidates.collate(shares, self.engine.world.rank, self.pad_id)
        read = self.engine.read_inputs(batch)
        chosen = [candidates.labels[example] for example, _ in shares[self.engine.world.rank]] or [()]
        found = np.zeros((len(batch.readers), candidates.num_labels))
        for label in range(candidates.num_labels):
            targets = [
                candidates.label_ids[label] if label in labels else candidates.label_ids[label][:0] for labels in chosen
            ]
            asked = dataclasses.replace(read, targets=targets)
            found[:, label] = self.engine.row_losses(asked).double().tolist()
        return [losses[list(chosen[row])] for losses, (row, _) in zip(found, batch.readers, strict=True)]

    def _of_readers(self, function: Callable[[list[list[Unit]]], list[T]], examples: Examples) -> list[list[T]]:
        """What `function` finds for the readers of a micro step, for each member and example, on every rank."""
        world = self.engine.world
        units = [(i, tuple(self.members)) for i in range(len(examples))]
        mine: list[tuple[tuple[int, int], T]] = []
        line = ProgressLine("evaluating rows", len(units), is_shown=world.is_main)
        for shares in self.engine.plan(units, examples, self.micro_batch_tokens):
            readers = [(example, member) for example, some in shares[world.rank] for member in some]
            found = function(shares)
            mine += zip(readers, found[: len(readers)], strict=True)  # a rank that idles has a reader that is no row
            line.count(sum(map(len, shares)))
            self.between_batches()
        everyone = dict(pair for pairs in gather_from_ranks(mine, world) for pair in pairs)
        return [[everyone[i, member] for i in range(len(examples))] for member in self.members]
