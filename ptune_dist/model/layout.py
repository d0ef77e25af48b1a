"""The layout of a pass: from a micro-batch to one row of live positions. Index arithmetic only.

A reader is one member that reads one row. If all rows have the same context (or none, as with `prefix`), the virtual
tokens cannot depend on the row: each member's virtual tokens occur once, and all its readers attend to them. Otherwise
every reader has its own virtual tokens, after the context of its row.

Shapes: S readers, N live positions, U supervised tokens.
"""

from dataclasses import dataclass

import numpy as np

from ptune_dist.data.batches import Batch
from ptune_dist.model.attention import Segment


@dataclass(frozen=True)
class Layout:
    """Live positions, each taken from [virtual tokens of all members, tokens of all readers], concatenated.

    source [N]: the index in that concatenation of what stands at each live position. position_ids [N]: its position in
    its own text. predicts [U]: the live position whose next token is supervised. targets [U]: that token. reader [U]:
    the reader it belongs to. tokens: the tokens of all readers, concatenated.
    """

    segments: list[Segment]
    source: np.ndarray
    position_ids: np.ndarray
    predicts: np.ndarray
    targets: np.ndarray
    reader: np.ndarray
    tokens: np.ndarray


def shares_context(batch: Batch) -> bool:
    """Whether the virtual tokens depend on no row: no row has a context, or several rows have the same one."""
    first, *others = batch.contexts
    if not others:
        return len(first) == 0
    return all(np.array_equal(first, other) for other in others)


def lay_out(batch: Batch, num_virtual: list[int], context_numbers: list[tuple[int, ...]]) -> Layout:
    """`num_virtual` is by member. `context_numbers` lists, by row, the keys/values that the row attends to."""
    builder = LayoutBuilder(num_virtual)
    is_shared = shares_context(batch)
    shared_runs: dict[int, tuple[int, int]] = {}  # member -> run of its virtual tokens
    if is_shared:
        for member in sorted({member for _, member in batch.readers}):
            virtual = builder.virtual(member)
            shared_runs[member] = builder.add(virtual, context_numbers[0], (), offset=len(batch.contexts[0]))
    for number, (row, member) in enumerate(batch.readers):
        text = np.concatenate([batch.rests[row], batch.targets[row]])
        tokens = builder.take(text[:-1])  # nothing is predicted from the last token, so it is not read
        context_length = len(batch.contexts[row])
        if is_shared:
            first_virtual, length = shared_runs[member]
            offset = context_length + length
            start, _ = builder.add(tokens, context_numbers[row], (shared_runs[member],), offset=offset)
            before = first_virtual + length - 1
        else:
            own = np.concatenate([builder.virtual(member), tokens])
            first_virtual, _ = builder.add(own, context_numbers[row], (), offset=context_length)
            start = first_virtual + num_virtual[member]
            before = start - 1
        builder.supervise(batch.targets[row], number, len(batch.rests[row]), before, start)
    return builder.finish()


class LayoutBuilder:
    """Builds a layout by adding one run of live positions after another."""

    def __init__(self, num_virtual: list[int]):
        self._virtual_starts = np.concatenate([[0], np.cumsum(num_virtual)])
        self._num_live = 0
        self._num_tokens = 0
        self._segments: list[Segment] = []
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

    def add(
        self, source: np.ndarray, contexts: tuple[int, ...], parents: tuple[tuple[int, int], ...], *, offset: int
    ) -> tuple[int, int]:
        """Add a segment, unless it is empty; returns its run (start, length) of live positions."""
        run = (self._num_live, len(source))
        if len(source):
            self._segments.append(Segment(*run, contexts, parents, offset))
            self._source.append(source)
            self._positions.append(np.arange(offset, offset + len(source)))
            self._num_live += len(source)
        return run

    def supervise(self, targets: np.ndarray, reader: int, num_rest: int, before: int, start: int) -> None:
        """Add a reader's targets. Its text's first token is at live position `start`, what precedes it at `before`."""
        places = start + np.arange(num_rest - 1, num_rest - 1 + len(targets))
        if num_rest == 0 and len(targets):
            places[0] = before
        self._predicts.append(places)
        self._targets.append(targets)
        self._reader.append(np.full(len(targets), reader))

    def finish(self) -> Layout:
        def join(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts).astype(np.int64)

        return Layout(
            segments=self._segments,
            source=join(self._source),
            position_ids=join(self._positions),
            predicts=join(self._predicts),
            targets=join(self._targets),
            reader=join(self._reader),
            tokens=join(self._tokens),
        )
