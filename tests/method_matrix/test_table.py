"""The table of docs/methods.md is of the methods and families that there are, and nothing in it fails."""

import json

import pytest

from tests.method_matrix.cases import list_rows
from tests.processes import ROOT

ROWS = json.loads((ROOT / "docs" / "methods.json").read_text(encoding="utf-8"))["rows"]


def test_every_method_of_every_family_was_tried():
    tried = [(row["family"], row["method"], row["options"]) for row in ROWS]
    missing = [row.name for row in list_rows() if (row.family, row.method, row.options) not in tried]
    assert not missing, f"run python -m tests.method_matrix --json docs/methods.json: it lacks {missing}"


def test_nothing_fails():
    found = [(row["family"], row["method"], name, cell) for row in ROWS for name, cell in row["cells"].items()]
    assert not [one for one in found if one[-1]["result"] == "fails"]


@pytest.mark.extended
def test_the_tables_are_current(tmp_path):
    """Every row again, which takes about half an hour."""
    from tests.method_matrix.__main__ import prepare, try_row

    prepare(tmp_path)
    current = {identity_of(row): results_of(row) for row in ROWS}
    found = [try_row(tmp_path, row) for row in list_rows()]
    assert {identity_of(row): results_of(row) for row in found} == current


def identity_of(row: dict) -> tuple[str, str, str]:
    return row["family"], row["method"], json.dumps(row["options"])


def results_of(row: dict) -> dict[str, str]:
    return {name: cell["result"] for name, cell in row["cells"].items()}
