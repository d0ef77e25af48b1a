"""Acceptable answers are read from a column of texts or lists, or are the target; mistakes name the row and the key."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptune_dist.data.references import build_references
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.errors import UserError


@pytest.fixture
def write(tmp_path: Path):
    def write_rows(*rows: dict) -> Rows:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_rows(str(file), key="data.validation", default_split="validation")

    return write_rows


def data_of(references: str | None, target: str = " {{ answer }}\n") -> SimpleNamespace:
    return SimpleNamespace(references=references, target=target, optional_columns=[], messages=None)


def test_without_a_column_the_rendered_target_is_the_only_reference(write):
    rows = write({"answer": "two  words"}, {"answer": "one"})
    assert build_references(data_of(None), rows) == [["two  words"], ["one"]]


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("accepted", [["a ", " b"], ["c"]], [["a", "b"], ["c"]]),
        ("accepted", ["a", " b "], [["a"], ["b"]]),
        ("accepted", [1, 2], [["1"], ["2"]]),
        ("accepted", [["a", ""], ["c"]], [["a", ""], ["c"]]),
        ("accepted.text", [{"text": ["a", "b"], "start": [1, 2]}, {"text": ["c"], "start": [3]}], [["a", "b"], ["c"]]),
        ("accepted.text", [[{"text": "a"}, {"text": "b"}], [{"text": "c"}]], [["a", "b"], ["c"]]),
    ],
)
def test_a_column_of_texts_of_lists_or_of_what_is_inside_is_read(write, column, values, found):
    rows = write(*({"answer": "x", "accepted": value} for value in values))
    assert build_references(data_of(column), rows) == found


def test_a_column_whose_name_has_a_dot_is_a_column(write):
    assert build_references(data_of("a.b"), write({"a.b": ["x", "y"]})) == [["x", "y"]]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("accepted", [["a"], []]),
        ("accepted", [["a"], None]),
        ("accepted", [["a"], ["a", None]]),
        ("accepted.text", [{"text": ["a"]}, {"text": None}]),
        ("accepted.texts", [{"texts": ["a"], "text": "a"}, {"text": "a"}]),
    ],
)
def test_a_row_without_references_is_named_with_the_key(write, column, values):
    rows = write(*({"accepted": value} for value in values))
    with pytest.raises(UserError) as caught:
        build_references(data_of(column), rows)
    message = str(caught.value)
    assert "rows.jsonl line 2: data.references is missing, null or empty" in message and "\n" not in message


def test_a_value_that_is_no_text_is_named_with_its_row(write):
    rows = write({"accepted": {"text": "a"}})
    with pytest.raises(UserError, match=r"rows.jsonl line 1: data.references holds a dict; a text or a list"):
        build_references(data_of("accepted"), rows)


def test_a_column_that_the_data_lacks_is_named_with_those_that_it_has(write):
    with pytest.raises(UserError, match=r"^data.references is column 'accepted', .*its columns: answer$"):
        build_references(data_of("accepted"), write({"answer": "a"}))
