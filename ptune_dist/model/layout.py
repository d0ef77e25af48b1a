"""Where everything stands in a pass: from a micro-batch to one row of live positions. Index arithmetic only.

A reader is one member reading one row. Where all rows have the same context (or none, as in `prefix`), the virtual
tokens cannot depend on the row: a member's stand there once, and all its readers attend to them. Elsewhere every reader
has its own, after its row's context. Legend: S readers, N live positions, U supervised tokens.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ptune_dist.data.batches import Batch, HeldPart
from ptune_dist.data.label_tree import LabelTree
from ptune_dist.model.attention import KeysValues, Segment
from ptune_dist.model.attention_trees import PlacedTree

Run = tuple[int, int]  # first live position, number of live positions


@dataclass(frozen=True)
class Layout:
    """Live positions, each taken from [virtual tokens of all members, tokens of all readers], concatenated.

    source [N]: which of those stands at each live position. position_ids [N]: its place in its own text.
    predicts [U]: the live position whose next token is supervised. targets [U]: that token. reader [U]: whose it is.
    tokens: of all readers, end to end.
    """

    segments: list[Segment]
    source: np.ndarray
    position_ids: np.ndarray
    predicts: np.ndarray
    targets: np.ndarray
    reader: np.ndarray
    tokens: np.ndarray


class Before(NamedTuple):
    """Keys/values from outside that a text reads first: their numbers, and how many positions they are together.

    num_own: how many of them, the last ones, are a member's own and do not depend on the row.
    """

    numbers: tuple[int, ...] = ()
    length: int = 0
    num_own: int = 0


class Source(NamedTuple):
    """Where keys/values of `length` positions are found: part `part` of what a row holds, or a member's prefix."""

    length: int
    row: int = 0
    part: int = 0
    member: int | None = None


@dataclass(frozen=True)
class Outside:
    """All keys/values from outside, each once, and who reads them: `rows` their contexts, `members` their prefixes."""

    sources: list[Source]
    rows: list[Before]
    members: list[Before]

    def of(self, row: int, member: int) -> Before:
        """What a reader reads: its row's context, then its member's prefix."""
        prefix = self.members[member]
        context = self.rows[row]
        return Before(context.numbers + prefix.numbers, context.length + prefix.length, len(prefix.numbers))

    def collect(self, batch: Batch, prefixes: Sequence[KeysValues | None]) -> list[KeysValues]:
        """The keys/values themselves, from what the batch holds and from the members' own."""
        found = []
        for source in self.sources:
            if source.member is not None:
                part = prefixes[source.member]
            else:
                part = batch.held[source.row][source.part] if batch.held else None
            assert part is not None and part.length == source.length, "keys/values are those that were planned"
            found.append(part)
        return found


def plan_outside(batch: Batch, num_prefix: Sequence[int]) -> Outside:
    """The contexts of a batch and the members' own keys/values, of which each has `num_prefix` positions."""
    sources: list[Source] = []
    numbers: dict[Hashable, int] = {}  # rows share contexts and leads

    def number(key: Hashable, source: Source) -> int:
        if key not in numbers:
            numbers[key] = len(sources)
            sources.append(source)
        return numbers[key]

    parts = held_parts(batch)
    of_row = range(len(parts))
    if shares_context(batch):  # the same tokens, perhaps held twice
        of_row = [0] * len(parts)
    rows = [
        Before(
            tuple(number(part.key, Source(part.length, row, place)) for place, part in enumerate(parts[row])),
            len(batch.contexts[row]),
        )
        for row in of_row
    ]
    members = [
        Before((number(("prefix", member), Source(length, member=member)),), length) if length else Before()
        for member, length in enumerate(num_prefix)
    ]
    return Outside(sources, rows, members)


def collect_outside(batch: Batch, prefixes: Sequence[KeysValues | None]) -> tuple[Outside, list[KeysValues]]:
    """The plan for a batch that holds its contexts already, and the keys/values themselves."""
    outside = plan_outside(batch, [0 if prefix is None else prefix.length for prefix in prefixes])
    return outside, outside.collect(batch, prefixes)


def held_parts(batch: Batch) -> list[tuple[HeldPart, ...]]:
    """What a batch holds of each row's context, or will hold."""
    if batch.held_parts is not None:
        return batch.held_parts
    held = batch.held or [()] * len(batch.contexts)
    return [tuple(HeldPart(id(part.keys), part.length) for part in some) for some in held]


def shares_context(batch: Batch) -> bool:
    """Whether the virtual tokens depend on no row: no row has a context, or several rows have the same one."""
    first, *others = batch.contexts
    if not others:
        return not len(first)
    return all(np.array_equal(first, other) for other in others)


def text_of(batch: Batch, row: int) -> np.ndarray:
    """What is read of a row after its context; nothing is predicted from the last token of a target."""
    text = np.concatenate([batch.rests[row], batch.targets[row]])
    return text[:-1] if len(batch.targets[row]) else text


def lay_out(batch: Batch, num_vectors: list[int], outside: Outside) -> Layout:
    """`num_vectors`: of each member, the virtual tokens that stand in the sequence."""
    builder = LayoutBuilder(num_vectors)
    is_shared = shares_context(batch)
    homes: dict[int, Run] = {}  # member -> run of its shared virtual tokens
    if is_shared:
        for member in sorted({member for _, member in batch.readers}):
            homes[member] = builder.add(builder.virtual(member), outside.of(0, member), parent=None, member=member)
    for number, (row, member) in enumerate(batch.readers):
        tokens = builder.take(text_of(batch, row))
        before = outside.of(row, member)
        if is_shared:
            home = homes[member]
            start, _ = builder.add(tokens, before, parent=home, member=member)
            last_virtual = home[0] + home[1] - 1
        else:
            own = np.concatenate([builder.virtual(member), tokens])
            first, _ = builder.add(own, before, parent=None, member=member)
            start = first + num_vectors[member]
            last_virtual = start - 1
        builder.supervise(batch.targets[row], number, len(batch.rests[row]), last_virtual, start)
    return builder.finish()


@dataclass(frozen=True)
class LabelLayout:
    """A pass that scores labels: the readers' inputs, and after all of them a tree of labels for each.

    In `layout`, predicts are the positions after which tokens are scored, and targets their numbers. places, targets
    [E of all readers]: each token to score, and the number of its position.
    """

    layout: Layout
    trees: list[PlacedTree]
    places: np.ndarray
    targets: np.ndarray


def lay_out_labels(batch: Batch, num_vectors: list[int], outside: Outside) -> LabelLayout:
    """As `lay_out`, for rows with trees of labels in place of targets."""
    assert batch.trees is not None, "labels are scored of rows that have some"
    builder = LayoutBuilder(num_vectors)
    is_shared = shares_context(batch)
    homes: dict[int, Run] = {}
    if is_shared:
        for member in sorted({member for _, member in batch.readers}):
            homes[member] = builder.add(builder.virtual(member), outside.of(0, member), parent=None, member=member)
    lasts: list[int] = []
    before_trees: list[tuple[Before, tuple[Run, ...]]] = []
    for row, member in batch.readers:
        before = outside.of(row, member)
        source = builder.take(batch.rests[row])
        if not is_shared:
            source = np.concatenate([builder.virtual(member), source])
        home = homes.get(member)
        own = builder.add(source, before, parent=home, member=member)
        runs = tuple(run for run in (home, own) if run is not None and run[1])
        assert runs, "the first token is predicted from a token of the input or of the prompt"
        lasts.append(sum(runs[-1]) - 1)
        before_trees.append((before, runs))
    trees: list[PlacedTree] = []
    places: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    num_places = 0
    for number, (row, member) in enumerate(batch.readers):
        tree = batch.trees[row]
        placed = builder.add_tree(tree, *before_trees[number], member=member)
        trees += [placed] if len(tree.tokens) else []
        predicts = np.concatenate([lasts[number : number + 1], placed.start + np.arange(len(tree.tokens))])
        builder.predict(predicts, num_places + np.arange(len(predicts)), number)
        places.append(num_places + 1 + tree.places)
        targets.append(tree.targets)
        num_places += len(predicts)
    return LabelLayout(builder.finish(), trees, np.concatenate(places), np.concatenate(targets))


class LayoutBuilder:
    """Builds a layout by adding one run of live positions after another."""

    def __init__(self, num_vectors: list[int]):
        self._virtual_starts = np.concatenate([[0], np.cumsum(num_vectors)])
        self._num_live = 0
        self._num_tokens = 0
        self.segments: list[Segment] = []
        self._source: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._predicts: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._reader: list[np.ndarray] = []

    def virtual(self, member: int) -> np.ndarray:
        """Sources of a member's virtual tokens."""
        return np.arange(self._virtual_starts[member], self._virtual_starts[member + 1])

    def take(self, tokens: np.ndarray) -> np.ndarray:
        """Sources of tokens that a reader reads."""
        first = self._virtual_starts[-1] + self._num_tokens
        self._tokens.append(tokens)
        self._num_tokens += len(tokens)
        return np.arange(first, first + len(tokens))

    def add(self, source: np.ndarray, before: Before, *, parent: Run | None, member: int = 0) -> Run:
        """A segment that reads `before` from outside and then the live run `parent`; returns its own run."""
        run = (self._num_live, len(source))
        if not len(source):
            return run
        parents = (parent,) if parent is not None and parent[1] else ()
        offset = before.length + sum(length for _, length in parents)
        self.segments.append(Segment(*run, before.numbers, parents, offset, member, before.num_own))
        self._source.append(source)
        self._positions.append(np.arange(offset, offset + len(source)))
        self._num_live += len(source)
        return run

    def add_tree(self, tree: LabelTree, before: Before, parents: tuple[Run, ...], *, member: int) -> PlacedTree:
        """A tree whose tokens read `before` from outside, the live runs `parents`, and their own branch."""
        offset = before.length + sum(length for _, length in parents)
        placed = PlacedTree(tree, self._num_live, before.numbers, parents, offset, member)
        self._source.append(self.take(tree.tokens))
        self._positions.append(offset + tree.depths)
        self._num_live += len(tree.tokens)
        return placed

    def predict(self, places: np.ndarray, targets: np.ndarray, reader: int) -> None:
        """What stands after live positions `places` is supervised."""
        self._predicts.append(places)
        self._targets.append(targets)
        self._reader.append(np.full(len(targets), reader))

    def supervise(self, targets: np.ndarray, reader: int, num_rest: int, last_virtual: int, start: int) -> None:
        """A reader's targets: text token t stands at live position start + t, the one before it at `last_virtual`."""
        places = start + np.arange(num_rest - 1, num_rest - 1 + len(targets))
        if num_rest == 0 and len(targets):
            assert last_virtual >= 0, "the first target is predicted from a token of the input or of the prompt"
            places[0] = last_virtual
        self.predict(places, targets, reader)

    def finish(self) -> Layout:
        parts = (self._source, self._positions, self._predicts, self._targets, self._reader, self._tokens)
        nothing = np.zeros(0, np.int64)
        return Layout(self.segments, *(np.concatenate([nothing, *part]).astype(np.int64) for part in parts))
