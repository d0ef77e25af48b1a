"""Read .jsonl, .json, .csv, .tsv and .txt row by row, each row with its line number.

These are read here and not by the loaders of `datasets`, because those change what the file says: ISO dates become
timestamps, a CSV row with one field too many moves all its fields one column to the left, a column that first appears
after 10 MB is an error, and no error names a line. Values pass unchanged and every error names file and line.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ptune_dist.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")

_BLANKS = re.compile(r"[ \t\r\n]*")


def read_records(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, row) for a file with one of TEXT_SUFFIXES; `name` is what errors call the file.

    A UTF-8 byte order mark is skipped, blank lines are no rows (but are counted) except in .txt.
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


def _open(path: Path, newline: str | None = None):
    return open(path, encoding="utf-8-sig", newline=newline)


def _first_undecodable_line(path: Path) -> int:
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
    yield from (_read_json_array if head == "[" else _read_json_lines)(path, name)


def _read_json_lines(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(name, number, line, error) from None
            yield number, _checked_object(row, name, number)


def _read_json_array(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    """Rows of one array, decoded one after the other so that each has its line."""
    with _open(path) as file:
        text = file.read()
    decoder, position = json.JSONDecoder(), _skip_blanks(text, text.index("[") + 1)
    line, counted = 1, 0
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(
                name, getattr(error, "lineno", line), text[getattr(error, "pos", position) :], error
            ) from None
        yield line, _checked_object(row, name, line)
        position = _skip_blanks(text, end)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            raise _misplaced(name, text, position, "where ',' or ']' should follow a row")
        if not closed:
            position = _skip_blanks(text, position + 1)
    position = _skip_blanks(text, position + 1)
    if position < len(text):
        raise _misplaced(name, text, position, "after the end of the array")


def _misplaced(name: str, text: str, position: int, place: str) -> UserError:
    line = 1 + text.count("\n", 0, position)
    return UserError(f"{name} line {line}: not JSON: found {_excerpt(text[position:])} {place}")


def _skip_blanks(text: str, position: int) -> int:
    return _BLANKS.match(text, position).end()


def _excerpt(text: str) -> str:
    if not text.strip():
        return "the end of the file"
    line = text.strip().split("\n", 1)[0]
    return repr(line if len(line) <= 40 else line[:37] + "...")


def _not_json(name: str, line: int, text: str, error: Exception) -> UserError:
    reason = getattr(error, "msg", None) or "it is nested too deeply"
    shape = "one object on each line" if Path(name).suffix.lower() == ".jsonl" else "an array of objects"
    return UserError(f"{name} line {line}: not JSON ({reason}), found {_excerpt(text)}; the file must hold {shape}")


def _checked_object(row: object, name: str, line: int) -> dict:
    if isinstance(row, dict) and row:
        return row
    if isinstance(row, list) and Path(name).suffix.lower() == ".jsonl":
        raise UserError(
            f"{name} line {line}: a row must be a JSON object, not a list; an array of rows is a .json file"
        )
    found = "an empty one" if row == {} else name_kind(row)
    raise UserError(f'{name} line {line}: a row must be a JSON object such as {{"text": "..."}}, not {found}')


def name_kind(value: object) -> str:
    """The kind of a JSON value in words; whole numbers and fractions are one kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


def _read_delimited(path: Path, name: str, delimiter: str) -> Iterator[tuple[int, dict]]:
    """Rows of text fields, the header's names as keys; the line is the one on which the row begins."""
    csv.field_size_limit(sys.maxsize)  # the standard library stops at 128 KB a field
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, line = None, 1
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = "" if "NUL" in str(error) else "; a quote inside a quoted field is written twice"
                raise UserError(f"{name} line {line}: {error}{hint}") from None
            if not fields:
                continue
            if header is None:
                header = _checked_header(fields, name, line)
            elif len(fields) != len(header):
                raise UserError(
                    f"{name} line {line}: {len(fields)} fields where the header has {len(header)}; "
                    "put a field that holds the separator in double quotes"
                )
            else:
                yield line, dict(zip(header, fields, strict=True))


def _checked_header(fields: list[str], name: str, line: int) -> list[str]:
    for index, field in enumerate(fields):
        if not field.strip():
            raise UserError(f"{name} line {line}: column {index + 1} has no name in the header; name it")
        if field in fields[:index]:
            raise UserError(f"{name} line {line}: the header names column {field!r} twice; rename one")
    return fields
