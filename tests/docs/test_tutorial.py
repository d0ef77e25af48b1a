"""What the tutorial shows runs as it is shown: from a CSV file to a model that transformers reads alone."""

import json
import re
from pathlib import Path

import pytest
from transformers import pipeline

from tests.commands import Commands
from tests.processes import ROOT

SECTION = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8").partition("## 4. ")[2].partition("\n## ")[0]


@pytest.mark.long
def test_a_csv_file_becomes_a_trained_prompt_and_a_model(commands: Commands, tmp_path: Path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'-c "(.*?)"\n', SECTION)[1], {})
    (tmp_path / "reviews.yaml").write_text(re.search(r"```yaml\n(.*?)```", SECTION, re.DOTALL)[1])
    run = tmp_path / "run"
    trained = commands.run("train", tmp_path / "reviews.yaml", f"output_dir={run}")
    assert trained.code == 0, trained.err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation"]["accuracy"] > summary["base_without_prompt"]["accuracy"]
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 40
    exported = commands.run("export", run, "--to", "model", "--out", tmp_path / "model")
    assert exported.code == 0, exported.err
    shown = re.search(r'print\(answer\("(.*?)",', SECTION)[1].replace("\\n", "\n")
    answer = pipeline("text-generation", str(tmp_path / "model"))
    (found,) = answer(shown, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert found["generated_text"].strip() in ("positive", "negative")
