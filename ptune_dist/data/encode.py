"""Rows -> token ids. An example is its input followed by its target; only the target is supervised.

How an input is framed and what a target is depends on the family of the base and on the objective (`framing.py`).

An input is split where the virtual tokens stand, which `placement` says: what precedes them is its context, what
follows is the rest. Under prefix and encoder there is no context; under infix and decoder there is nothing else; under
template `{{ prompt }}` says where, and the two parts are tokenized separately. A prompt of keys and values alone leaves
the input's last token to the rest: it predicts the target's first one.
"""

import functools
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ptune_dist.config.prompt_text import Around
from ptune_dist.data.chat import Chat
from ptune_dist.data.examples import Examples, Part, join_parts
from ptune_dist.data.framing import Framing, Targets, check_ids, special_ids, tokenize, without_beginning, without_end
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import MARKER, Template, render_batches, split_input
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

    num_embeddings: the base's, where its tokenizer has ids beyond them, else None. needs_rest: the first token of the
    target is predicted from a token of the input, so the last one belongs to the rest even under infix. chat: the chat
    template that writes the rows, if one does. around: the texts around data.template. lead: the same text before every
    input, such as examples.
    """

    tokenizer: PreTrainedTokenizerBase
    framing: Framing
    targets: Targets
    max_length: int
    placement: str = "prefix"
    truncation_side: str = "left"
    num_embeddings: int | None = None
    needs_rest: bool = False
    chat: Chat | None = None
    around: Around = Around()
    lead: str = ""

    def count_kept(self, text: str) -> int:
        """The first tokens of a written input that are kept where it is cut: those of what every row begins with."""
        beginning = (self.lead + self.around.beginning).rstrip(" ")  # a space begins the next token
        if self.chat is not None and self.chat.wraps and (beginning or self.chat.earlier):
            beginning = self.chat.opening + beginning
        if not beginning or not text.startswith(beginning):
            return 0
        (ids,) = tokenize(self.tokenizer, [beginning.replace(MARKER, "")])
        return len(without_beginning(ids, self.specials[0]))

    @functools.cached_property
    def specials(self) -> TokenPair:
        """What the tokenizer puts before and after an input."""
        if self.framing.is_bare:
            return [], []
        start, end = special_ids(self.tokenizer)
        return start, end if self.framing.ends_input else []


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
    context. Too long an input loses tokens at `truncation_side`, but not its start or end, nor, at the left, a text
    that every row begins with (`count_kept`); a target loses none. Where an input has both parts, the longer one (of
    equals the rest) loses tokens first, all if need be, and only then the other: a short shared instruction outlives a
    long input. Raises UserError, with the row's line, for a target that is empty, does not fit or is of the wrong kind,
    for a row without a value, and for one without a single marker.
    """
    start, end = encoding.specials
    all_ids = array("i")
    counts = []
    numbers = []
    for first, inputs, texts in render_batches(
        rows, {template_key: template, target_key: target}, BATCH_ROWS, first_row, end_row
    ):
        inputs, texts = _wrap_in_turns(encoding.chat, inputs, texts, rows.where, first)
        inputs = [encoding.lead + text for text in inputs]
        bodies = _tokenize_inputs(encoding, inputs, template_key, rows.where, first)
        targets = encoding.targets.encode(texts, lambda index, first=first: rows.where(first + index), target_key)
        for index, (text, body, tail) in enumerate(zip(inputs, bodies, targets, strict=True), first):
            room = encoding.max_length - len(start) - len(end)
            if encoding.targets.takes_room:
                room -= len(tail.ids)
            if room < 0:
                where = rows.where(index)  # reads the file again, so for messages only
                raise UserError(_describe_long_target(where, target_key, tail.ids, start + end, encoding.max_length))
            context, rest = _frame(body, encoding, room, text)
            ids = context + rest + tail.ids
            check_ids(ids, encoding.num_embeddings, encoding.tokenizer, functools.partial(rows.where, index))
            all_ids.extend(ids)
            counts.append((len(ids), len(tail.ids), len(context), body.length > room))
            numbers.append(tail.number)
    lengths, num_targets, num_context, is_truncated = np.array(counts, dtype=np.int32).T.copy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    has_numbers = any(number is not None for number in numbers)
    return Examples(
        np.frombuffer(all_ids, np.int32),
        offsets,
        num_targets,
        is_truncated.astype(bool),
        rows.where,
        num_context,
        np.array(numbers, np.float64) if has_numbers else None,
    )


def _wrap_in_turns(
    chat: Chat | None, inputs: list[str], targets: list[str], where: Callable[[int], str], first: int
) -> tuple[list[str], list[str]]:
    """Inputs and targets as turns of a chat, where the encoding has one that wraps them."""
    if chat is None or not chat.wraps:
        return inputs, targets
    pairs = [
        chat.wrap(text, target, functools.partial(where, index))
        for index, (text, target) in enumerate(zip(inputs, targets, strict=True), first)
    ]
    return [text for text, _ in pairs], [target for _, target in pairs]


def encode_inputs(
    rows: Rows, encoding: Encoding, *, template: Template, template_key: str = "data.template"
) -> list[TokenPair]:
    """The inputs alone, each as (context, rest), as `encode_rows` makes them, of rows that need no target."""
    start, end = encoding.specials
    room = max(0, encoding.max_length - len(start) - len(end))
    encoded = []
    for first, inputs in render_batches(rows, {template_key: template}, BATCH_ROWS):
        if encoding.chat is not None and encoding.chat.wraps:
            inputs = [
                encoding.chat.wrap_input(text, functools.partial(rows.where, index))
                for index, text in enumerate(inputs, first)
            ]
        inputs = [encoding.lead + text for text in inputs]
        bodies = _tokenize_inputs(encoding, inputs, template_key, rows.where, first)
        for index, (text, body) in enumerate(zip(inputs, bodies, strict=True), first):
            context, rest = _frame(body, encoding, room, text)
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
    encode = functools.partial(encode_chunk, name=rows.name, tokenizer=tokenizer, num_embeddings=num_embeddings)
    blocks = cut_blocks(map(encode, join_lines(rows)), max_length, rows.name)
    return join_parts(blocks, functools.partial(name_block, rows.name))


def encode_chunk(text: str, *, name: str, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> np.ndarray:
    """The token ids of a chunk of plain text. Raises UserError for one that the base has no embedding of."""
    ids = np.array(tokenize(tokenizer, [text])[0], dtype=np.int32)
    if num_embeddings is not None and len(ids):
        beyond = int(np.argmax(ids >= num_embeddings))
        check_ids(ids[beyond : beyond + 1].tolist(), num_embeddings, tokenizer, lambda: name)
    return ids


def cut_blocks(pieces: Iterable[np.ndarray], max_length: int, name: str) -> Iterator[Part]:
    """The token ids of consecutive chunks as blocks. Raises UserError where there are none."""
    left = np.zeros(0, np.int32)
    is_empty = True
    for piece in pieces:
        left = np.concatenate([left, piece])
        end = len(left) // max_length * max_length
        if end:
            is_empty = False
            yield blocks_of(left[:end], max_length)
            left = left[end:]
    if len(left):
        yield blocks_of(left, max_length)
    elif is_empty:
        raise UserError(f"{name} has no text")


def blocks_of(ids: np.ndarray, max_length: int) -> Part:
    lengths = np.diff(np.append(np.arange(0, len(ids), max_length), len(ids))).astype(np.int32)
    return Part(ids, lengths, lengths, np.zeros(len(lengths), bool), np.zeros(len(lengths), np.int32), None)


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


def _frame(body: Body, encoding: Encoding, room: int, text: str) -> TokenPair:
    """An input's parts, cut to `room` tokens together and put between the special tokens of a text, which it has."""
    start, end = encoding.specials
    context, rest, has_context = body  # as written: the start does not move because a context was cut to nothing
    side = encoding.truncation_side
    excess = max(0, len(context) + len(rest) - room)
    from_context = min(excess, len(context)) if len(context) > len(rest) else max(0, excess - len(rest))
    kept = encoding.count_kept(text) if excess else 0
    context = _cut(context, len(context) - from_context, side, kept)
    rest = _cut(rest, len(rest) - (excess - from_context), side, 0 if has_context else kept)
    if encoding.placement in ("infix", "decoder"):
        framed = start + context + end, []
    else:
        framed = (start + context, rest + end) if has_context else ([], start + rest + end)
    if encoding.needs_rest and not framed[1]:
        return framed[0][:-1], framed[0][-1:]
    return framed


def _cut(body: list[int], room: int, side: str, kept: int) -> list[int]:
    """At most `room` tokens, the first `kept` among them."""
    assert side in ("left", "right"), side
    if side == "right":
        return body[:room]
    if len(body) <= room:
        return body
    kept = min(kept, room)
    return body[:kept] + body[len(body) - room + kept :]


def _describe_long_target(where: str, key: str, tail: list[int], start: list[int], max_length: int) -> str:
    needs = f"{len(tail)} tokens" + (f" beside {len(start)} special ones" if start else "")
    return f"{where}: {key} is {needs}, more than data.max_length {max_length}; raise data.max_length or drop the row"


def join_lines(rows: Rows, count: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """The text of all rows, in chunks of whole lines; `count` gets how many rows each has."""
    lines = []
    size = 0
    for first in range(0, len(rows), BATCH_ROWS):
        batch = rows.read(first, first + BATCH_ROWS)
        count(len(batch))
        for row in batch:
            lines.append(row["text"])
            size += len(row["text"])
            if size >= CHUNK_CHARACTERS:
                yield "".join(lines)
                lines = []
                size = 0
    if lines:
        yield "".join(lines)


def name_block(name: str, index: int) -> str:
    return f"{name} block {index + 1} (the first is block 1)"
