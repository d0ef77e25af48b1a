"""The rows of .csv and .tsv files: text fields under the names of a header, and what looks wrong about them."""

import contextlib
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ptune_dist.data.content import Content
from ptune_dist.data.numbers import read_number
from ptune_dist.errors import UserError

DELIMITED_SUFFIXES = (".csv", ".tsv")
SEPARATORS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
INDEX_COLUMN = "Unnamed: 0"  # the name that pandas gives to its own index when it reads it back


@dataclass(frozen=True)
class CsvDialect:
    """How a .csv or .tsv file is written; None is the default of its extension.

    header: True takes the first line as it is, a list names the columns of a file without a header.
    """

    delimiter: str | None = None
    quoting: str | None = None
    quotechar: str = '"'
    escapechar: str | None = None
    doublequote: bool = True
    skipinitialspace: bool | None = None
    encoding: str | None = None
    header: bool | list[str] | None = None

    def options(self, suffix: str) -> dict[str, Any]:
        """The arguments of csv.reader for a file with this extension."""
        quoting = self.quoting or ("none" if suffix == ".tsv" else "minimal")
        return {
            "delimiter": self.delimiter or ("\t" if suffix == ".tsv" else ","),
            "quoting": csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL,
            "quotechar": None if quoting == "none" else self.quotechar,
            "escapechar": self.escapechar,
            "doublequote": self.doublequote,
            "skipinitialspace": bool(self.skipinitialspace),
            "strict": True,
        }


def parse_fields(text: str, header: list[str], options: dict[str, Any]) -> dict[str, str]:
    """The row that this text begins with."""
    csv.field_size_limit(sys.maxsize)  # the standard library's default is 128 KB per field
    fields = next(csv.reader(io.StringIO(text, newline=""), **options))
    return dict(zip(header, fields, strict=True))


@dataclass
class _Place:
    """The lines that a csv reader has taken: how many, and where the next one begins."""

    line: int = 0
    offset: int = 0


class _Separators:
    """How often the one field of each row contains what separates fields elsewhere."""

    def __init__(self) -> None:
        self._counts: dict[str, int] | None = None
        self._num_rows = 0

    def count(self, field: str) -> None:
        self._num_rows += 1
        before = self._counts
        if before is None:
            self._counts = {separator: field.count(separator) for separator in ("\t", ";", "|") if separator in field}
        elif before:
            self._counts = {separator: count for separator, count in before.items() if field.count(separator) == count}

    def steady(self) -> list[str]:
        """Those that each of several rows contains equally often."""
        return list(self._counts or ()) if self._num_rows > 1 else []


class DelimitedIndex:
    """Reads a file once: `header`, and the offset of each row (from `offsets`). Raises UserError for what is wrong."""

    def __init__(self, content: Content, dialect: CsvDialect):
        self._content = content
        self._name = content.name
        self._dialect = dialect
        self._place = _Place()
        self._taken: list[str] = []
        self._separators = _Separators()
        self.options = dialect.options(content.suffix)
        self.header: list[str] = list(dialect.header) if isinstance(dialect.header, list) else []
        if self.header:
            self.header = self._check_names(self.header, "data.csv.header")

    def offsets(self) -> Iterator[int]:
        is_first = True
        for line, offset, fields, lines in self._records():
            self._check_spaces(fields, lines, line)
            if is_first and self.header == [field.strip() for field in fields]:  # names that data.csv.header gives
                raise UserError(
                    f"{self._name} line {line}: the first line is the names in data.csv.header: leave the key out, or "
                    "set data.csv.header=true"
                )
            is_first = False
            if not self.header:
                self.header = self._check_header(fields, line)
                continue
            self._check_fields(fields, line)
            if len(lines) > 1 and self._dialect.quoting is None:
                self._check_line_breaks(fields, lines, line)
            if len(self.header) == 1:
                self._separators.count(fields[0])
            yield offset
        if len(self.header) == 1 and self._dialect == CsvDialect(encoding=self._dialect.encoding):
            self._check_separators()

    def _check_separators(self) -> None:
        """Refuse a file of one column whose rows all contain another separator, as often in each."""
        for separator in self._separators.steady():
            raise UserError(
                f"{self._name}: the one column {self.header[0]!r} contains {SEPARATORS[separator]} equally often in "
                f"every row: set data.csv.delimiter={separator!r} if this is the separator, "
                f"data.csv.delimiter={self.options['delimiter']!r} if it is text"
            )

    def _check_spaces(self, fields: list[str], lines: list[str], line: int) -> None:
        """Refuse a field that would be a quoted one but for the space before its quote."""
        quote = self.options["quotechar"]
        if quote is None or self._dialect.skipinitialspace is not None:
            return
        spaced = [field for field in fields if field.startswith(" ") and field.lstrip(" ").startswith(quote)]
        if not spaced:
            return
        options = {**self.options, "skipinitialspace": True}
        try:
            others = next(csv.reader(lines, **options))
        except csv.Error as error:
            others = [] if "end of data" in str(error) else fields  # a quote in a text, or a field over several lines
        if [field.strip() for field in others] != [field.strip() for field in fields]:
            raise UserError(
                f"{self._name} line {line}: a space stands before a quote ({spaced[0][:40]!r}): set "
                "data.csv.skipinitialspace=true if the quotes enclose the field, false if they are part of its text"
            )

    def _check_line_breaks(self, fields: list[str], lines: list[str], line: int) -> None:
        """Refuse a record in which a quote has probably swallowed rows: a line inside a field would be a row itself.

        A file with one column is left alone, because every line would be a row of it.
        """
        if len(self.header) == 1:
            return
        parts: list[str] = []
        for index, field in enumerate(fields):
            pieces = field.split("\n")  # the first and the last share their lines with other fields
            if len(pieces) > 1:
                parts += pieces[0 if index == 0 else 1 : None if index == len(fields) - 1 else -1]
        if (
            all(self._count(text) == len(self.header) for text in lines)
            or any(len(self.header) in (self._count(part), self._count_tight(part)) for part in parts)
            or any(self._is_row(text) for text in lines[1:-1])
        ):
            raise UserError(
                f"{self._name} line {line}: a quote opens a field that runs over lines which look like rows; set "
                "data.csv.quoting=none if quotes are plain characters, data.csv.quoting=minimal if the field is right"
            )

    def _records(self) -> Iterator[tuple[int, int, list[str], list[str]]]:
        """Yield (line, offset, fields, lines) of each record that is not blank."""
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(self._lines(), **self.options)
        while True:
            line = self._place.line + 1
            offset = self._place.offset
            self._taken = []
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{self._name} line {line}: {self._explain(error)}") from None
            if fields:
                yield line, offset, fields, self._taken

    def _explain(self, error: csv.Error) -> str:
        if "new-line character" in str(error):
            return "a carriage return inside a field without quotes; save the file with Unix or Windows line ends"
        if "NUL" in str(error):
            return str(error)
        return f"{error}; write a quote inside a quoted field twice, or set data.csv.quoting=none"

    def _lines(self) -> Iterator[str]:
        self._place.offset = self._content.start()
        for offset, line in self._content.lines():
            self._place.line += 1
            self._place.offset = offset + len(line)
            text = decode_line(line, self._content, self._place.line)
            self._taken.append(text)
            yield text

    def _count(self, line: str) -> int:
        """The fields of a line where quotes are plain characters."""
        return line.count(self.options["delimiter"]) + 1

    def _count_tight(self, line: str) -> int:
        """As `_count`, of separators that no space follows: one after a word of a text has a space."""
        pieces = line.split(self.options["delimiter"])
        return 1 + sum(bool(piece) and not piece[0].isspace() for piece in pieces[1:])

    def _is_row(self, line: str) -> bool:
        """Whether a line is a row by itself, with its quotes."""
        with contextlib.suppress(csv.Error):
            return any(len(fields) == len(self.header) for fields in csv.reader([line], **self.options))
        return False

    def _check_fields(self, fields: list[str], line: int) -> None:
        if len(fields) != len(self.header):
            hint = (
                "a row cannot contain the separator or a line break unless data.csv.quoting=minimal"
                if self.options["quoting"] == csv.QUOTE_NONE
                else "put a field that contains the separator in double quotes"
            )
            for separator, word in SEPARATORS.items():
                if len(fields) == 1 and fields[0].count(separator) == len(self.header) - 1:
                    hint = f"it contains {word}: set data.csv.delimiter={separator!r} if this is the separator"
            raise UserError(
                f"{self._name} line {line}: {len(fields)} fields where the header has {len(self.header)}; {hint}"
            )
        if self._dialect.quoting is None and self.options["quoting"] == csv.QUOTE_NONE:
            for field in fields:
                if looks_quoted(field):
                    raise UserError(
                        f"{self._name} line {line}: a field is quoted ({field[:40]!r}), but .tsv has no quoting: "
                        "set data.csv.quoting=minimal to remove the quotes, data.csv.quoting=none to keep them"
                    )

    def _check_header(self, fields: list[str], line: int) -> list[str]:
        place = f"{self._name} line {line}"
        if len(fields) == 1 and self._dialect.delimiter is None:
            for separator, word in SEPARATORS.items():
                if separator in fields[0] and separator != self.options["delimiter"]:
                    raise UserError(
                        f"{place}: the header is one column, {fields[0][:60]!r}, and contains {word}: "
                        f"set data.csv.delimiter={separator!r} if this is the separator"
                    )
        if self._dialect.header is None:
            if any(read_number(field) is not None for field in fields) and not are_counted(fields):
                number = next(field for field in fields if read_number(field) is not None)
                raise UserError(
                    f"{place}: the header contains the number {number!r} and looks like a row; name the columns in "
                    "data.csv.header=[...] if there is no header, set data.csv.header=true if there is"
                )
            quoted = [field for field in fields if len(field) > 1 and field[0] == field[-1] == '"']
            if quoted and self._dialect.quoting is None:
                raise UserError(f"{place}: the header's names are quoted ({quoted[0]!r}): set data.csv.quoting=minimal")
        return self._check_names(fields, place)

    def _check_names(self, fields: list[str], place: str) -> list[str]:
        """Names without spaces at either end; a first one that is empty is the index that pandas writes."""
        names = [field.strip() for field in fields]
        if not names[0] and len(names) > 1:
            names[0] = INDEX_COLUMN
        for index, name in enumerate(names):
            if not name:
                raise UserError(f"{place}: column {index + 1} has no name in the header; name it")
            if name in names[:index]:
                raise UserError(f"{place}: the header names column {name!r} twice; rename one")
        return names


def decode_line(line: bytes, content: Content, number: int) -> str:
    """Raises UserError where a line is not UTF-8 or contains a NUL character."""
    if b"\0" in line:
        raise UserError(
            f"{content.name} line {number}: line contains NUL, as UTF-16 and binary files do; save the file as UTF-8"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{content.name} line {number}: these bytes are not UTF-8 text; save the file as UTF-8"
            f"{content.encoding_hint()}"
        ) from None


def looks_quoted(field: str) -> bool:
    """Whether a field is in quotes and has doubled ones inside, as writers with quoting do."""
    if len(field) < 4 or field[0] != '"' or field[-1] != '"':
        return False
    inside = field[1:-1]
    return '""' in inside and '"' not in inside.replace('""', "")


def are_counted(fields: list[str]) -> bool:
    """Whether the names are 0, 1, 2, ..., as pandas numbers columns, perhaps after its index."""
    names = fields if fields[0].strip() else fields[1:]
    return names == [str(number) for number in range(len(names))]
