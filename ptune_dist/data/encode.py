"""Rows -> token ids. An example is its input followed by its target; only the target is supervised.

How an input is framed and what a target is depends on the family of the base and on the objective (`framing.py`).

An input is split where the virtual tokens stand, which `placement` says: what precedes them is its context, what
follows is the rest. Under prefix and encoder there is no context; under infix and decoder there is nothing else; under
template `{{ prompt }}` says where, and the two parts are tokenized separately.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ptune_dist.data.framing import Framing, Targets, check_ids, special_ids, tokenize, without_beginning, without_end
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import Template, render_batches, split_input
from ptune_dist.errors import UserError

BATCH_ROWS = 1000
CHUNK_CHARACTERS = 1 << 20

TokenPair = tuple[list[int], list[int]]  # an input's tokens before the virtual tokens, and those after them


class Body(NamedTuple):
    """An input without the special tokens at its ends. has_context: whether something was written before the prompt."""

    context: list[int]
    rest: list[int]
    has_context: bool

    @property
    def length(self) -> int:
        return len(self.context) + len(self.rest)


@dataclass(frozen=True)
class Encoding:
    """How rows become token ids: `placement` is prompt.placement, lengths are in tokens.

    num_embeddings: the base's, where its tokenizer has ids beyond them, else None.
    """

    tokenizer: PreTrainedTokenizerBase
    framing: Framing
    targets: Targets
    max_length: int
    placement: str = "prefix"
    truncation_side: str = "left"
    num_embeddings: int | None = None

    @functools.cached_property
    def specials(self) -> TokenPair:
        """What the tokenizer puts before and after an input."""
        if self.framing.is_bare:
            return [], []
        start, end = special_ids(self.tokenizer)
        return start, end if self.framing.ends_input else []


@dataclass(frozen=True)
class Examples:
    """Token ids of all examples, end to end: 4 bytes a token.

    ids: int32 [sum of lengths]. offsets: int64 [N + 1], where each example begins. num_targets: int32 [N], how many of
    its last tokens are its target. is_truncated: bool [N], whether its input lost tokens; a scalar stands for all.
    where: index -> name for messages. num_context: int32 [N], how many of its first tokens are context; None is zeros.
    numbers: float64 [N], the targets where they are numbers. facts: what was found out about all of them when they were
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

    def __post_init__(self) -> None:
        is_truncated = np.asarray(self.is_truncated).astype(bool, copy=False)  # ~ of integers is no mask
        object.__setattr__(self, "is_truncated", np.broadcast_to(is_truncated, len(self)))
        if not len(self.num_context):
            object.__setattr__(self, "num_context", np.broadcast_to(np.int32(0), len(self)))

    def __len__(self) -> int:
        return len(self.num_targets)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: input and target tokens of every example, in private memory."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: Sequence[int]) -> np.ndarray:
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


def find_facts(examples: Examples) -> Facts:
    """The facts about examples, from their arrays."""
    lead = common_context(examples)
    lengths = examples.lengths
    empty = np.flatnonzero(lengths == examples.num_targets)
    return Facts(
        num_truncated=int(examples.is_truncated.sum()),
        lead=lead.tolist(),
        is_lead_whole=bool((examples.num_context == len(lead)).all()),
        has_contexts=bool(examples.num_context.any()),
        first_empty=int(empty[0]) if len(empty) else None,
        longest=int(lengths.max()),
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


def encode_rows(
    rows: Rows,
    encoding: Encoding,
    *,
    template: Template,
    target: Template,
    template_key: str = "data.template",
    target_key: str = "data.target",
    first_row: int = 0,
    end_row: int | None = None,
) -> Examples:
    """Encode rows, all or a range, to at most `max_length` tokens of input and target together.

    The input starts as the tokenizer starts a text (a BOS, say): in the context, or in the rest where the row has no
    context. Too long an input loses tokens at `truncation_side`, but not its start or end; a target loses none. Where
    an input has both parts, the longer one (of equals the rest) loses tokens first, all if need be, and only then the
    other: a short shared instruction outlives a long input. Raises UserError, with the row's line, for a target that
    is empty, does not fit or is of the wrong kind, for a row without a value, and for one without a single marker.
    """
    start, end = encoding.specials
    pieces = []
    counts = []
    numbers = []
    for first, inputs, texts in render_batches(
        rows, {template_key: template, target_key: target}, BATCH_ROWS, first_row, end_row
    ):
        bodies = _tokenize_inputs(encoding, inputs, template_key, rows.where, first)
        targets = encoding.targets.encode(texts, lambda index, first=first: rows.where(first + index), target_key)
        for index, (body, tail) in enumerate(zip(bodies, targets, strict=True), first):
            room = encoding.max_length - len(start) - len(end)
            if encoding.targets.takes_room:
                room -= len(tail.ids)
            if room < 0:
                where = rows.where(index)  # reads the file again, so for messages only
                raise UserError(_describe_long_target(where, target_key, tail.ids, start + end, encoding.max_length))
            context, rest = _frame(body, encoding, room)
            ids = context + rest + tail.ids
            check_ids(ids, encoding.num_embeddings, encoding.tokenizer, functools.partial(rows.where, index))
            pieces.append(np.array(ids, dtype=np.int32))
            counts.append((len(pieces[-1]), len(tail.ids), len(context), body.length > room))
            numbers.append(tail.number)
    lengths, num_targets, num_context, is_truncated = np.array(counts, dtype=np.int32).T.copy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    has_numbers = any(number is not None for number in numbers)
    return Examples(
        np.concatenate(pieces),
        offsets,
        num_targets,
        is_truncated.astype(bool),
        rows.where,
        num_context,
        np.array(numbers, np.float64) if has_numbers else None,
    )


def encode_inputs(
    rows: Rows, encoding: Encoding, *, template: Template, template_key: str = "data.template"
) -> list[TokenPair]:
    """The inputs alone, each as (context, rest), as `encode_rows` makes them, of rows that need no target."""
    start, end = encoding.specials
    room = max(0, encoding.max_length - len(start) - len(end))
    encoded = []
    for first, inputs in render_batches(rows, {template_key: template}, BATCH_ROWS):
        bodies = _tokenize_inputs(encoding, inputs, template_key, rows.where, first)
        for index, body in enumerate(bodies, first):
            context, rest = _frame(body, encoding, room)
            where = functools.partial(rows.where, index)
            check_ids(context + rest, encoding.num_embeddings, encoding.tokenizer, where)
            encoded.append((context, rest))
    return encoded


def encode_text_blocks(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, num_embeddings: int | None = None
) -> Examples:
    """Plain language modelling: the lines as one text, cut into blocks of `max_length` tokens, the last one shorter.

    Every token is a target, no special token is added, and no input precedes. The text goes through the tokenizer in
    chunks of about a million characters, between lines.
    """
    pieces = [np.array(tokenize(tokenizer, [chunk])[0], dtype=np.int32) for chunk in _join_lines(rows)]
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    if not len(ids):
        raise UserError(f"{rows.name} has no text")
    if num_embeddings is not None:
        beyond = int(np.argmax(ids >= num_embeddings))
        check_ids(ids[beyond : beyond + 1].tolist(), num_embeddings, tokenizer, lambda: rows.name)
    offsets = np.append(np.arange(0, len(ids), max_length, dtype=np.int64), len(ids))
    return Examples(
        ids, offsets, np.diff(offsets).astype(np.int32), np.array(False), functools.partial(_name_block, rows.name)
    )


def longest_answer(examples: Examples) -> int | None:
    """Tokens of the longest target; None where targets are numbers or no input precedes any, as in plain text."""
    if examples.numbers is not None or int(examples.num_targets.sum()) == int(examples.lengths.sum()):
        return None
    return int(examples.num_targets.max())


def common_context(examples: Examples) -> np.ndarray:
    """The longest run of tokens that all contexts begin with: int32 [T], empty where there is none.

    Truncated rows do not count: what they share with the others may have been cut. A caller must look which of them
    begin with it all the same.
    """
    common = None
    for i in np.flatnonzero(~examples.is_truncated).tolist():
        context = examples.context_ids(i)
        common = context if common is None else common[: count_equal(common, context)]
        if not len(common):
            break
    return np.zeros(0, np.int32) if common is None else common


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


def _tokenize_inputs(
    encoding: Encoding, texts: list[str], key: str, where: Callable[[int], str], first: int
) -> list[Body]:
    """Both parts of every rendered input, without special tokens; `first` is the first one's row."""
    parts = [
        split_input(text, encoding.placement, key=key, where=functools.partial(where, index))
        for index, text in enumerate(texts, first)
    ]
    contexts = tokenize(encoding.tokenizer, [context for context, _ in parts])
    rests = tokenize(encoding.tokenizer, [rest for _, rest in parts])
    return [_without_specials(context, rest, encoding) for context, rest in zip(contexts, rests, strict=True)]


def _without_specials(context: list[int], rest: list[int], encoding: Encoding) -> Body:
    """An input without the special tokens that `_frame` puts at its ends: a template that writes them has them once."""
    start, end = encoding.specials
    has_context = bool(context)
    if has_context:
        context = without_beginning(context, start)
    else:
        rest = without_beginning(rest, start)
    if encoding.placement in ("infix", "decoder"):
        return Body(without_end(context, end), rest, has_context)
    return Body(context, without_end(rest, end), has_context)


def _frame(body: Body, encoding: Encoding, room: int) -> TokenPair:
    """An input's parts, cut to `room` tokens together and put between the special tokens of a text."""
    start, end = encoding.specials
    context, rest, has_context = body  # as written: the start does not move because a context was cut to nothing
    side = encoding.truncation_side
    excess = max(0, len(context) + len(rest) - room)
    from_context = min(excess, len(context)) if len(context) > len(rest) else max(0, excess - len(rest))
    context = _cut(context, len(context) - from_context, side)
    rest = _cut(rest, len(rest) - (excess - from_context), side)
    if encoding.placement in ("infix", "decoder"):
        return start + context + end, []
    return (start + context, rest + end) if has_context else ([], start + rest + end)


def _cut(body: list[int], room: int, side: str) -> list[int]:
    assert side in ("left", "right"), side
    if side == "right":
        return body[:room]
    return body[len(body) - room :] if len(body) > room else body


def _describe_long_target(where: str, key: str, tail: list[int], start: list[int], max_length: int) -> str:
    needs = f"{len(tail)} tokens" + (f" beside {len(start)} special ones" if start else "")
    return f"{where}: {key} is {needs}, more than data.max_length {max_length}; raise data.max_length or drop the row"


def _join_lines(rows: Rows) -> Iterator[str]:
    """The text of all rows, in chunks of whole lines."""
    lines = []
    size = 0
    for first in range(0, len(rows), BATCH_ROWS):
        for row in rows.read(first, first + BATCH_ROWS):
            lines.append(row["text"])
            size += len(row["text"])
            if size >= CHUNK_CHARACTERS:
                yield "".join(lines)
                lines = []
                size = 0
    if lines:
        yield "".join(lines)


def _name_block(name: str, index: int) -> str:
    return f"{name} block {index + 1} (the first is block 1)"
