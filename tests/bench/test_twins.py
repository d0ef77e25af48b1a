"""The bench of the recipes' twins: what is judged, and that its table is filled. tests/test_recipes.py trains them."""

import json

import pytest

from ptune_dist.bench.twins import MARK, is_beyond, judge, list_cells, main
from ptune_dist.config.shipped import RECIPES


@pytest.mark.parametrize(
    ("metric", "baseline", "near", "beyond"),
    [("accuracy", 0.5, 0.54, 0.56), ("chrf", 40.0, 49.0, 51.0), ("mse", 0.2, 0.19, 0.17), ("loss", 2.0, 1.95, 1.85)],
)
def test_a_prompt_has_to_be_beyond_a_baseline_by_a_margin(metric, baseline, near, beyond):
    assert is_beyond(metric, beyond, baseline)
    assert not is_beyond(metric, near, baseline)
    assert not is_beyond(metric, baseline, baseline)


def test_labels_are_judged_by_the_commonest_one_and_by_the_loss():
    numbers = {"no learning": 0.5, "base alone": 0.8, "untrained prompt": 0.8, "trained": 0.8}
    losses = {"base alone": 3.0, "untrained prompt": 2.0, "trained": 1.99}
    assert judge({"accuracy": numbers, "loss": losses}) == {
        ("accuracy", "no learning"): True,
        ("loss", "base alone"): True,
        ("loss", "untrained prompt"): False,
    }


def test_each_twin_is_a_cell():
    assert {cell.name for cell in list_cells()} == {file.stem for file in (RECIPES / "tiny").glob("*.yaml")}


def test_the_table_has_blanks_where_there_is_no_number_and_twins_that_do_not_learn_are_named(tmp_path, capsys):
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text(f"before\n<!-- {MARK} -->\n<!-- end {MARK} -->\nafter\n")
    metrics = {"chrf": {"no learning": 41.0, "untrained prompt": 3.25, "trained": 42.0}}
    out.write_text(json.dumps({"cells": {"translation_t5": {"config": "", "steps": 1, "metrics": metrics}}}))
    assert main(["--out", str(out), "--document", str(page), "--again"]) == 0
    assert "| `tiny/translation_t5` | chrf | 41.0 |  | 3.250 | 42.0 |\n" in page.read_text()
    printed = capsys.readouterr().out
    assert printed == "translation_t5: the trained prompt's chrf is not beyond that of: no learning\n"


def test_a_page_without_marks_ends_in_one_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    assert main(["--out", str(tmp_path / "out.json"), "--again", "--document", str(page)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {page}: no block between")
