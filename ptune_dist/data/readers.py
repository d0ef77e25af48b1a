"""Read text files of rows: one pass finds where each row begins, rows are parsed when asked for.

The loaders of `datasets` are not used for these, because they alter the data: ISO dates become timestamps, a CSV row
with one field too many is shifted by one column, a whole number in a column of fractions becomes a fraction, and no
error names a line. Here values are unchanged, and every error names the file and the line.
"""

import functools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ptune_dist.data.content import Content
from ptune_dist.data.delimited import CsvDialect, DelimitedIndex, decode_line, parse_fields
from ptune_dist.data.json_values import DECODER, has_half_surrogate, name_kind
from ptune_dist.data.json_whole import find_rows, is_chat, is_json_lines, not_json
from ptune_dist.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class TextTable:
    """The rows of a text file, of which only the offsets are in memory: 8 bytes a row.

    offsets: (rows + 1,) int64, where each row begins in `content`, and the end of the last. names: of all columns that
    occur, in order of appearance. parse: from text that begins with a row to the row. It can be pickled.
    """

    content: Content
    offsets: np.ndarray
    names: list[str]
    parse: Callable[[str], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Rows `first` up to `last`. Raises UserError if the file has changed."""
        bounds = self.offsets[first : last + 1].tolist()
        data = self.content.read(bounds[0], bounds[-1])
        try:
            return [
                self.parse(data[begin - bounds[0] : end - bounds[0]].decode("utf-8"))
                for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
            ]
        except (ValueError, StopIteration, RuntimeError):
            raise UserError(f"{self.content.name}: the file has changed since it was loaded") from None

    def first(self, count: int) -> "TextTable":
        return replace(self, offsets=self.offsets[: count + 1])

    def line_of(self, index: int) -> int | None:
        """The line on which a row begins; slow, because it counts line breaks. None if the file has become shorter."""
        return self.content.line_at(int(self.offsets[index]))


def open_table(path: Path, name: str, dialect: CsvDialect | None = None) -> TextTable:
    """Index a file with one of TEXT_SUFFIXES, perhaps compressed; errors refer to the file as `name`.

    A UTF-8 byte order mark is skipped. Blank lines are counted but are not rows, except in .txt files. Raises UserError
    for a file that cannot be read or a row that is damaged, with its line.
    """
    dialect = dialect or CsvDialect()
    is_delimited = Content(path, name).suffix in (".csv", ".tsv")
    content = Content(path, name, dialect.encoding if is_delimited else None)
    if is_delimited:
        index = DelimitedIndex(content, dialect)
        offsets = array("q", index.offsets())
        parse = functools.partial(parse_fields, header=index.header, options=index.options)
        return _table(content, offsets, index.header, parse)
    if content.suffix == ".txt":
        return _table(content, array("q", _index_text(content)), ["text"], parse_text)
    names: dict[str, None] = {}
    starts = _index_json(content, names) if content.suffix == ".json" else _index_json_lines(content, names)
    offsets = array("q", starts)
    return _table(content, offsets, list(names), parse_object)


def _table(content: Content, offsets: array, names: list[str], parse: Callable[[str], dict[str, Any]]) -> TextTable:
    offsets.append(content.size())
    return TextTable(content, np.frombuffer(offsets, np.int64), names, parse)


def parse_text(text: str) -> dict[str, Any]:
    """A line of plain text, with its line break as \\n."""
    return {"text": text[:-2] + "\n" if text.endswith("\r\n") else text}


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that this text begins with."""
    row, _ = DECODER.raw_decode(text.lstrip())
    return row


def _index_text(content: Content) -> Iterator[int]:
    has_text = False
    for number, (offset, line) in enumerate(content.lines(), 1):
        text = decode_line(line, content, number)
        has_text = has_text or bool(text.strip())
        if "\r" in text and not text.endswith("\n") and text.count("\r") > 1 and number == 1:
            raise UserError(
                f"{content.name}: lines end with a carriage return alone; save the file with Unix line ends"
            )
        yield offset
    if not has_text:
        raise UserError(f"{content.name} has no text")


def _index_json(content: Content, names: dict[str, None]) -> Iterator[int]:
    """The rows of a .json file: an array, an object that holds one, or one object on each line."""
    head = b""
    for number, (_, line) in enumerate(content.lines(), 1):
        head = decode_line(line, content, number).strip().encode()
        if head:
            break
    if head.startswith(b"[") or (head.startswith(b"{") and not _are_lines(head, content)):
        yield from _index_array(content, names)
    else:
        yield from _index_json_lines(content, names)


def _are_lines(head: bytes, content: Content) -> bool:
    """Whether a file that begins with `{` has one object on each line, and not one object that holds the rows."""
    try:
        row = DECODER.decode(head.decode())
    except (ValueError, RecursionError):
        more = (line.strip() for _, line in content.lines() if line.strip())
        return sum(1 for line, _ in zip(more, range(2), strict=False) if line.startswith(b"{")) == 2
    is_alone = sum(1 for _, line in content.lines() if line.strip()) == 1
    return not (is_alone and _holds_rows(row))


def _holds_rows(row: dict[str, Any]) -> bool:
    """Whether the only object of a file is no row: it has a list of objects, or its values are columns."""
    values = list(row.values())
    if any(isinstance(value, list) and value and all(isinstance(item, dict) for item in value) for value in values):
        return True
    return bool(values) and all(isinstance(value, (list, dict)) for value in values)


def _index_array(content: Content, names: dict[str, None]) -> Iterator[int]:
    """Offsets of rows that are found in the whole text, which is in memory meanwhile."""
    lines = enumerate(content.lines(), 1)
    text = "".join(decode_line(line, content, number) for number, (_, line) in lines)
    offset = content.start()
    counted = 0
    line = 1
    for position, row in find_rows(text, content.name):
        passed = text[counted:position]
        line += passed.count("\n")
        offset += len(passed.encode())
        counted = position
        _check_object(row, content.name, line, text, names)
        yield offset


def _index_json_lines(content: Content, names: dict[str, None]) -> Iterator[int]:
    for number, (offset, line) in enumerate(content.lines(), 1):
        if not line.strip():
            continue
        text = decode_line(line, content, number).strip()
        try:
            row = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise not_json(content.name, number, text, error) from None
        _check_object(row, content.name, number, text, names)
        yield offset


def _check_object(row: object, name: str, line: int, text: str, names: dict[str, None]) -> None:
    """Add a row's columns to `names`. Raises UserError for what is not a row."""
    if isinstance(row, dict) and row:
        for column in row:
            if column not in names:
                names[column] = None
        if has_half_surrogate(row, text):
            column = next(column for column, value in row.items() if has_half_surrogate({column: value}, text))
            raise UserError(
                f"{name} line {line}: column {column!r} contains half of a surrogate pair, which is not a character; "
                "write the character itself"
            )
        return
    if isinstance(row, list) and is_chat(row):
        raise UserError(
            f"{name} line {line}: a row must be a JSON object, and this is the list of a chat's messages: write "
            '{"messages": [...]}'
        )
    if isinstance(row, list) and is_json_lines(name):
        raise UserError(
            f"{name} line {line}: a row must be a JSON object, not a list; an array of rows is a .json file"
        )
    found = "an empty one" if row == {} else name_kind(row)
    raise UserError(f'{name} line {line}: a row must be a JSON object such as {{"text": "..."}}, not {found}')
