"""Section `data.csv`: what each key takes, and the one line for what it does not."""

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.data.split_rows import csv_dialect
from ptune_dist.errors import UserError

SMALL = """\
output_dir: runs/x
model: {path: some/base}
data: {train: rows.csv, template: "{{ text }}", target: "{{ label }}"}
"""
HEADER = "data.csv.header: name the columns in a list, such as [id, text], or leave it out"


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(SMALL)
    return lambda *overrides: load_config(path, overrides)


@pytest.mark.parametrize(
    "override, says",
    [
        ("data.csv.delimiter=ab", "data.csv.delimiter: one character is needed, not 'ab'"),
        ("data.csv.delimiter=''", "data.csv.delimiter: one character is needed, not ''"),
        ('data.csv.delimiter="\\n"', "data.csv.delimiter: one character is needed, not '\\n'"),
        ("data.csv.delimiter=[a]", "data.csv.delimiter: a text is needed"),
        ("data.csv.quotechar=''", "data.csv.quotechar: one character is needed, not ''"),
        ("data.csv.quotechar=null", "data.csv.quotechar: a text is needed"),
        ('data.csv.quotechar="\\r"', "data.csv.quotechar: one character is needed"),
        ("data.csv={delimiter: '\"'}", "data.csv.delimiter and data.csv.quotechar are both '\"'"),
        ("data.csv.escapechar=ab", "data.csv.escapechar: one character is needed, not 'ab'"),
        ("data.csv.quoting=some", "data.csv.quoting: Input should be 'minimal', 'all' or 'none'"),
        ("data.csv.doublequote=maybe", "data.csv.doublequote: "),
        ("data.csv.skipinitialspace=some", "data.csv.skipinitialspace: "),
        ("data.csv.encoding=utf8000", "data.csv.encoding: Python knows no text encoding 'utf8000'"),
        ("data.csv.encoding=base64", "data.csv.encoding: Python knows no text encoding 'base64'"),
        ("data.csv.encoding=undefined", "undefined encoding"),
        ("data.csv.encoding=[a]", "data.csv.encoding: a text is needed"),
        ("data.csv.header=false", f"{HEADER}, got 'false'"),
        ("data.csv.header=[]", f"{HEADER}, got []"),
        ("data.csv.header=5", f"{HEADER}, got '5'"),
        ("data.csv.header=none", f"{HEADER}, got 'none'"),
        ("data.csv.header={a: b}", HEADER),
        ("data.csv.header=[a, null]", f"{HEADER}, got ['a', None]"),
        ("data.csv.header=[a, [b]]", HEADER),
        ("data.csv.seperator=;", "unknown key data.csv.seperator"),
        ("data.csv.quote=none", "unknown key data.csv.quote, did you mean data.csv.quotechar?"),
        ("data.csv=tab", "data.csv: a section with keys of its own is needed, got 'tab'"),
    ],
)
def test_each_wrong_value_is_named_in_one_line(load, override, says):
    with pytest.raises(UserError) as caught:
        load(override)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("command line: ")


def test_what_is_given_reaches_the_reader(load):
    config = load(
        'data.csv={delimiter: "\\t", quoting: all, quotechar: "\'", escapechar: "\\\\", doublequote: false, '
        "skipinitialspace: true, encoding: cp1252, header: [a, b]}"
    )
    dialect = csv_dialect(config.data)
    assert (dialect.delimiter, dialect.quoting, dialect.quotechar, dialect.escapechar) == ("\t", "all", "'", "\\")
    assert (dialect.doublequote, dialect.encoding, dialect.header) == (False, "cp1252", ["a", "b"])
    assert dialect.skipinitialspace is True and csv_dialect(load().data).skipinitialspace is None
    assert csv_dialect(load("data.csv.delimiter=;").data).delimiter == ";"
    assert csv_dialect(load("data.csv.delimiter=,").data).delimiter == ","
    assert csv_dialect(load("data.csv.delimiter=\t").data).delimiter == "\t"
    assert csv_dialect(load("data.csv.delimiter=' '").data).delimiter == " "
    assert csv_dialect(load("data.csv.header=true").data).header is True


@pytest.mark.parametrize(
    "written, names",
    [
        ("[1, 2]", ["1", "2"]),
        ("[2020, 2021]", ["2020", "2021"]),
        ("[y, n]", ["y", "n"]),
        ("[id, no]", ["id", "no"]),
        ("[id, 010, on, 1.50]", ["id", "010", "on", "1.50"]),
        ("yes", True),
    ],
)
def test_the_names_of_columns_are_taken_as_written(load, tmp_path, written, names):
    assert load(f"data.csv.header={written}").data.csv.header == names
    path = tmp_path / "in_file.yaml"
    path.write_text(SMALL.replace("train: rows.csv,", f"train: rows.csv, csv: {{header: {written}}},"))
    assert load_config(path).data.csv.header == names
