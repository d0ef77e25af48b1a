"""Where everything stands in a pass: from a micro-batch to one row of live positions. Index arithmetic alone.

Floor 3. A reader is one member reading one row. Where all rows have one context (or none, as in `prefix`), the virtual
tokens cannot depend on the row: a member's stand there once and all its readers attend to them. Elsewhere every reader
has its own, after its row's context. Legend: S readers, N live positions, U supervised tokens.
"""

from dataclasses import dataclass

import numpy as np

from ptune_dist.data.batches import Batch
from ptune_dist.model.attention import Segment


@dataclass(frozen=True)
class Layout:
    """Live positions are drawn from [virtual tokens of every member, tokens of every reader], end to end.

    source [N]: which of those stands at each live position. position_ids [N]: its place in its own text.
    predicts [U]: the live position whose next token is supervised; targets [U]: that token; reader [U]: whose it is.
    """

    segments: list[Segment]
    source: np.ndarray
    position_ids: np.ndarray
    predicts: np.ndarray
    targets: np.ndarray
    reader: np.ndarray
    tokens: np.ndarray  # of all readers, end to end


def shares_context(batch: Batch) -> bool:
    """Whether the virtual tokens depend on no row: no row has a context, or several rows have the same one."""
    first, *others = batch.contexts
    return not len(first) and not others or bool(others) and all(np.array_equal(first, other) for other in others)


def lay_out(batch: Batch, num_virtual: list[int], context_numbers: list[tuple[int, ...]]) -> Layout:
    """`num_virtual`: virtual tokens of each member. `context_numbers`: for each row, the keys/values that it reads."""
    pen = Pen(num_virtual)
    is_shared = shares_context(batch)
    homes: dict[int, tuple[int, int]] = {}  # member -> run of its shared virtual tokens
    if is_shared:
        for member in sorted({member for _, member in batch.readers}):
            homes[member] = pen.write(
                pen.virtual(member), context_numbers[0], (), offset=len(batch.contexts[0]),
            )  # fmt: skip
    for number, (row, member) in enumerate(batch.readers):
        text = np.concatenate([batch.rests[row], batch.targets[row]])
        # Nothing is predicted from a text's last token, so it is not read.
        tokens, own = pen.take(text[:-1]), batch.contexts[row]
        if is_shared:
            first_virtual, length = homes[member]
            run = pen.write(tokens, context_numbers[row], (homes[member],), offset=len(own) + length)
            before, start = first_virtual + length - 1, run[0]
        else:
            run = pen.write(np.concatenate([pen.virtual(member), tokens]), context_numbers[row], (), offset=len(own))
            start = run[0] + num_virtual[member]
            before = start - 1
        pen.supervise(batch.targets[row], number, len(batch.rests[row]), before, start)
    return pen.finish()


class Pen:
    """Writes live positions one run after another."""

    def __init__(self, num_virtual: list[int]):
        self._virtual_starts = np.concatenate([[0], np.cumsum(num_virtual)])
        self._num_live, self._num_tokens = 0, 0
        self._segments: list[Segment] = []
        self._source, self._positions, self._tokens = [], [], []
        self._predicts, self._targets, self._reader = [], [], []

    def virtual(self, member: int) -> np.ndarray:
        return np.arange(self._virtual_starts[member], self._virtual_starts[member + 1])

    def take(self, tokens: np.ndarray) -> np.ndarray:
        """Sources of tokens that a reader reads."""
        first = self._virtual_starts[-1] + self._num_tokens
        self._tokens.append(tokens)
        self._num_tokens += len(tokens)
        return np.arange(first, first + len(tokens))

    def write(
        self, source: np.ndarray, contexts: tuple[int, ...], parents: tuple[tuple[int, int], ...], *, offset: int
    ) -> tuple[int, int]:
        """A segment; returns its run of live positions."""
        run = (self._num_live, len(source))
        if len(source):
            self._segments.append(Segment(*run, contexts, parents, offset))
            self._source.append(source)
            self._positions.append(np.arange(offset, offset + len(source)))
            self._num_live += len(source)
        return run

    def supervise(self, targets: np.ndarray, reader: int, num_rest: int, before: int, start: int) -> None:
        """A reader's targets: text token t stands at live position start + t, the one before it at `before`."""
        places = start + np.arange(num_rest - 1, num_rest - 1 + len(targets))
        if num_rest == 0 and len(targets):
            places[0] = before
        self._predicts.append(places)
        self._targets.append(targets)
        self._reader.append(np.full(len(targets), reader))

    def finish(self) -> Layout:
        return Layout(
            self._segments,
            *(
                np.concatenate(parts).astype(np.int64)
                for parts in (
                    self._source, self._positions, self._predicts, self._targets, self._reader, self._tokens,
                )
            ),
        )  # fmt: skip
