"""Kinds of text files that people bring: read exactly, or refused in one line that names the file and the line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptune_dist.config.schema import DataConfig
from ptune_dist.config.sections import CsvConfig
from ptune_dist.data.delimited import CsvDialect
from ptune_dist.data.json_values import dump_json
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.data.split_rows import check_csv_keys
from ptune_dist.errors import UserError

PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def load(folder, name: str, content: str | bytes, **dialect) -> Rows:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_rows(str(path), key="data.train", default_split="train", csv=CsvDialect(**dialect))


def read(folder, name: str, content: str | bytes, **dialect) -> list[dict]:
    rows = load(folder, name, content, **dialect)
    return rows.read(0, len(rows))


def error_of(folder, name: str, content: str | bytes, **dialect) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, name, content, **dialect)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message


def test_tsv_quotes_are_plain_unless_asked(tmp_path):
    content = 'text\tlabel\n"hi\tx\nbye\ty\n"so\tz\n'
    assert [row["text"] for row in read(tmp_path, "a.tsv", content)] == ['"hi', "bye", '"so']
    quoted = 'text\tlabel\n"say ""hi"""\tx\n'
    assert "data.csv.quoting=minimal" in error_of(tmp_path, "b.tsv", quoted)
    assert read(tmp_path, "b.tsv", quoted, quoting="minimal") == [{"text": 'say "hi"', "label": "x"}]
    assert read(tmp_path, "b.tsv", quoted, quoting="none") == [{"text": '"say ""hi"""', "label": "x"}]


def test_csv_quote_that_swallows_rows_is_refused(tmp_path):
    content = 'text,label\na,1\nb,"2\nc,3\nd,4"\ne,5\n'
    assert "line 3: a quote opens a field that runs over lines" in error_of(tmp_path, "a.csv", content)
    assert len(read(tmp_path, "a.csv", content, quoting="none")) == 5
    assert len(read(tmp_path, "a.csv", content, quoting="minimal")) == 3


@pytest.mark.parametrize(
    "swallowed",
    [
        '"Great fun,1\nso so,0\nit ended",0\nfine,1\n"two\nlines",1\n',  # another field does span lines
        '"Great, fun,1\nso so,0\nit ended",0\nfine,1\n',
        '"Great fun,1\nso, so,0\nit ended",0\n',
        '"Great fun,1\nit ended",0\n',
        '"Great, fun,1\n"",0\nit ended",0\n',
        '"Great, fun,1\r\nso so,0\r\nit ended",0\r\n',
        '"two\nlines",1\nbad,"0\nfine,1"\n',
        '"Great, fun,1\nit ended",0\n',
        '"Great, big, fun,1\nit ended",0\n',
    ],
)
def test_each_field_that_swallows_a_row_is_refused(tmp_path, swallowed):
    line = 4 if swallowed.startswith('"two') else 2
    assert f"a.csv line {line}: a quote opens" in error_of(tmp_path, "a.csv", "text,label\n" + swallowed)
    read(tmp_path, "a.csv", "text,label\n" + swallowed, quoting="minimal")


def test_a_row_with_an_escaped_separator_that_is_swallowed_is_refused(tmp_path):
    content = 'text,label\n"Great, fun,1\nso\\, so,0\n it ended",0\n'
    assert "line 2: a quote opens" in error_of(tmp_path, "a.csv", content, escapechar="\\")


@pytest.mark.parametrize(
    "row",
    [
        ["two\nlines", "1"],
        ["a, b, c\n\nd, e, f", "1"],
        ["one", "two\nlines"],
        ["\nx\n", "y\n"],
        ["a\nb", "c\nd"],
        ["a\nb, c", "d"],
        ["a, b,\nc", "d"],
    ],
)
def test_fields_over_lines_that_are_not_rows_are_taken(tmp_path, row):
    content = "text,label\n" + ",".join(f'"{field}"' for field in row) + "\n"
    assert read(tmp_path, "a.csv", content) == [dict(zip(("text", "label"), row, strict=True))]
    assert read(tmp_path, "b.csv", 'text\n"a\nb\nc"\n') == [{"text": "a\nb\nc"}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text;label\na;b\n", "data.csv.delimiter=';'"),
        ("a.csv", "text\tlabel\na\tb\n", "contains tab"),
        ("a.tsv", "text,label\na,b\n", "data.csv.delimiter=','"),
        ("a.csv", "text\na\tb\nc d\te\n", "the one column 'text' contains tab equally often in every row"),
        ("a.csv", "text\na;b;c\nd;e;f\n", "set data.csv.delimiter=';' if this is the separator"),
        ("a.csv", 'text,label\na, "b"\n', "line 2: a space stands before a quote (' \"b\"')"),
        ("a.csv", 'text,label\na, "b, c"\n', "data.csv.skipinitialspace=true if the quotes enclose the field"),
        ("a.csv", 'a,b,c\nd,  "e, f"\n', "line 2: a space stands before a quote"),
        ("a.csv", 'text,label\na, "b\nc"\n', "line 2: a space stands before a quote"),
        ("a.csv", '"text", "label"\n"a", "b"\n', "line 1: a space stands before a quote"),
        ("a.csv", "fine film,1\nbad film,0\n", "line 1: the header contains the number '1'"),
        ("a.tsv", '"text"\t"label"\n"a"\t"b"\n', "the header's names are quoted"),
        ("a.csv", "text,label\ra,b\rc,d\r", "line 1: a carriage return"),
        ("a.txt", "one\rtwo\rthree", "carriage return alone"),
        ("a.csv", "text, text\na,b\n", "names column 'text' twice"),
        ("a.csv", "text,label\na\0,b\n", "line 2: line contains NUL"),
        ("a.csv", "text\nb\n".encode("utf-16"), "UTF-16"),
        ("a.jsonl", '{"text": 1}'.encode("utf-16-le"), "NUL"),
        ("a.csv", "text\ncafé\n".encode("latin-1"), "line 2: these bytes are not UTF-8 text"),
        ("a.jsonl", '{"a": 1' + "0" * 5000 + "}", "more than 4300 digits"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "damaged or cut short"),
        ("a.jsonl.zst", PACKERS[".zst"](b'{"a": 1}\n' * 99)[:-3], "damaged or cut short"),
        ("a.jsonl.xz", PACKERS[".xz"](b'{"a": 1}\n' * 99)[:-9], "damaged or cut short"),
        ("a.jsonl.bz2", b"\xff\xfe\0", "damaged or cut short"),
    ],
)
def test_what_looks_wrong_is_named(tmp_path, name, content, expected):
    assert expected in error_of(tmp_path, name, content)


def test_a_carriage_return_without_quotes_is_refused(tmp_path):
    assert "line 2: a carriage return" in error_of(tmp_path, "a.csv", "a,b\n,\r0\n")


def test_headers_as_people_write_them(tmp_path):
    assert read(tmp_path, "a.csv", ",text,label\n0,Hi,1\n") == [{"Unnamed: 0": "0", "text": "Hi", "label": "1"}]
    assert read(tmp_path, "b.csv", "text, label\nHi, 1\n") == [{"text": "Hi", "label": " 1"}]
    assert read(tmp_path, "c.csv", "film,1\n", header=["text", "label"]) == [{"text": "film", "label": "1"}]
    assert read(tmp_path, "d.csv", "text,2019\na,b\n", header=True) == [{"text": "a", "2019": "b"}]


def test_names_that_the_first_line_has_already_are_refused(tmp_path):
    content = "\ntext, label\nfilm,1\n"
    message = error_of(tmp_path, "a.csv", content, header=["text", "label"])
    assert "a.csv line 2: the first line is the names in data.csv.header" in message
    assert len(read(tmp_path, "b.csv", "film,1\ntext,label\n", header=["text", "label"])) == 2
    assert read(tmp_path, "c.csv", content, header=True) == [{"text": "film", "label": "1"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "a.json.gz", "user/name"])
def test_csv_keys_that_no_source_follows_are_refused(name):
    data = DataConfig(train=name, csv=CsvConfig(delimiter=";"), template="{{ a }}", target="{{ b }}")
    with pytest.raises(UserError, match=f"data.csv.delimiter is given, but {name} is no .csv or .tsv file"):
        check_csv_keys(data)
    check_csv_keys(data.model_copy(update={"validation": "v.TSV.gz"}))
    check_csv_keys(data.model_copy(update={"csv": CsvConfig()}))


def test_a_space_before_a_quote_is_read_as_the_config_says(tmp_path):
    content = 'text, label\na, "b, c"\nd, e\n'
    found = read(tmp_path, "a.csv", content, skipinitialspace=True)
    assert found == [{"text": "a", "label": "b, c"}, {"text": "d", "label": "e"}]
    assert read(tmp_path, "b.csv", 'text,label\na, "b"\n', skipinitialspace=False) == [{"text": "a", "label": ' "b"'}]
    for plain in ('" ""b"" c",d\n', 'so "b" c,d\n', "\"'b'\",d\n", ' b,d "e"\n'):
        assert len(read(tmp_path, "c.csv", "text,label\n" + plain)) == 1, plain
    assert read(tmp_path, "d.tsv", 'text\tlabel\na\t "b"\n') == [{"text": "a", "label": ' "b"'}]


def test_one_column_may_contain_any_separator_where_the_config_says_so(tmp_path):
    rows = [{"text": "a\tb"}, {"text": "c\td"}]
    for dialect in ({"delimiter": ","}, {"header": True}, {"header": ["text"]}):
        head = "" if dialect.get("header") == ["text"] else "text\n"
        assert read(tmp_path, "a.csv", head + "a\tb\nc\td\n", **dialect) == rows
    assert len(read(tmp_path, "b.csv", "text\na;b\nc\n")) == len(read(tmp_path, "c.csv", "text\nc\na;b\n")) == 2
    found = error_of(tmp_path, "d.csv", "a;b\nc;d\n", header=["text", "label"])
    assert found.endswith(
        "line 1: 1 fields where the header has 2; it contains ';': set data.csv.delimiter=';' if this is the separator"
    )


UTF8 = "text,label\nplain,1\ncafé,1\nthe “best” naïve,0\n"


@pytest.mark.parametrize(
    ("text", "encoding", "reads"),
    [
        (UTF8, "latin-1", "line 3: latin-1 (data.csv.encoding) reads it as 'cafÃ©,1'"),
        (UTF8, "cp1252", "'cafÃ©,1', but the file is UTF-8 text: leave data.csv.encoding out"),
        (UTF8.replace("café", "it’s"), "cp1252", "'itâ€™s,1'"),
        (UTF8, "iso8859-15", "the file is UTF-8 text"),
        (UTF8, "mac_roman", "the file is UTF-8 text"),
        ("a,b\nпривет,1\n", "cp1251", "РїСЂРёРІРµС‚"),
        ("a,b\n你好世界,1\n", "gbk", "the file is UTF-8 text"),
        (UTF8, "utf-16", "the file is UTF-8 text and not utf-16"),
        ("a,b\nc,d\n", "utf-32-le", "the file is UTF-8 text and not utf-32-le"),
    ],
)
def test_utf8_text_under_another_encoding_is_named(tmp_path, text, encoding, reads):
    assert reads in error_of(tmp_path, "a.csv", text.encode(), encoding=encoding)
    assert error_of(tmp_path, "a.csv.gz", gzip.compress(text.encode()), encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "content", "expected"),
    [
        ("latin-1", UTF8.encode("cp1252"), "line 4: the byte 93 is a control character in latin-1"),
        ("latin-1", "a,b\né,ü\nit’s,1\n".encode("cp1252"), "which is '’' in cp1252: set data.csv.encoding=cp1252"),
        ("iso8859-2", "a,b\nž,1\n".encode("cp1250"), "set data.csv.encoding=cp1250"),
        ("latin-1", b"a,b\n\x81,1\n", "which no text has"),
        ("cp1252", "a,b\nx,é\nü,1\n".encode() + "naïve,0\n".encode("cp1252"), "line 2 is UTF-8 text and line 4 is not"),
        ("cp1252", "naïve,b\n".encode("cp1252") + "a,é\n".encode(), "line 2 is UTF-8 text and line 1 is not"),
    ],
)
def test_an_encoding_that_looks_wrong_is_named(tmp_path, encoding, content, expected):
    assert expected in error_of(tmp_path, "a.csv", content, encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "NESCAFÉ®"),
        ("cp1252", "ça, « oui » — “non”…".replace(",", "")),
        ("latin-1", "Ärger Öl ÃO"),
        ("cp1251", "Тёплый чай"),
        ("gbk", "联通"),
        ("shift_jis", "ﾃｩ テスト"),
        ("iso8859-2", "žluťoučký kůň"),
    ],
)
def test_text_of_the_encoding_that_is_given_is_read(tmp_path, encoding, text):
    content = f"text,label\n{text},1\n".encode(encoding)
    assert read(tmp_path, "a.csv", content, encoding=encoding) == [{"text": text, "label": "1"}]


def test_encoding_is_recoded_and_lines_still_count(tmp_path):
    rows = load(tmp_path, "a.csv", "text;n\ncafé;1\nthé;2\n".encode("cp1252"), delimiter=";", encoding="cp1252")
    assert [row["text"] for row in rows.read(0, 2)] == ["café", "thé"]
    assert rows.where(1).endswith("a.csv line 3")
    assert read(tmp_path, "b.csv", "text\né\n".encode("utf-16"), encoding="utf-16") == [{"text": "é"}]


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_of_every_format(tmp_path, suffix):
    contents = {"a.jsonl": '{"text": "é"}\n{"text": "b"}', "a.json": '[{"text": "é"},\n{"text": "b"}]'}
    contents |= {"a.csv": "text\né\nb\n", "a.tsv": "text\né\nb\n", "a.txt": "é\nb"}
    for name, content in contents.items():
        rows = pickle.loads(pickle.dumps(load(tmp_path, name + suffix, PACKERS[suffix](content.encode()))))
        assert [row["text"].strip() for row in rows.read(0, 2)] == ["é", "b"], name
        assert rows.where(1).endswith(f"line {3 if name[2:] in ('csv', 'tsv') else 2}")


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_of_another_kind_than_its_name_says_is_named(tmp_path, suffix):
    lines = b'{"text": "a"}\n' * 9
    packed = PACKERS[suffix](lines)
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"):
        found = error_of(tmp_path, name, packed)
        assert found.endswith(f"the content is {suffix}, which its name does not say: rename it to {name}{suffix}")
    for other in set(PACKERS) - {suffix}:
        found = error_of(tmp_path, f"a.jsonl{other}", packed)
        assert found.endswith(f"the content is {suffix} and not {other}: name it by what it is")
    found = error_of(tmp_path, f"a.jsonl{suffix}", lines)
    assert found.endswith(f"the content is plain text and not {suffix}: rename it without {suffix}")
    assert f"what the file holds is {suffix} again" in error_of(tmp_path, f"a.jsonl{suffix}", PACKERS[suffix](packed))
    assert f"cannot be read as parquet: the content is {suffix}" in error_of(tmp_path, "a.parquet", packed)


def test_binary_files_under_a_texts_name_are_named(tmp_path):
    assert "the content is .parquet and not text: rename it to .parquet" in error_of(tmp_path, "a.jsonl", b"PAR1\x15")
    assert "the content is .zip (or a spreadsheet)" in error_of(tmp_path, "a.csv", b"PK\x03\x04\0\0")
    assert "the content is text, perhaps .jsonl" in error_of(tmp_path, "a.parquet", '{"text": "é"}')
    for text in ("PAR", "PK and others", "BZh is a name", "é" * 99):
        assert read(tmp_path, "a.txt", text) == [{"text": text}]


@pytest.mark.parametrize("name", ["a.ndjson", "A.NDJSON.gz"])
def test_ndjson_is_jsonl(tmp_path, name):
    pack = PACKERS[".gz"] if name.endswith(".gz") else bytes
    assert read(tmp_path, name, pack(b'{"a": 1}\n\n{"b": 2}\n')) == [{"a": 1}, {"b": 2}]
    assert "one object on each line" in error_of(tmp_path, name, pack(b"{a\n"))


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        (
            {"train": [{"a": 1}], "validation": [{"a": 2}]},
            "the splits train, validation: save the rows",
        ),
        ({"train": {"a": [1]}, "test": {"a": [2]}}, "the splits train, test: save the rows of each"),
        ({"train": [{"a": 1}], "test": []}, "the splits train, test"),
        ({"data": [{"a": 1}], "dev": [{"a": 2}], "n": 3}, "the splits data, dev"),
        ({"messages": MESSAGES}, "the file is one chat, whose messages are no rows"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "the file is one chat"),
        ([MESSAGES, MESSAGES], 'this is the list of a chat\'s messages: write {"messages": [...]}'),
    ],
)
def test_json_of_splits_and_of_chats_says_what_to_do(tmp_path, whole, says):
    for indent in (None, 1):
        assert says in error_of(tmp_path, "a.json", json.dumps(whole, indent=indent))


def test_json_of_one_split_and_of_chats_in_rows_is_read(tmp_path):
    assert read(tmp_path, "a.json", json.dumps({"train": [{"a": 1}]})) == [{"a": 1}]
    assert read(tmp_path, "b.json", json.dumps([{"messages": MESSAGES}])) == [{"messages": MESSAGES}]
    assert read(tmp_path, "c.jsonl", json.dumps({"messages": MESSAGES})) == [{"messages": MESSAGES}]


def test_rows_inside_an_object(tmp_path):
    row = {"text": "é", "n": 1}
    for name, whole in (("a", {"version": "é", "data": [row, row]}), ("b", {"rows": [row, row]})):
        for indent in (None, 2):
            assert read(tmp_path, f"{name}{indent}.json", json.dumps(whole, indent=indent)) == [row, row]
    lines = '{"messages": [{"role": "user"}]}\n' * 2
    assert read(tmp_path, "c.json", lines) == [{"messages": [{"role": "user"}]}] * 2


@pytest.mark.parametrize("indent", [None, 2])
def test_json_by_columns_is_refused_and_rows_under_any_name_are_found(tmp_path, indent):
    by_columns = [
        {"a": ["x", "y"], "b": [1, 2]},
        {"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}},
        {"columns": ["a"], "index": [0], "data": [["x"]]},
    ]
    for whole in by_columns:
        assert "one object with no list of objects" in error_of(tmp_path, "a.json", json.dumps(whole, indent=indent))
    rows = [{"a": "x"}, {"a": "y"}]
    assert read(tmp_path, "b.json", json.dumps({"version": "1.0", "rows": rows}, indent=indent)) == rows
    several = json.dumps({"a": rows, "b": rows, "n": 1}, indent=indent)
    assert "several lists (a, b)" in error_of(tmp_path, "c.json", several)
    for named in ({"data": rows, "more": rows}, {"data": [], "rows": rows}):
        assert f"several lists ({', '.join(named)})" in error_of(tmp_path, "d.json", json.dumps(named, indent=indent))
    assert read(tmp_path, "e.json", json.dumps({"errors": [], "data": rows}, indent=indent)) == rows


def test_one_object_on_one_line_is_a_row_where_it_has_a_plain_value(tmp_path):
    row = {"text": "a", "tags": ["x", "y"], "meta": {"n": 1}}
    assert read(tmp_path, "a.json", json.dumps(row)) == [row]


TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(list(",;\t\"'\\\n\r\u2028 \ufeff")))
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
JSON_ROWS = st.lists(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=4), min_size=1, max_size=5)
# Python's writer leaves a carriage return without quotes where lines end with \n: nothing tells it from a line end.
FIELDS = TEXTS.map(lambda text: text.replace("\0", "").replace("\r", "\r\n"))
QUICK = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def check_json(folder, rows, is_ascii, line_end):
    lines = line_end.join(json.dumps(row, ensure_ascii=is_ascii) for row in rows)
    array = json.dumps(rows, ensure_ascii=is_ascii, indent=1).replace("\n", line_end)
    for name, content in (("a.jsonl", lines), ("a.json", array)):
        table = load(folder, name, content)
        found = table.read(0, len(rows) + 1)
        assert [dump_json(row) for row in found] == [json.dumps(row) for row in rows]
        assert [table.read(i, i + 1)[0] for i in range(len(rows))] == found


def check_csv(folder, rows, delimiter, line_end, quoting):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    writer.writerows([["a", "b"], *rows])
    table = load(folder, "a.csv", file.getvalue(), delimiter=delimiter, quoting="minimal")
    assert [list(row.values()) for row in table.read(0, len(table))] == rows
    assert [list(table.read(i, i + 1)[0].values()) for i in range(len(rows))] == rows


LINE_ENDS = st.sampled_from(["\n", "\r\n"])
CSV_CASES = {
    "rows": st.lists(st.lists(FIELDS, min_size=2, max_size=2), min_size=1, max_size=5),
    "delimiter": st.sampled_from([",", ";", "\t"]),
    "line_end": LINE_ENDS,
    "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
}


@QUICK
@given(JSON_ROWS, st.booleans(), LINE_ENDS)
def test_random_json_rows_are_read_back(tmp_path, rows, is_ascii, line_end):
    check_json(tmp_path, rows, is_ascii, line_end)


@QUICK
@given(**CSV_CASES)
def test_random_csv_rows_are_read_back(tmp_path, rows, delimiter, line_end, quoting):
    check_csv(tmp_path, rows, delimiter, line_end, quoting)


@pytest.mark.extended
@settings(QUICK, max_examples=3000)
@given(JSON_ROWS, st.booleans(), LINE_ENDS)
def test_many_random_json_rows_are_read_back(tmp_path, rows, is_ascii, line_end):
    check_json(tmp_path, rows, is_ascii, line_end)


@pytest.mark.extended
@settings(QUICK, max_examples=3000)
@given(**CSV_CASES)
def test_many_random_csv_rows_are_read_back(tmp_path, rows, delimiter, line_end, quoting):
    check_csv(tmp_path, rows, delimiter, line_end, quoting)
