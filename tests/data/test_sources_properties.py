"""Random rows in every format, encoding and compression: read back equal, or one line names the file.

The values are those that people have: texts with quotes, separators and every kind of line break, nested values,
numbers in the form in which they were written, dates, nulls and missing keys.
"""

import csv
import encodings.aliases
import io
import json
import re
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ptune_dist.config.sections import CsvConfig
from ptune_dist.data.json_values import dump_json
from ptune_dist.data.recoding import read_utf8
from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError
from tests.data.test_sources_kinds import JSON_ROWS, PACKERS, TEXTS, load


def write_object(items: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"


FEW = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY = settings(FEW, max_examples=5000)
PACKED = st.sampled_from(["", *PACKERS])
UTF8 = st.sampled_from(["utf-8", "utf-8-sig"])
ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "cp1252",
    "latin-1",
    "shift_jis",
    "gb18030",
]
# A number as somebody wrote it, which is what a template gets.
NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?", fullmatch=True)
LITERALS = st.recursive(
    NUMBERS | st.sampled_from(["null", "true", "false"]) | TEXTS.map(json.dumps),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(TEXTS.map(json.dumps), inner, max_size=3).map(write_object)
    ),
    max_leaves=6,
)


def pack(content: bytes, suffix: str) -> bytes:
    return PACKERS[suffix](content) if suffix else content


def read_or_refuse(folder, name: str, content: bytes, **dialect) -> tuple[Rows, list[dict[str, Any]]] | str:
    """The rows, or the one line that refuses them, which names the file."""
    try:
        rows = load(folder, name, content, **dialect)
        return rows, rows.read(0, len(rows))
    except UserError as error:
        assert "\n" not in str(error) and name in str(error), str(error)
        return str(error)


def read_all(folder, name: str, content: bytes, **dialect) -> list[dict[str, Any]]:
    """The rows, which must be the same one by one."""
    found = read_or_refuse(folder, name, content, **dialect)
    assert not isinstance(found, str), found
    rows, values = found
    assert [rows.read(i, i + 1)[0] for i in range(len(rows))] == values
    return values


# JSON


def check_written_json(folder, rows: list[dict[str, str]], encoding: str, packed: str, line_end: str):
    lines = [write_object(row) for row in rows]
    for name, text in (("a.jsonl", line_end.join(lines)), ("a.json", f"[{line_end}{f',{line_end}'.join(lines)}]")):
        found = read_all(folder, name + packed, pack(text.encode(encoding), packed))
        assert [dump_json(row) for row in found] == lines


WRITTEN_JSON = {
    "rows": st.lists(st.dictionaries(TEXTS.map(json.dumps), LITERALS, min_size=1, max_size=4), min_size=1, max_size=4),
    "encoding": UTF8,
    "packed": PACKED,
    "line_end": st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"]),
}


@FEW
@given(**WRITTEN_JSON)
def test_json_has_every_value_as_it_is_written(tmp_path, rows, encoding, packed, line_end):
    check_written_json(tmp_path, rows, encoding, packed, line_end)


@pytest.mark.extended
@MANY
@given(**WRITTEN_JSON)
def test_json_has_every_value_as_it_is_written_many_times(tmp_path, rows, encoding, packed, line_end):
    check_written_json(tmp_path, rows, encoding, packed, line_end)


def check_json_lines_with_odd_ends(folder, rows, line_end: str):
    """Lines end at \\n alone; a writer that ends them otherwise is told so, and no row is lost."""
    content = line_end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = read_or_refuse(folder, "a.jsonl", content.encode())
    if isinstance(found, str):
        assert len(rows) > 1 and "a.jsonl line " in found
    else:
        assert [dump_json(row) for row in found[1]] == [json.dumps(row) for row in rows]


@FEW
@given(JSON_ROWS, st.sampled_from(["\r", "\u2028", "\u2029", "\x85", "\x0b", "\x0c"]))
def test_json_lines_that_end_oddly_are_refused_and_never_lost(tmp_path, rows, line_end):
    check_json_lines_with_odd_ends(tmp_path, rows, line_end)


# Plain text


def check_text(folder, text: str, encoding: str, packed: str):
    found = read_or_refuse(folder, "a.txt" + packed, pack(text.encode(encoding), packed))
    if isinstance(found, str):
        is_one_line = "\n" not in text.partition("\n")[0] and text.partition("\n")[0].count("\r") > 1
        assert not text.strip() or "\0" in text or is_one_line, found
        return
    assert "".join(row["text"] for row in found[1]) == text.replace("\r\n", "\n")
    assert all(row["text"].count("\n") <= 1 for row in found[1])


PLAIN = {"text": st.text(TEXTS | st.sampled_from(["\n", "\r\n", "\r"])), "encoding": UTF8, "packed": PACKED}
PLAIN["text"] = st.lists(TEXTS | st.sampled_from(["\n", "\r\n", "\r"]), max_size=8).map("".join)


@FEW
@given(**PLAIN)
def test_plain_text_is_read_whole(tmp_path, text, encoding, packed):
    check_text(tmp_path, text, encoding, packed)


@pytest.mark.extended
@MANY
@given(**PLAIN)
def test_plain_text_is_read_whole_many_times(tmp_path, text, encoding, packed):
    check_text(tmp_path, text, encoding, packed)


# CSV and TSV


def encodable(text: str, encoding: str) -> str:
    """What an encoding has of a text; latin-1 without the control characters that cp1252 has letters for."""
    kept = text.encode(encoding, "ignore").decode(encoding)
    return re.sub("[\x80-\x9f]", "", kept) if encoding == "latin-1" else kept


def looks_like_utf8(content: str, encoding: str) -> bool:
    """Whether text of another encoding has a line that happens to be UTF-8 as well, such as "Ã©" in cp1252."""
    lines = content.encode(encoding).split(b"\n")
    return not encoding.startswith("utf") and any(not line.isascii() and read_utf8(line) for line in lines)


def check_dialect(folder, rows: list[list[str]], suffix: str, dialect: dict[str, Any], encoding: str, packed: str):
    own = {"delimiter": dialect["delimiter"], "quotechar": dialect["quotechar"]}
    if dialect["escapechar"]:
        own |= {"escapechar": dialect["escapechar"], "doublequote": dialect["doublequote"]}
    rows = [[encodable(field, encoding) for field in row] for row in rows]
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=dialect["line_end"], quoting=dialect["quoting"], **own)
    writer.writerows([["first", "second"], *rows])
    assume(not looks_like_utf8(file.getvalue(), encoding))
    content = pack(file.getvalue().encode(encoding), packed)
    found = read_all(folder, "a" + suffix + packed, content, quoting="minimal", encoding=encoding, **own)
    assert [list(row.values()) for row in found] == rows


# Python's writer leaves a carriage return without quotes where lines end with \n: nothing tells it from a line end.
FIELDS = TEXTS.map(lambda text: text.replace("\0", "").replace("\r", "\r\n"))
DIALECTS = {
    "rows": st.lists(st.lists(FIELDS, min_size=2, max_size=2), min_size=1, max_size=4),
    "suffix": st.sampled_from([".csv", ".tsv"]),
    "dialect": st.fixed_dictionaries(
        {
            "delimiter": st.sampled_from([",", ";", "\t", "|", "é"]),
            "quotechar": st.sampled_from(['"', "'"]),
            "escapechar": st.sampled_from([None, "\\"]),
            "doublequote": st.booleans(),
            "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
            "line_end": st.sampled_from(["\n", "\r\n"]),
        }
    ),
    "encoding": st.sampled_from(ENCODINGS),
    "packed": PACKED,
}


@FEW
@given(**DIALECTS)
def test_every_dialect_and_encoding_is_read_back(tmp_path, rows, suffix, dialect, encoding, packed):
    assume(encodable(dialect["delimiter"], encoding))
    check_dialect(tmp_path, rows, suffix, dialect, encoding, packed)


@pytest.mark.extended
@MANY
@given(**DIALECTS)
def test_every_dialect_and_encoding_is_read_back_many_times(tmp_path, rows, suffix, dialect, encoding, packed):
    assume(encodable(dialect["delimiter"], encoding))
    check_dialect(tmp_path, rows, suffix, dialect, encoding, packed)


@pytest.mark.parametrize(
    "encoding, written, wrong",
    [
        ("utf-16", "utf-16-be", b"\xd8\x00"),  # big-endian, which only the first bytes of the file tell
        ("utf-16", "utf-16-le", b"\x00\xd8"),
        ("utf-16-be", "utf-16-be", b"\xd8\x00"),
        ("utf-32", "utf-32-be", b"\xff\xff\xff\xff"),
        ("utf-8-sig", "utf-8", b"\x81"),
        ("cp1252", "cp1252", b"\x81"),
        ("shift_jis", "shift_jis", b"\x81\n"),
    ],
)
def test_a_byte_that_is_no_text_far_into_the_file_is_named_with_its_line(tmp_path, encoding, written, wrong):
    num_lines = (1 << 20) // 8
    content = ("\ufeff" if encoding.startswith(("utf-16", "utf-32")) else "") + "a,é\n" * num_lines
    damaged = content.encode(written, "ignore") + wrong + "\n".encode(written)
    found = read_or_refuse(tmp_path, "a.csv", damaged, encoding=encoding)
    assert f"a.csv line {num_lines + 1}: these bytes are not {encoding} text" in found


def test_every_text_encoding_of_python_is_read_or_refused_in_one_line(tmp_path):
    for encoding in sorted(set(encodings.aliases.aliases.values())):
        try:
            CsvConfig(encoding=encoding)
        except ValueError as error:
            assert "data.csv.encoding" in str(error), encoding
            continue
        for content in (b"a,b\n1,2\n", b"a,\xff\x00\xd8", b"\xfe\xff", b"\\x,\\N{1}", b"+-,2\n"):
            read_or_refuse(tmp_path, "a.csv", content, encoding=encoding)


def check_plain_fields(folder, rows: list[list[str]], name: str):
    """Without quoting, as most .tsv files are written: no row is lost, and a quote is a character or is asked about."""
    separator = "\t" if name.endswith(".tsv") else ","
    lines = [["first", "second"], *rows]
    content = "".join(separator.join(fields) + "\n" for fields in lines).encode()
    found = read_or_refuse(folder, name, content)
    if isinstance(found, str):
        assert '"' in str(rows) or "\r" in str(rows) or "\\r" in str(rows) or "\0" in str(rows) or "\\x00" in str(rows)
        return
    if name.endswith(".tsv") or '"' not in content.decode():
        assert [list(row.values()) for row in found[1]] == [[field for field in row] for row in rows]
    else:
        assert len(found[1]) <= len(rows)


ONE_LINE_FIELDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n,\r") | st.sampled_from('"" \u2028')),
    min_size=2,
    max_size=2,
)


@FEW
@given(st.lists(ONE_LINE_FIELDS, min_size=1, max_size=6), st.sampled_from(["a.tsv", "a.csv"]))
def test_fields_without_quoting_lose_no_row(tmp_path, rows, name):
    check_plain_fields(tmp_path, rows, name)


@pytest.mark.extended
@MANY
@given(st.lists(ONE_LINE_FIELDS, min_size=1, max_size=6), st.sampled_from(["a.tsv", "a.csv"]))
def test_fields_without_quoting_lose_no_row_many_times(tmp_path, rows, name):
    check_plain_fields(tmp_path, rows, name)


# Parquet

COLUMN_NAMES = TEXTS.map(lambda text: text.replace("\0", "")).filter(bool)  # Arrow ends a name at a NUL
SCALARS: dict[pa.DataType, st.SearchStrategy] = {
    pa.string(): TEXTS,
    pa.large_string(): TEXTS,
    pa.int8(): st.integers(-128, 127),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.float32(): st.floats(allow_nan=False, width=32),
    pa.bool_(): st.booleans(),
    pa.date32(): st.dates(date(1, 1, 1), date(9999, 12, 31)),
    pa.timestamp("us"): st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1)),
    pa.duration("us"): st.timedeltas(timedelta(days=-9999), timedelta(days=9999)),
    pa.decimal128(20, 4): st.integers(-(10**16), 10**16).map(lambda n: Decimal(n) / 10000),
    pa.binary(): st.binary(max_size=8),
}


def make_struct(fields: dict[str, pa.DataType]) -> pa.DataType:
    return pa.struct(list(fields.items()))


COLUMN_TYPES = st.recursive(
    st.sampled_from(list(SCALARS)),
    lambda inner: (
        inner.map(pa.list_) | st.dictionaries(st.sampled_from("xyz"), inner, min_size=1, max_size=2).map(make_struct)
    ),
    max_leaves=3,
)


def values_of(kind: pa.DataType) -> st.SearchStrategy:
    """Values of an Arrow type, null among them."""
    if pa.types.is_list(kind):
        return st.none() | st.lists(values_of(kind.value_type), max_size=3)
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return st.fixed_dictionaries({field.name: values_of(field.type) for field in fields})
    return st.none() | SCALARS[kind]


@st.composite
def tables(draw) -> pa.Table:
    count = draw(st.integers(1, 4))
    kinds = draw(st.dictionaries(COLUMN_NAMES, COLUMN_TYPES, min_size=1, max_size=4))
    columns = {
        name: pa.array(draw(st.lists(values_of(kind), min_size=count, max_size=count)), kind)
        for name, kind in kinds.items()
    }
    return pa.table(columns)


def check_parquet(folder, table: pa.Table):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    found = read_all(folder, "a.parquet", buffer.getvalue())
    kinds = [field.type for field in table.schema]
    for row, expected in zip(found, table.to_pylist(), strict=True):
        assert list(row) == list(expected)
        for kind, value, written in zip(kinds, row.values(), expected.values(), strict=True):
            assert pa.array([value], kind).to_pylist() == [written]
            assert "float" in str(kind) or value == written


@settings(FEW, max_examples=8)
@given(tables())
def test_parquet_rows_are_read_back(tmp_path, table):
    check_parquet(tmp_path, table)


@pytest.mark.extended
@MANY
@given(tables())
def test_parquet_rows_are_read_back_many_times(tmp_path, table):
    check_parquet(tmp_path, table)


# Damage

SAMPLES: dict[str, bytes] = {
    "a.jsonl": '{"text": "é\u2028", "n": 1.50}\n{"text": "b", "x": [null, {"y": 1e3}]}\r\n'.encode(),
    "a.json": '[{"text": "é", "n": 1},\n {"text": "b"}]'.encode(),
    "b.json": '{"data": [{"text": "é"}, {"text": "b"}]}'.encode(),
    "a.csv": 'text,label\n"é, ""b""",1\nc,2\n'.encode(),
    "a.tsv": 'text\tlabel\né"\t1\nc\t2\n'.encode(),
    "a.txt": "é\nb\n".encode(),
}


@st.composite
def damaged_files(draw) -> tuple[str, bytes]:
    """A file after its bytes were cut, moved or overwritten, before or after its compression."""
    name = draw(st.sampled_from(list(SAMPLES)))
    packed = draw(PACKED)
    content = SAMPLES[name]
    if draw(st.booleans()):
        content = damage(draw, content)
    content = pack(content, packed)
    if draw(st.booleans()):
        content = damage(draw, content)
    return name + packed, content


def damage(draw, content: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 6)) :]
    return content


@FEW
@given(damaged_files())
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, file):
    read_or_refuse(tmp_path, *file)


@pytest.mark.extended
@MANY
@given(damaged_files())
def test_a_damaged_file_is_read_or_refused_in_one_line_many_times(tmp_path, file):
    read_or_refuse(tmp_path, *file)
