"""The training rows of a bank: every member's own, in its own order, those that several members share only once."""

from collections.abc import Iterable, Sequence

import numpy as np

from ptune_dist.data.batches import Unit, join_readers, step_examples
from ptune_dist.data.build import Split
from ptune_dist.data.encode import Examples


class TrainingRows:
    """The examples of all members end to end; an example's number counts through all of them."""

    def __init__(self, splits: dict[str, Split], *, batch_size: int, seeds: dict[str, int]):
        """`splits`: by member; members with the same rows have the same object."""
        distinct = list({id(split): split for split in splits.values()}.values())
        starts = np.concatenate([[0], np.cumsum([len(split.examples) for split in distinct])]).tolist()
        first = {id(split): start for split, start in zip(distinct, starts, strict=False)}
        self.examples = join_examples([split.examples for split in distinct])
        self.names = [split.rows.name for split in distinct]
        self._digests = [split.digest() for split in distinct]
        self._places = {name: (first[id(split)], len(split.examples)) for name, split in splits.items()}
        self._batch_size, self._seeds = batch_size, seeds

    def digest(self) -> str:
        """Tells whether a resumed run still sees the same examples."""
        return "+".join(self._digests)

    def of_step(self, step: int, members: Iterable[str]) -> dict[str, list[int]]:
        """What each of these members reads in a step: as many examples as it would read alone, and the same."""
        found = {}
        for name in members:
            start, count = self._places[name]
            chosen = step_examples(step, batch_size=self._batch_size, num_examples=count, seed=self._seeds[name])
            found[name] = [start + i for i in chosen]
        return found

    def slice_of(self, member: str) -> slice:
        """Where a member's examples are among all."""
        start, count = self._places[member]
        return slice(start, start + count)

    def units(self, examples: dict[str, list[int]], members: Sequence[str]) -> list[Unit]:
        """Each example once with all members that read it; members are numbered as in `members`."""
        return join_readers((i, members.index(name)) for name, chosen in examples.items() for i in chosen)


def join_examples(parts: list[Examples]) -> Examples:
    """Several sources' examples end to end."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    shifts = np.cumsum([0, *(part.offsets[-1] for part in parts)])

    def where(index: int) -> str:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[part].where(index - int(starts[part]))

    return Examples(
        ids=np.concatenate([part.ids for part in parts]),
        offsets=np.concatenate(
            [[0], *(part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=False))]
        ).astype(np.int64),
        num_targets=np.concatenate([part.num_targets for part in parts]),
        is_truncated=np.concatenate([part.is_truncated for part in parts]),
        where=where,
        num_context=np.concatenate([part.num_context for part in parts]),
        numbers=join_numbers(parts),
    )


def join_numbers(parts: list[Examples]) -> np.ndarray | None:
    """Targets that are numbers: those of all parts, or of none."""
    found = [part.numbers for part in parts if part.numbers is not None]
    return np.concatenate(found) if found else None
