"""Rows -> token ids. An example is its input followed by its target; the target alone is supervised.

What stands between depends on the family of the base: a causal one reads on from input to target; seq2seq and encoder
bases read an input that is ended as their tokenizer ends a text. An encoder's target is one number, that of a label.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ptune_dist.data.sources import Rows
from ptune_dist.data.template import Template, render_row
from ptune_dist.errors import UserError

BATCH_ROWS = 1000
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Examples:
    """Token ids of all examples, end to end: 4 bytes a token.

    ids: int32 [sum of lengths]. offsets: int64 [N + 1], where each example begins. num_targets: int32 [N], how many of
    its last tokens are its target. num_truncated: examples whose input lost tokens. where: index -> name for messages.
    lengths: int64 [N], input and target tokens.
    """

    ids: np.ndarray
    offsets: np.ndarray
    num_targets: np.ndarray
    num_truncated: int
    where: Callable[[int], str]
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))

    def __len__(self) -> int:
        return len(self.num_targets)

    @property
    def widths(self) -> np.ndarray:
        """[N, 2]: tokens of each example's input and of its target."""
        return np.stack([self.lengths - self.num_targets, self.num_targets], axis=1)

    def input_ids(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1] - self.num_targets[index]]

    def target_ids(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index + 1] - self.num_targets[index] : self.offsets[index + 1]]

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
    template_key: str = "data.template",
    target_key: str = "data.target",
) -> Examples:
    """Encode every row to at most `max_length` tokens of input and target together.

    The input starts as the tokenizer starts a text (a BOS, say); a causal base's does not end as it ends one: nothing
    stands between input and target. Too long an input loses tokens at `truncation_side`, but not its start or end; a
    target loses none. Raises UserError, with the row's line, for a target that is empty, does not fit or is none of an
    encoder's `labels`, and for a row without a value.
    """
    start, end = special_ids(tokenizer)
    before = start if family == "seq2seq" else []  # a decoder's own text begins as any text does
    end = [] if family == "causal" else end
    pieces, lengths, num_targets, num_truncated = [], [], [], 0
    closing = _end_ids(tokenizer) if append_eos and family != "encoder" else []
    for first, inputs, targets in _render_batches(rows, {template_key: template, target_key: target}):
        bodies, tails = _tokenize(tokenizer, inputs), _tokenize(tokenizer, targets)
        for index, (body, tail, text) in enumerate(zip(bodies, tails, targets, strict=True), first):
            if not text.strip() or not tail:
                raise UserError(f"{rows.where(index)}: {target_key} is empty for this row; fill it or drop the row")
            if family == "encoder":
                tail = [_label_index(text.strip(), labels, rows.where(index), target_key)]
            else:
                tail = before + tail + closing
            room = max_length - len(start) - len(end) - (len(tail) if family != "encoder" else 0)
            if room < 0:
                raise UserError(_describe_long_target(rows.where(index), target_key, tail, start + end, max_length))
            num_truncated += len(body) > room
            pieces.append(np.array(start + _cut(body, room, truncation_side) + end + tail, dtype=np.int32))
            lengths.append(len(pieces[-1]))
            num_targets.append(len(tail))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Examples(np.concatenate(pieces), offsets, np.array(num_targets, np.int32), num_truncated, rows.where)


def encode_inputs(
    rows: Rows,
    tokenizer,
    *,
    template: Template,
    max_length: int,
    family: str = "causal",
    truncation_side: str = "left",
    template_key: str = "data.template",
) -> list[list[int]]:
    """The inputs alone, as `encode_rows` makes them, of rows that need no target."""
    start, end = special_ids(tokenizer)
    end = [] if family == "causal" else end
    room = max(0, max_length - len(start) - len(end))
    encoded = []
    for _, inputs in _render_batches(rows, {template_key: template}):
        encoded += [start + _cut(body, room, truncation_side) + end for body in _tokenize(tokenizer, inputs)]
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
    return Examples(ids, offsets, np.diff(offsets).astype(np.int32), 0, functools.partial(_name_block, rows.name))


def special_ids(tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text: a BOS, a CLS, a SEP, or none."""
    probe = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = list(probe["input_ids"]), list(probe["special_tokens_mask"])
    if 0 in mask:
        return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)  # it has no token for "a"
    return [i for i in ids if i not in ends], [i for i in ids if i in ends]


def token_statistics(examples: Examples) -> dict:
    """Counts for people: p50, p90, max and total of input and of target tokens, and how many inputs were cut."""
    return {
        "num_examples": len(examples),
        "input_tokens": _spread(examples.lengths - examples.num_targets),
        "target_tokens": _spread(examples.num_targets),
        "num_truncated": examples.num_truncated,
        "truncated_share": examples.truncated_share,
    }


def _spread(counts: np.ndarray) -> dict[str, int]:
    p50, p90 = np.percentile(counts, [50, 90], method="inverted_cdf")
    return {"p50": int(p50), "p90": int(p90), "max": int(counts.max()), "total": int(counts.sum(dtype=np.int64))}


def _end_ids(tokenizer) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or 'of the base'} has no end-of-sequence token to end targets "
            "with; name its eos_token in its tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def _render_batches(rows: Rows, templates: dict[str, Template]) -> Iterator[tuple]:
    """Yield (index of the first row, texts of the first template, texts of the second, ...), 1000 rows at a time."""
    used = {column for template in templates.values() for column in template.columns}
    dataset = rows.dataset.select_columns([column for column in rows.columns() if column in used])
    for first in range(0, len(rows), BATCH_ROWS):
        count = min(BATCH_ROWS, len(rows) - first)
        columns = dataset[first : first + count] if used else {}
        batch = [{column: values[i] for column, values in columns.items()} for i in range(count)]
        yield (
            first,
            *(
                [_render(rows, template, key, row, index) for index, row in enumerate(batch, first)]
                for key, template in templates.items()
            ),
        )


def _render(rows: Rows, template: Template, key: str, row: dict, index: int) -> str:
    return render_row(template, row, key=key, where=functools.partial(rows.where, index))


def _tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _cut(body: list[int], room: int, side: str) -> list[int]:
    assert side in ("left", "right"), side
    if side == "right":
        return body[:room]
    return body[len(body) - room :] if len(body) > room else body


def _label_index(text: str, labels: list[str], where: str, key: str) -> int:
    if text not in labels:
        raise UserError(f"{where}: {key} is {text!r}, which data.labels does not list")
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
