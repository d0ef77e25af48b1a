"""The training rows of a sweep: each member's own rows in its own order; rows of several members are stored once."""

from collections.abc import Iterable, Sequence

import numpy as np

from ptune_dist.data.batches import Unit, join_readers, step_examples
from ptune_dist.data.build import Split
from ptune_dist.data.examples import Examples


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
        self._batch_size = batch_size
        self._seeds = seeds

    def digest(self) -> str:
        """Changes if the examples change; compared when a run is resumed."""
        return "+".join(self._digests)

    def of_step(self, step: int, members: Iterable[str]) -> dict[str, list[int]]:
        """The examples that each of these members reads in a step: the same as if it were trained alone."""
        found = {}
        for name in members:
            start, count = self._ranges[name]
            chosen = step_examples(step, batch_size=self._batch_size, num_examples=count, seed=self._seeds[name])
            found[name] = [start + i for i in chosen]
        return found

    def slice_of(self, member: str) -> slice:
        """Where a member's examples are among all."""
        start, count = self._ranges[member]
        return slice(start, start + count)

    def units(self, examples: dict[str, list[int]], members: Sequence[str]) -> list[Unit]:
        """Each example once, with all members that read it; members are numbered as in `members`."""
        return join_readers((i, members.index(name)) for name, chosen in examples.items() for i in chosen)


def join_examples(parts: list[Examples]) -> Examples:
    """The examples of several sources, concatenated."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    shifts = np.cumsum([0, *(part.offsets[-1] for part in parts[:-1])])
    shifted = [part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=True)]

    def where(index: int) -> str:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[part].where(index - int(starts[part]))

    return Examples(
        ids=np.concatenate([part.ids for part in parts]),
        offsets=np.concatenate([[0], *shifted]).astype(np.int64),
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
