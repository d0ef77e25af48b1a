"""The bench of default rates over the tiny bases: which cells it has, that it resumes, and that its table is filled."""

import json

import pytest

from ptune_dist.bench.tiny_rates import CLEARLY, MARK, SOURCE, list_cells, list_worse, main
from ptune_dist.prompts import METHODS


def test_every_default_that_names_the_tiny_bases_has_a_cell_with_the_default_among_its_rates():
    cells = list_cells()
    assert {cell.method for cell in cells} == {
        name
        for name, method in METHODS.items()
        for found in (method.default_training, *method.default_training_of.values())
        if found.source.startswith(SOURCE)
    }
    assert "last_layers/encoder" not in {cell.name for cell in cells}  # from an article
    assert all(cell.default in cell.rates and len(set(cell.rates)) == 5 for cell in cells)


@pytest.mark.long
def test_cells_are_measured_once_and_fill_the_table(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- {MARK} -->\n<!-- end {MARK} -->\nafter\n")
    out = tmp_path / "out.json"
    arguments = ["--out", str(out), "--document", str(page), "--work", str(tmp_path / "work"), "--steps", "1"]
    arguments += ["--cell", "head_only/encoder"]
    assert main(arguments) == 0
    (found,) = json.loads(out.read_text())["cells"].values()
    assert found["steps"] == 1 and found["before"] > 0 and len(set(found["losses"].values())) == 5
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("**") == 2
    before = out.read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0
    assert out.read_bytes() == before and "cell " not in capsys.readouterr().out


def test_a_default_that_another_rate_clearly_beats_is_named():
    losses = {"0.1": 1.0, "1.0": CLEARLY + 0.01}
    content = {"cells": {"some/causal": {"default": "1.0", "losses": losses}}}
    assert list_worse(content) == ["some/causal: 1.060 at 1.0, 1.000 at 0.1"]
    losses["1.0"] = CLEARLY - 0.01
    assert not list_worse(content)


def test_a_page_without_marks_ends_in_one_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    assert main(["--out", str(tmp_path / "out.json"), "--again", "--document", str(page)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {page}: no block between")
