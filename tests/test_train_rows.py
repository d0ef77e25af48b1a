"""Rows as people have them, through a run: drawn validation rows, references, skipped rows, epochs, an average."""

import json
from pathlib import Path

import pytest
import yaml

from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_command
from tests.conftest import write_config

ROWS = [{"word": f"w{i % 7}", "refs": [f"a{i % 7}", f"b{i % 7}"][: 1 + i % 2]} for i in range(48)]
ROWS[4] = {"word": "bad", "refs": ["a", None]}  # drawn for validation, where metrics read all references
ROWS[5] = {"word": "bad", "refs": []}


def write(folder: Path) -> Path:
    (folder / "rows").mkdir(parents=True)
    for part in range(2):
        lines = [json.dumps(row) + "\n" for row in ROWS[24 * part : 24 * part + 24]]
        (folder / "rows" / f"{part}.jsonl").write_text("".join(lines))
    return write_config(
        folder / "config.json",
        data={"train": "rows/*.jsonl", "validation": 0.25, "target": " {{ refs }}", "references": "refs",
              "on_error": "skip"},
        train={"max_steps": None, "epochs": 2, "batch_size": 4, "schedule": "constant", "average_last": 2},
        evaluate={"every": "epoch", "metrics": ["exact_match"], "max_new_tokens": 3},
        checkpoint={"every": 0.25, "keep": 2},
    )  # fmt: skip


def train(config: Path, *overrides: str) -> str:
    done = run_command("train", str(config), *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A run that was made longer once: its second half is read by another process."""
    folder = tmp_path_factory.mktemp("rows")
    config = write(folder)
    train(config, "train.epochs=1", "train.average_last=0")
    return folder / "run", train(config)


def test_a_resumed_run_reads_the_rows_of_an_uninterrupted_one(run, tmp_path):
    train(write(tmp_path))
    resumed, whole = (read_metrics(folder) for folder in (run[0], tmp_path / "run"))
    assert len(whole) == 18  # twice 35 rows
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]


def test_lengths_and_rows_are_stored_with_the_run(run):
    folder, out = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["train"]["max_steps"], config["train"]["epochs"]) == (18, None)
    assert (config["evaluate"]["every"], config["checkpoint"]["every"]) == (9, 5)
    assert [Path(file).name for file in config["data"]["train"]] == ["0.jsonl", "1.jsonl"]
    split = json.loads((folder / "split.json").read_text())
    assert (split["num_rows"], len(split["validation_rows"])) == (48, 12)
    skipped, held_out = [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]
    assert "0.jsonl line 6: column 'refs'" in skipped["error"]
    assert "0.jsonl line 5: data.references is missing" in held_out["error"]
    assert "train.epochs 2 of" in out and "evaluate.every epoch: every 9 of 18 steps" in out
    assert "data.on_error: 1 of " in out


def test_the_average_is_evaluated_and_kept_only_where_it_is_better(run):
    folder, out = run
    summary = json.loads((folder / "summary.json").read_text())
    found = summary["average_last"]
    assert found["checkpoints"] == 2 and "mean of the last 2 checkpoints  validation  loss" in out
    kept = found["is_kept"]
    assert (summary["validation"]["loss"] == found["loss"]) == kept
    done = run_command("evaluate", str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (evaluation["num_examples"], evaluation["num_skipped"]) == (11, 1)
    assert evaluation["loss"] == pytest.approx(summary["validation"]["loss"], rel=1e-6)
