"""Token ids of examples, end to end in arrays that may be memory-mapped, and what is asked of all of them.

What looks at all examples does so a chunk at a time: there may be millions, and each rank pays for its copies.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

CHUNK_ROWS = 100_000


@dataclass(frozen=True)
class Examples:
    """Token ids of all examples, end to end: 4 bytes a token.

    ids: int32 [sum of lengths]. offsets: int64 [N + 1], where each example begins. num_targets: int32 [N], how many of
    its last tokens are its target. is_truncated: bool [N], whether its input lost tokens; a scalar stands for all.
    where: index -> name for messages. num_context: int32 [N], how many of its first tokens are context; None is zeros.
    numbers: float64 [N], the targets where they are numbers. tasks: int32 [N], the numbers of their tasks, where rows
    have some. facts: what was found out about all of them when they were
    encoded; the arrays may be memory-mapped, and reading them whole takes time.
    """

    ids: np.ndarray
    offsets: np.ndarray
    num_targets: np.ndarray
    is_truncated: np.ndarray
    where: Callable[[int], str]
    num_context: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    numbers: np.ndarray | None = None
    facts: "Facts | None" = None
    tasks: np.ndarray | None = None

    def __post_init__(self) -> None:
        is_truncated = np.asarray(self.is_truncated).astype(bool, copy=False)  # ~ of integers is no mask
        object.__setattr__(self, "is_truncated", np.broadcast_to(is_truncated, len(self)))
        if not len(self.num_context):
            object.__setattr__(self, "num_context", np.broadcast_to(np.int32(0), len(self)))

    def __len__(self) -> int:
        return len(self.num_targets)

    def lengths_in(self, rows: slice) -> np.ndarray:
        """int64: input and target tokens of a range of examples."""
        return np.diff(self.offsets[rows.start : rows.stop + 1])

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: input and target tokens of every example, in private memory."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Input and target tokens of some examples, in time that does not depend on how many there are."""
        some = np.asarray(rows, np.int64)
        return self.offsets[some + 1] - self.offsets[some]

    @property
    def widths(self) -> np.ndarray:
        """[N, 2]: tokens of each example's input and of its target."""
        return np.stack([self.lengths - self.num_targets, self.num_targets], axis=1)

    def widths_of(self, rows: Sequence[int]) -> np.ndarray:
        """As `widths`, of some examples."""
        num_targets = self.num_targets[np.asarray(rows, np.int64)]
        return np.stack([self.lengths_of(rows) - num_targets, num_targets], axis=1)

    def longest_rows(self, count: int) -> list[int]:
        """The examples with the most tokens, the longest first."""
        found = np.zeros(0, np.int64)
        for chunk in chunks_of(len(self)):
            rows = np.concatenate([found, np.arange(chunk.start, chunk.stop)])
            found = rows[np.argsort(-self.lengths_of(rows), kind="stable")[:count]]
        return found.tolist()

    @functools.cached_property
    def known(self) -> "Facts":
        """The facts about all examples, found out now where they are not stored."""
        return self.facts or find_facts(self)

    def input_ids(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1] - self.num_targets[index]]

    def context_ids(self, index: int) -> np.ndarray:
        return self.input_ids(index)[: self.num_context[index]]

    def rest_ids(self, index: int) -> np.ndarray:
        return self.input_ids(index)[self.num_context[index] :]

    def target_ids(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index + 1] - self.num_targets[index] : self.offsets[index + 1]]

    def number(self, index: int) -> float | None:
        """The target of a regression."""
        return None if self.numbers is None else float(self.numbers[index])

    @property
    def num_truncated(self) -> int:
        return self.known.num_truncated

    @property
    def truncated_share(self) -> float:
        return self.num_truncated / len(self)


@dataclass(frozen=True)
class Facts:
    """What is asked of all examples at the start of a run.

    lead: what all contexts begin with (see `common_context`). is_lead_whole: all contexts end with it. first_empty: the
    first example whose input is empty. digest: tells whether a resumed run still sees the same examples.
    """

    num_truncated: int
    lead: list[int]
    is_lead_whole: bool
    has_contexts: bool
    first_empty: int | None
    longest: int
    digest: str


class Part(NamedTuple):
    """The arrays of some examples: as those of `Examples`, but for the lengths [N] of examples in place of offsets."""

    ids: np.ndarray
    lengths: np.ndarray
    num_targets: np.ndarray
    is_truncated: np.ndarray
    num_context: np.ndarray
    numbers: np.ndarray | None


def part_of(examples: Examples) -> Part:
    lengths = examples.lengths.astype(np.int32)
    return Part(
        examples.ids, lengths, examples.num_targets, examples.is_truncated, examples.num_context, examples.numbers
    )


def join_parts(parts: Iterable[Part], where: Callable[[int], str]) -> Examples:
    """The examples of consecutive parts, of which there is at least one."""
    columns = zip(*parts, strict=True)
    ids, lengths, num_targets, is_truncated, num_context = (np.concatenate(next(columns)) for _ in range(5))
    numbers = [found for found in next(columns) if found is not None]
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Examples(
        ids=ids,
        offsets=offsets,
        num_targets=num_targets,
        is_truncated=is_truncated,
        where=where,
        num_context=num_context,
        numbers=np.concatenate(numbers) if numbers else None,
    )


def chunks_of(num_rows: int) -> Iterator[slice]:
    """Consecutive ranges of all rows."""
    for first in range(0, num_rows, CHUNK_ROWS):
        yield slice(first, min(num_rows, first + CHUNK_ROWS))


def find_facts(examples: Examples) -> Facts:
    """The facts about examples, from their arrays."""
    lead = common_context(examples)
    longest = 0
    first_empty = None
    for chunk in chunks_of(len(examples)):
        lengths = examples.lengths_in(chunk)
        longest = max(longest, int(lengths.max()))
        empty = np.flatnonzero(lengths == examples.num_targets[chunk])
        if first_empty is None and len(empty):
            first_empty = chunk.start + int(empty[0])
    return Facts(
        num_truncated=int(examples.is_truncated.sum()),
        lead=lead.tolist(),
        is_lead_whole=bool((examples.num_context == len(lead)).all()),
        has_contexts=bool(examples.num_context.any()),
        first_empty=first_empty,
        longest=longest,
        digest=digest_of(examples),
    )


def digest_of(examples: Examples) -> str:
    """A hash of all tokens and of where examples, contexts and targets begin."""
    hashed = hashlib.sha256(np.ascontiguousarray(examples.ids).data)
    hashed.update(np.ascontiguousarray(examples.offsets).data)
    if examples.num_context.any():  # runs that have no contexts keep the digest they always had
        hashed.update(np.ascontiguousarray(examples.num_context).data)
    if examples.numbers is not None:
        hashed.update(np.ascontiguousarray(examples.numbers).data)
    return hashed.hexdigest()[:16]


def longest_answer(examples: Examples) -> int | None:
    """Tokens of the longest target; None where targets are numbers or no input precedes any, as in plain text."""
    if examples.numbers is not None or int(examples.num_targets.sum()) == int(examples.offsets[-1]):
        return None
    return int(examples.num_targets.max())


def common_context(examples: Examples) -> np.ndarray:
    """The longest run of tokens that all contexts begin with: int32 [T], empty where there is none.

    Truncated rows do not count: what they share with the others may have been cut. A caller must look which of them
    begin with it all the same.
    """
    common = None
    for chunk in chunks_of(len(examples)):
        rows = chunk.start + np.flatnonzero(~examples.is_truncated[chunk])
        if not len(rows):
            continue
        if common is None:
            common = np.array(examples.context_ids(int(rows[0])))
        common = common[: examples.num_context[rows].min()]
        common = common[: count_common(examples, rows, common)]
        if not len(common):
            break
    return np.zeros(0, np.int32) if common is None else common


def count_common(examples: Examples, rows: np.ndarray, ids: np.ndarray) -> int:
    """How many of these first tokens all rows have, which are at least as long."""
    starts = examples.offsets[rows]
    for place, token in enumerate(ids):
        if not (examples.ids[starts + place] == token).all():
            return place
    return len(ids)


def count_rows_with(examples: Examples, tokens: Sequence[int], *, in_targets: bool) -> list[int]:
    """In how many examples each of these tokens stands, and last in how many any of them does."""
    counts = np.zeros(len(tokens) + 1, np.int64)
    for chunk in chunks_of(len(examples)):
        first = examples.offsets[chunk.start]
        ids = examples.ids[first : examples.offsets[chunk.stop]]
        places = np.flatnonzero(np.isin(ids, tokens))
        rows = np.searchsorted(examples.offsets[chunk], first + places, side="right") - 1
        if not in_targets:
            is_input = first + places < examples.offsets[chunk.start + 1 :][rows] - examples.num_targets[chunk][rows]
            places = places[is_input]
            rows = rows[is_input]
        for number, token in enumerate(tokens):
            counts[number] += len(np.unique(rows[ids[places] == token]))
        counts[-1] += len(np.unique(rows))
    return counts.tolist()


def token_statistics(examples: Examples) -> dict:
    """Counts for people: p50, p90, max and total of input, context (a part of it) and target tokens; inputs cut.

    `num_distinct_contexts` leaves the empty context out; `shared_context_tokens` is what all contexts begin with.
    """
    contexts = (examples.context_ids(i) for i in np.flatnonzero(examples.num_context).tolist())
    return {
        "num_examples": len(examples),
        "input_tokens": _spread(examples.lengths - examples.num_targets),
        "context_tokens": _spread(examples.num_context),
        "target_tokens": _spread(examples.num_targets),
        "num_truncated": examples.num_truncated,
        "truncated_share": examples.truncated_share,
        "num_distinct_contexts": len({hash(context.tobytes()) for context in contexts}),  # hashes: contexts are long
        "shared_context_tokens": len(common_context(examples)),
    }


def _spread(counts: np.ndarray) -> dict[str, int]:
    p50, p90 = np.percentile(counts, [50, 90], method="inverted_cdf")
    return {"p50": int(p50), "p90": int(p90), "max": int(counts.max()), "total": int(counts.sum(dtype=np.int64))}


def count_equal(first: np.ndarray, second: np.ndarray) -> int:
    """How many first elements of the two are the same."""
    count = min(len(first), len(second))
    differing = np.flatnonzero(first[:count] != second[:count])
    return int(differing[0]) if len(differing) else count
