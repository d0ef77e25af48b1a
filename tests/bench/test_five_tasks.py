"""The benchmark of five tasks: real runs over the shipped base, what is not run again, and its table."""

import json
from pathlib import Path

import pytest
import yaml

from ptune_dist.bench.five_tasks import COLUMNS, PLAN, main
from ptune_dist.bench.methods_plan import load_plan
from tests.processes import ROOT

BASE = ROOT / "configs/tiny/causal"
ROWS = ROOT / "configs/tiny/data"
TASK = {
    "metric": "exact_match",
    "instruction": "In capitals",
    "data": {"template": "{{ word }} =", "target": " {{ answer }}"},
    "evaluate": {"max_examples": 4, "max_new_tokens": 4},
}
CONTENT = {
    "run": {
        "prompt": {"num_virtual_tokens": 2},
        "train": {"max_steps": 2, "batch_size": 4},
        "evaluate": {"every": 0, "num_samples": 0},
    },
    "tasks": {"upper": TASK},
    "methods": {"prefix": {"prompt.method": "prefix_tuning", "prompt.init_text": "{instruction}"}},
    "parts": {},
}


@pytest.mark.extended
def test_each_task_is_a_run_and_its_baselines_and_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for which in ("train", "validation"):
        lines = (ROWS / f"{which}.jsonl").read_text().splitlines(keepends=True)
        Path(f"upper_{which}.jsonl").write_text("".join(lines[:16]))
    Path("plan.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    Path("doc.md").write_text("<!-- five tasks -->\nold\n<!-- end five tasks -->\n")
    files = ["--data", ".", "--out", "out.json", "--document", "doc.md", "--plan", "plan.yaml", "--work", "work"]
    arguments = ["--base", str(BASE), *files]
    assert main([*arguments, "--minutes", "0"]) == 75
    assert "Not measured yet." in Path("doc.md").read_text()
    assert main(arguments) == 0
    found = json.loads(Path("out.json").read_text())["tasks"]["upper"]
    assert set(found["rows"]) == set(COLUMNS) and found["steps"] == 2 and found["train_s"] > 0
    assert found["rows"]["trained"]["num_rows"] == 4
    line = next(line for line in Path("doc.md").read_text().splitlines() if line.startswith("| upper: exact_match"))
    assert line.count("|") == len(COLUMNS) + 5 and line.split("|")[-4].strip() == "4"
    assert not list(Path("work").iterdir())
    assert main([*arguments, "--minutes", "0"]) == 0  # nothing is missing


def test_the_shipped_plan_has_the_five_tasks_of_the_tutorial():
    plan = load_plan(ROOT / PLAN)
    assert len(plan.tasks) == 5 and len(plan.methods) == 1
