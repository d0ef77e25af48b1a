"""Rows -> token ids. An example is its input followed by its target; the target alone is supervised.

What stands between depends on the family of the base: a causal one reads on from input to target; seq2seq and encoder
bases read an input that is ended as their tokenizer ends a text. An encoder's target is one number, that of a label.

An input is split where the virtual tokens stand, which `placement` says: what precedes them is its context, what
follows is the rest. Under prefix and encoder there is no context, under infix and decoder nothing but; under template
`{{ prompt }}` says where, and the two parts are tokenized apart.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ptune_dist.data.sources import Rows
from ptune_dist.data.template import Template, render_batches, split_input
from ptune_dist.errors import UserError

BATCH_ROWS = 1000
CHUNK_CHARACTERS = 1 << 20

TokenPair = tuple[list[int], list[int]]  # an input's tokens before the virtual tokens, and those after them


@dataclass(frozen=True)
class Examples:
    """Token ids of all examples, end to end: 4 bytes a token.

    ids: int32 [sum of lengths]. offsets: int64 [N + 1], where each example begins. num_targets: int32 [N], how many of
    its last tokens are its target. is_truncated: bool [N], whether its input lost tokens; one bool stands for all.
    where: index -> name for messages. num_context: int32 [N], how many of its first tokens are context; None is zeros.
    lengths: int64 [N], input and target tokens.
    """

    ids: np.ndarray
    offsets: np.ndarray
    num_targets: np.ndarray
    is_truncated: np.ndarray | bool
    where: Callable[[int], str]
    num_context: np.ndarray | None = None
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))
        object.__setattr__(self, "is_truncated", np.broadcast_to(self.is_truncated, len(self)).astype(bool))
        if self.num_context is None:
            object.__setattr__(self, "num_context", np.zeros(len(self), np.int32))

    def __len__(self) -> int:
        return len(self.num_targets)

    @property
    def widths(self) -> np.ndarray:
        """[N, 2]: tokens of each example's input and of its target."""
        return np.stack([self.lengths - self.num_targets, self.num_targets], axis=1)

    def input_ids(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1] - self.num_targets[index]]

    def context_ids(self, index: int) -> np.ndarray:
        return self.input_ids(index)[: self.num_context[index]]

    def rest_ids(self, index: int) -> np.ndarray:
        return self.input_ids(index)[self.num_context[index] :]

    def target_ids(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index + 1] - self.num_targets[index] : self.offsets[index + 1]]

    @property
    def num_truncated(self) -> int:
        return int(self.is_truncated.sum())

    @property
    def truncated_share(self) -> float:
        return self.num_truncated / len(self)


def encode_rows(
    rows: Rows,
    tokenizer,
    *,
    template: Template,
    target: Template,
    max_length: int,
    family: str = "causal",
    labels: list[str] | None = None,
    append_eos: bool = True,
    truncation_side: str = "left",
    placement: str = "prefix",
    template_key: str = "data.template",
    target_key: str = "data.target",
) -> Examples:
    """Encode every row to at most `max_length` tokens of input and target together.

    The input starts as the tokenizer starts a text (a BOS, say): in the context, or in the rest where the row has no
    context. A causal base's does not end as the tokenizer ends one: nothing stands between input and target. Too long
    an input loses tokens at `truncation_side`, but not its start or end; a target loses none. Where it has both parts,
    the longer one (of equals the rest) loses tokens first, all if need be, and only then the other: a short shared
    instruction outlives a long input. Raises UserError, with the row's line, for a target that is empty, does not fit
    or is none of an encoder's `labels`, for a row without a value, and for one without a single marker.
    """
    start, end = special_ids(tokenizer)
    before = start if family == "seq2seq" else []  # a decoder's own text begins as any text does
    end = [] if family == "causal" else end
    pieces, counts = [], []
    closing = _end_ids(tokenizer) if append_eos and family != "encoder" else []
    for first, inputs, targets in render_batches(rows, {template_key: template, target_key: target}, BATCH_ROWS):
        bodies = _tokenize_inputs(tokenizer, inputs, placement, template_key, rows.where, first)
        tails = _tokenize(tokenizer, targets)
        for index, (body, tail, text) in enumerate(zip(bodies, tails, targets, strict=True), first):
            where = functools.partial(rows.where, index)  # reads the file again, so for messages only
            if not text.strip() or not tail:
                raise UserError(f"{where()}: {target_key} is empty for this row; fill it or drop the row")
            label = [_label_index(text.strip(), labels, where, target_key)] if family == "encoder" else None
            tail = label or before + tail + closing
            room = max_length - len(start) - len(end) - (len(tail) if family != "encoder" else 0)
            if room < 0:
                raise UserError(_describe_long_target(where(), target_key, tail, start + end, max_length))
            context, rest = _frame(body, start, end, placement, room, truncation_side)
            pieces.append(np.array(context + rest + tail, dtype=np.int32))
            counts.append((len(pieces[-1]), len(tail), len(context), sum(map(len, body)) > room))
    lengths, num_targets, num_context, is_truncated = np.array(counts, dtype=np.int32).T.copy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Examples(np.concatenate(pieces), offsets, num_targets, is_truncated, rows.where, num_context)


def encode_inputs(
    rows: Rows,
    tokenizer,
    *,
    template: Template,
    max_length: int,
    family: str = "causal",
    truncation_side: str = "left",
    placement: str = "prefix",
    template_key: str = "data.template",
) -> list[TokenPair]:
    """The inputs alone, each as (context, rest), as `encode_rows` makes them, of rows that need no target."""
    start, end = special_ids(tokenizer)
    end = [] if family == "causal" else end
    room = max(0, max_length - len(start) - len(end))
    encoded = []
    for first, inputs in render_batches(rows, {template_key: template}, BATCH_ROWS):
        bodies = _tokenize_inputs(tokenizer, inputs, placement, template_key, rows.where, first)
        encoded += [_frame(body, start, end, placement, room, truncation_side) for body in bodies]
    return encoded


def encode_text_blocks(rows: Rows, tokenizer, *, max_length: int) -> Examples:
    """Plain language modelling: the lines as one text, cut into blocks of `max_length` tokens, the last one shorter.

    Every token is a target, no special token is added, and no input precedes. The text goes through the tokenizer in
    chunks of about a million characters, between lines.
    """
    pieces = [np.array(_tokenize(tokenizer, [chunk])[0], dtype=np.int32) for chunk in _join_lines(rows)]
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    if not len(ids):
        raise UserError(f"{rows.name} has no text")
    offsets = np.append(np.arange(0, len(ids), max_length, dtype=np.int64), len(ids))
    return Examples(ids, offsets, np.diff(offsets).astype(np.int32), False, functools.partial(_name_block, rows.name))


def special_ids(tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text: a BOS, a CLS, a SEP, or none."""
    probe = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = list(probe["input_ids"]), list(probe["special_tokens_mask"])
    if 0 in mask:
        return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)  # it has no token for "a"
    return [i for i in ids if i not in ends], [i for i in ids if i in ends]


def common_context(examples: Examples) -> np.ndarray:
    """The longest run of tokens that all contexts begin with: int32 [T], empty where there is none.

    Truncated rows do not count: what they share with the others may have been cut. A caller must look which of them
    begin with it all the same.
    """
    common = None
    for i in np.flatnonzero(~examples.is_truncated):
        context = examples.context_ids(i)
        common = context if common is None else common[: count_equal(common, context)]
        if not len(common):
            break
    return np.zeros(0, np.int32) if common is None else common


def token_statistics(examples: Examples) -> dict:
    """Counts for people: p50, p90, max and total of input, context (a part of it) and target tokens; inputs cut.

    `num_distinct_contexts` leaves the empty context out; `shared_context_tokens` is what all contexts begin with.
    """
    contexts = (examples.context_ids(i) for i in np.flatnonzero(examples.num_context))
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


def _end_ids(tokenizer) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or 'of the base'} has no end-of-sequence token to end targets "
            "with; name its eos_token in its tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def _tokenize_inputs(tokenizer, texts, placement, key, where, first) -> list[TokenPair]:
    """Both parts of every rendered input, without special tokens; `first` is the first one's row."""
    parts = [
        split_input(text, placement, key=key, where=functools.partial(where, index))
        for index, text in enumerate(texts, first)
    ]
    contexts, rests = ([part[side] for part in parts] for side in (0, 1))
    return list(zip(_tokenize(tokenizer, contexts), _tokenize(tokenizer, rests), strict=True))


def _tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    if not any(texts):  # as the contexts are under prefix: no need to ask
        return [[] for _ in texts]
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _frame(body: TokenPair, start: list[int], end: list[int], placement: str, room: int, side: str) -> TokenPair:
    """An input's parts, cut to `room` tokens together and put between the special tokens of a text."""
    context, rest = body
    excess = max(0, len(context) + len(rest) - room)
    cut = min(excess, len(context)) if len(context) > len(rest) else max(0, excess - len(rest))  # from the context
    has_context = bool(context)  # as written: the start does not move because a context was cut to nothing
    context, rest = _cut(context, len(context) - cut, side), _cut(rest, len(rest) - (excess - cut), side)
    if placement in ("infix", "decoder"):
        return start + context + end, []
    return (start + context, rest + end) if has_context else ([], start + rest + end)


def _cut(body: list[int], room: int, side: str) -> list[int]:
    assert side in ("left", "right"), side
    if side == "right":
        return body[:room]
    return body[len(body) - room :] if len(body) > room else body


def _label_index(text: str, labels: list[str], where: Callable[[], str], key: str) -> int:
    if text not in labels:
        raise UserError(f"{where()}: {key} is {text!r}, which data.labels does not list")
    return labels.index(text)


def _describe_long_target(where: str, key: str, tail: list[int], start: list[int], max_length: int) -> str:
    needs = f"{len(tail)} tokens" + (f" beside {len(start)} special ones" if start else "")
    return f"{where}: {key} is {needs}, more than data.max_length {max_length}; raise data.max_length or drop the row"


def _join_lines(rows: Rows) -> Iterator[str]:
    lines, size = [], 0
    for first in range(0, len(rows), BATCH_ROWS):
        for line in rows.dataset[first : first + BATCH_ROWS]["text"]:
            lines.append(line)
            size += len(line)
            if size >= CHUNK_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _name_block(name: str, index: int) -> str:
    return f"{name} block {index + 1} (the first is block 1)"
