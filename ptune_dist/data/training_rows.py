"""The training rows of a sweep: each member's own rows in its own order; rows of several members are stored once."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ptune_dist.data.batches import Unit, join_readers, step_places
from ptune_dist.data.build import Split
from ptune_dist.data.examples import Examples, Facts, count_equal


class TrainingRows:
    """The examples of all members, concatenated; an example's number is its position in the concatenation."""

    def __init__(self, splits: dict[str, Split], *, batch_size: int, seeds: dict[str, int]):
        """`splits` and `seeds` are by member; members that share their rows share one Split object."""
        distinct = list({id(split): split for split in splits.values()}.values())
        ends = np.cumsum([len(split.examples) for split in distinct]).tolist()
        starts = {id(split): end - len(split.examples) for split, end in zip(distinct, ends, strict=True)}
        self.examples = join_examples([split.examples for split in distinct])
        self.names = [split.rows.name for split in distinct]
        self._digests = [split.digest() for split in distinct]
        # member -> its first example and how many it has
        self._ranges = {name: (starts[id(split)], len(split.examples)) for name, split in splits.items()}
        self._splits = splits
        self._batch_size = batch_size
        self._seeds = seeds

    def digest(self) -> str:
        """Changes if the examples change; compared when a run is resumed."""
        return "+".join(self._digests)

    def of_step(self, step: int, members: Iterable[str]) -> dict[str, list[int]]:
        """The examples that each of these members reads in a step: the same as if it were trained alone."""
        found = {}
        for name in members:
            start, _ = self._ranges[name]
            split = self._splits[name]
            seed = self._seeds[name]
            places = step_places(step, batch_size=self._batch_size, num_examples=split.num_rows, seed=seed)
            chosen = [i for epoch, row in places for i in examples_of_row(split, row, epoch, seed)]
            found[name] = [start + i for i in chosen]
        return found

    def count_rows(self, member: str) -> int:
        """How many rows a member reads in an epoch."""
        return self._splits[member].num_rows

    def slice_of(self, member: str) -> slice:
        """Where a member's examples are among all."""
        start, count = self._ranges[member]
        return slice(start, start + count)

    def own_examples(self, member: str) -> Examples:
        """A member's examples without those of others."""
        return self._splits[member].examples

    def tokens_of(self, member: str, *, with_targets: bool = True) -> Iterator[list[int]]:
        """The token ids of a member's examples in the order of its file: the input, and the target if it is a text.

        `with_targets`: false where targets are numbers of labels, which are no tokens.
        """
        for ids, target in self.examples_of(member):
            yield ids + target if with_targets else ids

    def examples_of(self, member: str) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids of a member's examples in the order of its file: input and target, which is empty if a number."""
        own = self.slice_of(member)
        for index in range(own.start, own.stop):
            target = [] if self.examples.numbers is not None else self.examples.target_ids(index).tolist()
            yield self.examples.input_ids(index).tolist(), target

    def units(self, examples: dict[str, list[int]], members: Sequence[str]) -> list[Unit]:
        """Each example once, with all members that read it; members are numbered as in `members`."""
        return join_readers((i, members.index(name)) for name, chosen in examples.items() for i in chosen)


def examples_of_row(split: Split, row: int, epoch: int, seed: int) -> range:
    """The examples of a row that are read in an epoch: its own, all of a conversation's, or one of its alternatives."""
    if split.ends is None:
        return range(row, row + 1)
    first = int(split.ends[row - 1]) if row else 0
    end = int(split.ends[row])
    if split.takes_all or end - first == 1:
        return range(first, end)
    drawn = first + int(np.random.default_rng([seed, epoch, row]).integers(end - first))
    return range(drawn, drawn + 1)


def join_examples(parts: list[Examples]) -> Examples:
    """The examples of several sources, concatenated."""
    return parts[0] if len(parts) == 1 else JoinedExamples(parts)


class JoinedExamples(Examples):
    """Examples of several sources whose token ids stay where they are; the numbers of tokens are copied."""

    _parts: list[Examples]
    _starts: np.ndarray  # where each part's examples begin, and the end of the last

    def __init__(self, parts: list[Examples]):
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_starts", np.cumsum([0, *(len(part) for part in parts)]))
        has_contexts = any(part.known.has_contexts for part in parts)
        super().__init__(
            ids=np.zeros(0, np.int32),
            offsets=np.zeros(1, np.int64),
            num_targets=np.concatenate([part.num_targets for part in parts]),
            is_truncated=np.concatenate([part.is_truncated for part in parts]),
            where=self._name,
            num_context=np.concatenate([part.num_context for part in parts]) if has_contexts else np.zeros(0, np.int32),
            numbers=join_numbers(parts),
            tasks=join_tasks(parts),
        )
        object.__setattr__(self, "facts", self._join_facts())

    def _place(self, index: int) -> tuple[Examples, int]:
        """An example's part, and its number there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[number], index - int(self._starts[number])

    def _name(self, index: int) -> str:
        part, own = self._place(index)
        return part.where(own)

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths for part in self._parts])

    def lengths_in(self, rows: slice) -> np.ndarray:
        return self.lengths_of(np.arange(rows.start, rows.stop))

    def lengths_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        some = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self._starts, some, side="right") - 1
        found = np.zeros(len(some), np.int64)
        for number in np.unique(numbers).tolist():
            is_own = numbers == number
            found[is_own] = self._parts[number].lengths_of(some[is_own] - self._starts[number])
        return found

    def input_ids(self, index: int) -> np.ndarray:
        part, own = self._place(index)
        return part.input_ids(own)

    def target_ids(self, index: int) -> np.ndarray:
        part, own = self._place(index)
        return part.target_ids(own)

    def _join_facts(self) -> Facts:
        facts = [part.known for part in self._parts]
        lead = np.array(facts[0].lead, np.int32)
        for other in facts[1:]:
            lead = lead[: count_equal(lead, np.array(other.lead, np.int32))]
        empty = [
            int(start) + found.first_empty
            for start, found in zip(self._starts, facts, strict=False)
            if found.first_empty is not None
        ]
        return Facts(
            num_truncated=sum(found.num_truncated for found in facts),
            lead=lead.tolist(),
            is_lead_whole=bool((self.num_context == len(lead)).all()),
            has_contexts=any(found.has_contexts for found in facts),
            first_empty=empty[0] if empty else None,
            longest=max(found.longest for found in facts),
            digest="+".join(found.digest for found in facts),
        )


def join_tasks(parts: list[Examples]) -> np.ndarray | None:
    """Those of rows without tasks are 0: no prompt that reads them has several."""
    if all(part.tasks is None for part in parts):
        return None
    return np.concatenate([np.zeros(len(part), np.int32) if part.tasks is None else part.tasks for part in parts])


def join_numbers(parts: list[Examples]) -> np.ndarray | None:
    """Targets that are numbers: those of all parts, or of none."""
    found = [part.numbers for part in parts if part.numbers is not None]
    return np.concatenate(found) if found else None
