"""Only plain decimal notation is a number, and not all else that Python reads as one."""

import pytest

from ptune_dist.data.delimited import CsvDialect
from ptune_dist.data.framing import NumberTargets
from ptune_dist.data.numbers import read_number
from ptune_dist.data.sources import load_rows
from ptune_dist.errors import UserError

ODD = [
    "1_000",
    "１２",
    "٣",
    "nan",
    "inf",
    "-infinity",
    "1e999",
    "0x10",
    "1,5",
    "1 000",
    "",
    ".",
    "e5",
    "--1",
    "1e",
    "½",
]


@pytest.mark.parametrize("text", ODD)
def test_other_notations_are_no_numbers(text):
    assert read_number(text) is None
    expected = "row 0: data.target is " if text else "row 0: data.target is empty"
    with pytest.raises(UserError, match=expected):
        NumberTargets().encode([text], lambda index: f"row {index}", "data.target")


def test_plain_decimal_notation_is_a_number():
    texts = ["3", "-3.50", "+.5", "7.", " 2e-05\n", "1E3", "007"]
    assert [read_number(text) for text in texts] == [3, -3.5, 0.5, 7, 2e-05, 1000, 7]


@pytest.mark.parametrize("name", ["1_000", "nan", "１２"])
def test_a_header_may_have_such_names(tmp_path, name):
    path = tmp_path / "a.csv"
    path.write_text(f"{name},label\na,b\n")
    rows = load_rows(str(path), key="data.train", default_split="train", csv=CsvDialect())
    assert rows.columns() == [name, "label"]
