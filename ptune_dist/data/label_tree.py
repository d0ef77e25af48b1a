"""Labels as trees of tokens, for accuracy by likelihood: an input is read once, and labels that begin alike share it.

Legend: R tokens that are read, E tokens that are predicted, J labels.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TILE_TOKENS = 256  # of a tree, whose attention is computed in one piece


@dataclass(frozen=True)
class LabelTree:
    """The token ids of some labels as one tree, which stands after an input.

    tokens [R]: those that others follow, depth first; a last token is predicted and not read. parents [R]: the one
    before each, -1 for the input's last token. places, targets [E]: each token to predict, and the token that it
    follows. paths: of each label, which of these E it consists of.
    """

    tokens: np.ndarray
    parents: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    paths: list[np.ndarray]

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """[R]: how many tokens of the tree precede each."""
        depths = np.zeros(len(self.tokens), np.int64)
        for number, parent in enumerate(self.parents.tolist()):
            depths[number] = 0 if parent < 0 else depths[parent] + 1
        return depths

    @functools.cached_property
    def runs(self) -> list[tuple[int, int, list[int]]]:
        """The tree without its forks: (first token, number of tokens, runs that precede it from the root on)."""
        num_children = np.bincount(self.parents[self.parents >= 0], minlength=len(self.tokens))
        found: list[tuple[int, int, list[int]]] = []
        run_of: list[int] = []
        for number, parent in enumerate(self.parents.tolist()):
            if parent >= 0 and parent == number - 1 and num_children[parent] == 1:
                first, count, before = found[-1]
                found[-1] = (first, count + 1, before)
            else:
                before = [] if parent < 0 else [*found[run_of[parent]][2], run_of[parent]]
                found.append((number, 1, before))
            run_of.append(len(found) - 1)
        return found

    @functools.cached_property
    def tiles(self) -> list[tuple[int, int, np.ndarray]]:
        """Whole branches of the root, some together: (first, end, which tokens [T, T] each of them reads)."""
        starts = [*np.flatnonzero(self.parents < 0).tolist(), len(self.tokens)]
        ranges: list[tuple[int, int]] = []
        for first, end in zip(starts, starts[1:], strict=False):
            if ranges and end - ranges[-1][0] <= TILE_TOKENS:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((first, end))
        return [(first, end, self._reads(first, end)) for first, end in ranges]

    def _reads(self, first: int, end: int) -> np.ndarray:
        reads = np.eye(end - first, dtype=bool)
        for number, parent in enumerate((self.parents[first:end] - first).tolist()):
            if parent >= 0:
                reads[number] |= reads[parent]
        return reads

    def sum_paths(self, losses: np.ndarray) -> np.ndarray:
        """Each label's loss [J] from those of the tokens [E]."""
        return np.array([losses[path].sum() for path in self.paths])


def build_label_tree(labels: Sequence[Sequence[int]]) -> LabelTree:
    """The tree of labels, each given by its token ids."""
    nodes: list[tuple[int, int]] = []  # token and the node before it, depth first
    paths: list[list[int]] = [[] for _ in labels]
    path: list[int] = []
    for number in sorted(range(len(labels)), key=lambda number: tuple(labels[number])):
        label = labels[number]
        same = 0
        while same < min(len(path), len(label)) and nodes[path[same]][0] == label[same]:
            same += 1
        del path[same:]
        for token in label[same:]:
            nodes.append((token, path[-1] if path else -1))
            path.append(len(nodes) - 1)
        paths[number] = list(path)
    tokens, parents = np.array(nodes, np.int64).reshape(-1, 2).T
    is_read = np.zeros(len(nodes), bool)
    is_read[parents[parents >= 0]] = True
    place = np.append(np.cumsum(is_read) - 1, -1)  # of a node among those that are read; that of -1 is -1
    places = place[parents]
    return LabelTree(tokens[is_read], places[is_read], places, tokens, [np.array(path, np.int64) for path in paths])
