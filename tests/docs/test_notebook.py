"""The notebook's cells run one after another in a fresh process, as in a kernel."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, process_env

NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
# Magics belong to IPython. The last expression of a cell is what a kernel shows.
RUN_CELLS = """
import ast, json, sys
names = {"__name__": "__main__"}
shown = []
for source in json.load(open(sys.argv[1])):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
json.dump(shown, open(sys.argv[2], "w"))
"""


def read_cells() -> list[str]:
    """The code of each cell, without magics."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    return ["\n".join(line for line in cell.splitlines() if not line.startswith(("%", "!"))) for cell in cells]


def test_the_notebook_is_stored_without_outputs():
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    for cell in content["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


@pytest.mark.long
def test_the_notebook_runs_and_its_prompt_beats_the_hard_prompt(tmp_path):
    (tmp_path / "cells.json").write_text(json.dumps(read_cells()))
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # so that the notebook's folder seems to be in a checkout
    command = [sys.executable, "-c", RUN_CELLS, str(tmp_path / "cells.json"), str(tmp_path / "shown.json")]
    env = process_env()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    _, compared, answers, scores, attached, files = json.loads((tmp_path / "shown.json").read_text())
    assert compared["trained prompt"]["exact_match"] > 0.7 > compared["hard prompt"]["exact_match"]
    assert answers == [text.strip() for text in attached] and answers[0] == "HELLO"
    assert scores[0]["loss"] < scores[1]["loss"]
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert Path(tmp_path / "runs/capitals/summary.json").exists()
