"""Inputs with the labels that each may have, for accuracy by likelihood. Legend: X examples."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ptune_dist.data.batches import Batch, Unit, collate
from ptune_dist.data.examples import Examples
from ptune_dist.data.label_tree import LabelTree, build_label_tree


class CandidateInput(NamedTuple):
    """An input of a row, token ids of which the first are context, and the numbers of the labels that it may have."""

    row: int
    ids: np.ndarray
    num_context: int
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """Inputs and the labels that each may have. A row whose labels do not fit in one pass has several inputs.

    examples [X]: the targets are the tokens of the tree that are read, and one more. rows [X]: whose input each is.
    labels [X]: the numbers of its labels, in the order of its tree's. trees [X]. label_ids: token ids of each label.
    """

    examples: Examples
    rows: np.ndarray
    labels: list[tuple[int, ...]]
    trees: list[LabelTree]
    label_ids: list[np.ndarray]

    @property
    def num_labels(self) -> int:
        return len(self.label_ids)

    def collate(self, shares: list[list[Unit]], rank: int, pad_id: int) -> Batch:
        """A rank's micro-batch, with the tree of each row; a rank without units has a tree without labels."""
        batch = collate(self.examples, shares, rank, pad_id)
        trees = [self.trees[example] for example, _ in shares[rank]] or [build_label_tree([])]
        return dataclasses.replace(batch, trees=trees)


def build_candidates(
    inputs: list[CandidateInput], label_ids: list[list[int]], examples: Examples, most_tokens: int
) -> Candidates:
    """Candidates of rows that are `examples`; `most_tokens`: of the labels that are scored in one pass."""
    trees: dict[tuple[int, ...], LabelTree] = {}
    splits: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    pieces: list[np.ndarray] = []
    counts: list[tuple[int, int, int, int]] = []
    found: list[tuple[int, ...]] = []
    for row, ids, num_context, numbers in inputs:
        if numbers not in splits:
            splits[numbers] = split_labels(numbers, label_ids, most_tokens)
        for part in splits[numbers]:
            if part not in trees:
                trees[part] = build_label_tree([label_ids[number] for number in part])
            tokens = trees[part].tokens
            pieces.append(np.concatenate([ids, tokens, [0]]).astype(np.int32))
            counts.append((row, len(pieces[-1]), len(tokens) + 1, num_context))
            found.append(part)
    rows, lengths, num_targets, contexts = np.array(counts, np.int64).T
    laid = Examples(
        np.concatenate(pieces),
        np.concatenate([[0], np.cumsum(lengths)]),
        num_targets.astype(np.int32),
        np.array(False),
        lambda index: examples.where(int(rows[index])),
        contexts.astype(np.int32),
        tasks=None if examples.tasks is None else examples.tasks[rows],
    )
    return Candidates(
        laid, rows, found, [trees[part] for part in found], [np.array(ids, np.int32) for ids in label_ids]
    )


def split_labels(numbers: tuple[int, ...], label_ids: list[list[int]], most_tokens: int) -> list[tuple[int, ...]]:
    """Labels in parts of at most `most_tokens` tokens, those that begin alike together; one label at least."""
    parts: list[list[int]] = []
    size = 0
    for number in sorted(numbers, key=lambda number: label_ids[number]):
        size += len(label_ids[number])
        if not parts or size > most_tokens:
            parts.append([])
            size = len(label_ids[number])
        parts[-1].append(number)
    return [tuple(sorted(part)) for part in parts]
