"""Answer rows token by token, with a decoder that rows enter and leave: a finished row makes room for a waiting one.

The longest inputs come first, so that the rows in progress are of like length at any time. Rows are dealt to the ranks
beforehand; each rank works through its own and all meet after every round of passes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptune_dist.data.batches import Batch, idle_batch
from ptune_dist.data.encode import TokenPair
from ptune_dist.data.examples import count_equal
from ptune_dist.distributed.world import World, gather_from_ranks, max_over_ranks
from ptune_dist.evaluation.sampling import Chooser
from ptune_dist.model.decode import Decoder

PASSES_PER_ROUND = 32
MOST_ROWS = 256  # in progress: their logits take memory too


@dataclass
class Row:
    """An input without what the lead has of it, and its answer so far."""

    number: int
    context: np.ndarray
    rest: np.ndarray
    most_tokens: int
    reader: int = 0  # which of the prompts that the decoder knows reads it
    length: int = 0  # positions of its own before the answer
    answer: list[int] = field(default_factory=list)

    @property
    def need(self) -> int:
        return self.length + self.most_tokens


@dataclass(frozen=True)
class Base:
    """How passes are run: `run` without gradient, `hold` for what contexts leave. Collective where it `is_sharded`."""

    run: Callable[[Callable[[], Any]], Any]
    hold: Callable[[Batch], Batch]
    world: World
    is_sharded: bool
    pad_id: int


class AnswerLoop:
    """This rank's rows on their way through a decoder."""

    def __init__(
        self,
        decoder: Decoder,
        base: Base,
        chooser: Chooser,
        *,
        end: int | None,
        budget: int,
        listener: Callable[[int, list[int]], None] | None = None,
    ):
        """`end`: the token after which an answer is complete. `budget`: the most positions that a pass reads.
        `listener`: gets a row's number and the tokens of its answer so far after each pass.
        """
        self._listener = listener
        self._decoder = decoder
        self._base = base
        self._chooser = chooser
        self._end = end
        self._budget = budget
        self._capacity = budget * decoder.held_per_position  # positions whose keys/values are held
        self._holds_contexts = False
        self._waiting: list[Row] = []  # the next one last
        self._active: list[Row] = []

    def start(self, rows: list[Row], everyone: list[Row]) -> None:
        """Read what the inputs of `everyone` begin with, and queue this rank's `rows`. Collective."""
        lead = common_beginning(everyone) if self._decoder.shares_beginnings else None
        if lead is None:
            self._holds_contexts = self._decoder.needs_contexts or any(len(row.context) for row in everyone)
        else:
            nothing = np.zeros(0, np.int32)
            batch = Batch([everyone[0].context], [lead], [nothing], [(0, 0)], self._base.pad_id)
            batch = self._base.hold(batch) if len(everyone[0].context) else batch
            self._base.run(lambda: self._decoder.start(batch))
        for row in rows:
            row.rest = row.rest[0 if lead is None else len(lead) :]
            row.length = self._decoder.own_length(row.context, row.rest)
        self._waiting = sorted(rows, key=lambda row: (row.length, -row.number))

    def run_round(self) -> tuple[list[Row], bool]:
        """Some passes: the rows that are finished, and whether this rank has any left. Collective if sharded."""
        finished: list[Row] = []
        for _ in range(PASSES_PER_ROUND):
            new = self._admit()
            is_busy = bool(self._active or new)
            is_any_new = bool(new)
            if self._base.is_sharded:  # every rank makes the passes that any rank needs
                state = int(max_over_ranks(2 * is_busy + bool(new), self._base.world))
                is_any_new = bool(state & 1)
                if not state:
                    break
            elif not is_busy:
                break
            finished += self._run_pass(new, is_any_new)
        return finished, bool(self._active or self._waiting)

    def _admit(self) -> list[Row]:
        """Waiting rows for which there is room."""
        new: list[Row] = []
        if self._active and not self._decoder.enters_any_time:
            return new
        num_held = sum(row.need for row in self._active)
        num_read = len(self._active)
        while self._waiting and len(self._active) + len(new) < MOST_ROWS:
            row = self._waiting[-1]
            is_over = num_held + row.need > self._capacity or num_read + row.length > self._budget
            if is_over and (self._active or new):
                break
            new.append(self._waiting.pop())
            num_held += row.need
            num_read += row.length
        return new

    def _run_pass(self, new: list[Row], is_any_new: bool) -> list[Row]:
        """One more token of every row in progress, and the first of those that enter; returns the finished ones."""
        batch = self._batch_of(new, has_contexts=self._holds_contexts and is_any_new)
        if self._holds_contexts and is_any_new:
            batch = self._base.hold(batch)
        tokens = [row.answer[-1] for row in self._active]
        logits = self._base.run(lambda: self._decoder.run(tokens, batch, is_any_new=is_any_new, is_new=bool(new)))
        if not self._active and not new:  # for other ranks
            return []
        rows = self._active + new
        for row, token in zip(rows, self._chooser.choose(logits, [row.number for row in rows]), strict=True):
            row.answer.append(token)
            if self._listener is not None:
                self._listener(row.number, row.answer)
        is_done = [row.answer[-1] == self._end or len(row.answer) >= row.most_tokens for row in rows]
        count = len(self._active)
        leaving = [place for place in range(count) if is_done[place]]
        entering = [place for place in range(len(new)) if not is_done[count + place]]
        order = self._decoder.settle(leaving, entering, [new[place].need for place in entering])
        self._active = [rows[place] for place in order]
        return [row for row, done in zip(rows, is_done, strict=True) if done]

    def _batch_of(self, rows: list[Row], *, has_contexts: bool) -> Batch:
        if not rows:
            return idle_batch(self._base.pad_id, has_contexts=has_contexts)
        nothing = [np.zeros(0, np.int32)] * len(rows)
        readers = [(number, row.reader) for number, row in enumerate(rows)]
        return Batch([row.context for row in rows], [row.rest for row in rows], nothing, readers, self._base.pad_id)


def answer_rows(
    loop: AnswerLoop,
    inputs: Sequence[TokenPair],
    most_tokens: Sequence[int],
    numbers: Sequence[int],
    world: World,
    readers: Sequence[int] | None = None,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield, round after round, (number, token ids) of rows that any rank has finished.

    `numbers`: of each row, for sampling. `most_tokens`: of each answer, one at least where it is to be read. `readers`:
    of each row, the number of its prompt, for a decoder that knows several.
    Collective: every rank must exhaust it.
    """
    rows = [
        Row(number, np.array(context, np.int32), np.array(rest, np.int32), most, reader)
        for number, (context, rest), most, reader in zip(
            numbers, inputs, most_tokens, readers or [0] * len(inputs), strict=True
        )
    ]
    yield [(row.number, []) for row in rows if row.most_tokens < 1]  # the input fills a base's last learned position
    rows = [row for row in rows if row.most_tokens >= 1]
    if not rows:
        return
    by_length = sorted(rows, key=lambda row: -len(row.context) - len(row.rest))
    loop.start(by_length[world.rank :: world.size], rows)
    is_busy = True
    while is_busy:
        finished, is_left = loop.run_round()
        found = gather_from_ranks(([(row.number, row.answer) for row in finished], is_left), world)
        is_busy = any(left for _, left in found)
        yield [pair for pairs, _ in found for pair in pairs]


def common_beginning(rows: list[Row]) -> np.ndarray | None:
    """What all rests begin with, but for a last token; None where the contexts differ, or a rest is empty."""
    first = rows[0]
    if any(not len(row.rest) or not np.array_equal(row.context, first.context) for row in rows):
        return None
    if len(rows) == 1:
        return first.rest[:0]
    common = first.rest
    for row in rows:
        common = common[: min(count_equal(common, row.rest), len(row.rest) - 1)]
    return common
