"""The bench of default learning rates, over the shipped base and a few rows: it resumes, and its table is filled."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptune_dist.bench import learning_rates
from ptune_dist.bench.learning_rates import MARK, TASKS, WORST_POINTS, RowScores, bootstrap, list_cells, main
from tests.conftest import TINY


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder of rows for two tasks, and short answers."""
    for which in ("train", "validation"):
        sentiment = [{"text": f"film {i}", "label": ("positive", "negative")[i % 2]} for i in range(6)]
        meaning = [{"mr": f"name[{i}]", "references": [f"It is {i}.", f"This is {i}."]} for i in range(6)]
        for task, rows in (("sentiment", sentiment), ("data_to_text", meaning)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{task}_{which}.jsonl").write_text(text)
    short = {name: replace(task, max_new_tokens=4) for name, task in TASKS.items()}
    monkeypatch.setattr(learning_rates, "TASKS", short)
    return tmp_path


@pytest.mark.extended  # test_tiny_rates.py runs the same bench
def test_cells_are_measured_once_and_fill_the_table(data, capsys):
    page = data / "page.md"
    page.write_text(f"before\n<!-- {MARK} -->\n<!-- end {MARK} -->\nafter\n")
    out = data / "out.json"
    chosen = ["sentiment/prompt_tuning/text", "data_to_text/prefix_tuning/default start"]
    arguments = ["--base", str(TINY / "causal"), "--data", str(data), "--out", str(out), "--document", str(page)]
    arguments += ["--steps", "2", "--work", str(data / "work"), *(part for name in chosen for part in ("--cell", name))]
    assert main(arguments) == 0
    content = json.loads(out.read_text())
    assert list(content["cells"]) == [cell.name for cell in list_cells() if cell.name in chosen]
    for found in content["cells"].values():
        best = found["members"][found["best"]]
        assert best["score"] == max(member["score"] for member in found["members"].values())
        assert best["difference"] == 0 and best["interval"] == [0, 0]
        assert all(low <= high for low, high in (member["interval"] for member in found["members"].values()))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("\n| ") == 4
    before = out.read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0  # nothing is left to run
    assert out.read_bytes() == before and "cell " not in capsys.readouterr().out
    assert "| 2 |" in text


def test_an_interval_is_over_the_same_draws_for_both():
    values = [0.0, 50.0, 100.0, 50.0]
    member = RowScores(4, 0.0, lambda rows: sum(values[i] - 5 for i in rows) / len(rows))
    best = RowScores(4, 0.0, lambda rows: sum(values[i] for i in rows) / len(rows))
    assert bootstrap(member, best) == pytest.approx((-5, -5))  # unpaired draws would differ by far more


def test_a_default_that_is_surely_worse_is_named():
    cell = list_cells()[0]
    member = {"score": 1.0, "loss": 1.0, "difference": -9.0, "interval": [-12.0, WORST_POINTS - 0.1]}
    members = {str(rate): member for rate in cell.rates}
    content = {"cells": {cell.name: {"members": members, "best": str(cell.rates[0])}}}
    assert learning_rates.list_failed(content) == [cell.name]
    member["interval"] = [-12.0, WORST_POINTS + 0.1]
    assert not learning_rates.list_failed(content)


def test_missing_rows_and_a_page_without_marks_end_in_one_line(data, capsys):
    (data / "sentiment_train.jsonl").unlink()
    page = data / "page.md"
    page.write_text("nothing")
    arguments = ["--base", str(TINY / "causal"), "--data", str(data), "--out", str(data / "out.json")]
    arguments += ["--work", str(data / "work"), "--cell", "sentiment/prompt_tuning/text"]
    assert main(arguments) == 2
    assert "--data: " in capsys.readouterr().err
    assert main([*arguments, "--again", "--document", str(page)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {page}: no block between")
