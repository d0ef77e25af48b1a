"""Read .jsonl, .json, .csv, .tsv and .txt files row by row, each row with its line number.

The loaders of `datasets` are not used for these, because they alter the data: ISO dates become timestamps, a CSV row
with one field too many is shifted by one column, a column that first appears after 10 MB is an error, and no error
names a line. Here values are unchanged, and every error names the file and the line.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ptune_dist.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")

_BLANKS = re.compile(r"[ \t\r\n]*")


def read_records(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, row) for a file with one of TEXT_SUFFIXES; errors refer to the file as `name`.

    A UTF-8 byte order mark is skipped. Blank lines are counted but are not rows, except in .txt files.
    """
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".txt": _read_text}
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            yield from _read_delimited(path, name, "," if suffix == ".csv" else "\t")
        else:
            yield from readers[suffix](path, name)
    except UnicodeDecodeError:
        raise UserError(
            f"{name} line {_first_undecodable_line(path)}: these bytes are not UTF-8 text; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None


def _open(path: Path, newline: str | None = None) -> TextIO:
    return open(path, encoding="utf-8-sig", newline=newline)


def _first_undecodable_line(path: Path) -> int:
    number = 1
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def _read_text(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield number, {"text": line}


def _read_json(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    with _open(path) as file:
        head = file.read(1)
        while head.isspace():
            head = file.read(1)
    if head == "[":
        yield from _read_json_array(path, name)
    else:
        yield from _read_json_lines(path, name)


def _read_json_lines(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(name, number, line, error) from None
            yield number, _check_object(row, name, number)


def _read_json_array(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    """Rows of a JSON array, decoded one at a time so that each has its line number."""
    with _open(path) as file:
        text = file.read()
    decoder = json.JSONDecoder()
    position = _skip_blanks(text, text.index("[") + 1)
    line = 1
    counted = 0  # `line` counts the line breaks before this position
    is_closed = text.startswith("]", position)
    while not is_closed:
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            bad_line = getattr(error, "lineno", line)
            bad_text = text[getattr(error, "pos", position) :]
            raise _not_json(name, bad_line, bad_text, error) from None
        yield line, _check_object(row, name, line)
        position = _skip_blanks(text, end)
        is_closed = text.startswith("]", position)
        if not is_closed:
            if not text.startswith(",", position):
                raise _misplaced(name, text, position, "where ',' or ']' should follow a row")
            position = _skip_blanks(text, position + 1)
    position = _skip_blanks(text, position + 1)
    if position < len(text):
        raise _misplaced(name, text, position, "after the end of the array")


def _misplaced(name: str, text: str, position: int, place: str) -> UserError:
    line = 1 + text.count("\n", 0, position)
    return UserError(f"{name} line {line}: not JSON: found {_excerpt(text[position:])} {place}")


def _skip_blanks(text: str, position: int) -> int:
    blanks = _BLANKS.match(text, position)
    assert blanks is not None  # the pattern matches the empty string too
    return blanks.end()


def _excerpt(text: str) -> str:
    if not text.strip():
        return "the end of the file"
    line = text.strip().split("\n", 1)[0]
    return repr(line if len(line) <= 40 else line[:37] + "...")


def _not_json(name: str, line: int, text: str, error: Exception) -> UserError:
    reason = getattr(error, "msg", None) or "it is nested too deeply"
    shape = "one object on each line" if Path(name).suffix.lower() == ".jsonl" else "an array of objects"
    return UserError(f"{name} line {line}: not JSON ({reason}), found {_excerpt(text)}; the file must contain {shape}")


def _check_object(row: object, name: str, line: int) -> dict:
    if isinstance(row, dict) and row:
        return row
    if isinstance(row, list) and Path(name).suffix.lower() == ".jsonl":
        raise UserError(
            f"{name} line {line}: a row must be a JSON object, not a list; an array of rows is a .json file"
        )
    found = "an empty one" if row == {} else name_kind(row)
    raise UserError(f'{name} line {line}: a row must be a JSON object such as {{"text": "..."}}, not {found}')


def name_kind(value: object) -> str:
    """The type of a JSON value in words; integers and floats are one type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"


def _read_delimited(path: Path, name: str, delimiter: str) -> Iterator[tuple[int, dict]]:
    """Rows of text fields, keyed by the header's names; a row's line is the one on which it begins."""
    csv.field_size_limit(sys.maxsize)  # the standard library's default is 128 KB per field
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = "" if "NUL" in str(error) else "; write a quote inside a quoted field twice"
                raise UserError(f"{name} line {line}: {error}{hint}") from None
            if not fields:
                continue
            if header is None:
                header = _check_header(fields, name, line)
            elif len(fields) != len(header):
                raise UserError(
                    f"{name} line {line}: {len(fields)} fields where the header has {len(header)}; "
                    "put a field that contains the separator in double quotes"
                )
            else:
                yield line, dict(zip(header, fields, strict=True))


def _check_header(fields: list[str], name: str, line: int) -> list[str]:
    for index, field in enumerate(fields):
        if not field.strip():
            raise UserError(f"{name} line {line}: column {index + 1} has no name in the header; name it")
        if field in fields[:index]:
            raise UserError(f"{name} line {line}: the header names column {field!r} twice; rename one")
    return fields
