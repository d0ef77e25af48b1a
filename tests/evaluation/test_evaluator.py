"""An evaluation gives every metric the answers and references that it needs, and keeps how they were computed."""

import json
from pathlib import Path

import pytest
import sacrebleu

from ptune_dist.metrics import METRICS
from tests.conftest import TINY, write_config

NAMES = ["exact_match", "f1", "squad_em", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "perplexity"]
SIGNATURES = {
    "bleu": f"nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}",
    "chrf": f"nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}",
}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory) -> Path:
    """A sweep of two prompts, evaluated on rows of which every other has a second reference."""
    folder = tmp_path_factory.mktemp("evaluator")
    rows = read_rows(TINY / "data" / "validation.jsonl")[:12]
    for number, row in enumerate(rows):
        row["accepted"] = [row["answer"], row["word"]] if number % 2 else [row["answer"]]
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        folder / "c.json",
        data={"validation": str(held_out), "references": "accepted"},
        train={"max_steps": 30, "batch_size": 32},
        evaluate={"every": 0, "metrics": NAMES, "best_metric": "chrf", "max_new_tokens": 16},
        sweep={"train.learning_rate": [0.3, 0.05]},
    )
    done = commands.run("train", config)
    assert (done.code, done.err) == (0, "")
    return folder / "run"


def test_metrics_are_those_of_the_generated_answers(commands, run):
    rows = read_rows(run.parent / "held_out.jsonl")
    member = json.loads((run / "summary.json").read_text())["ranking"][0]["member"]
    out = run.parent / "answers.jsonl"
    done = commands.run("generate", run, "--input-file", run.parent / "held_out.jsonl", "--output", out)
    assert done.code == 0, done.err
    answers = [row["generated"].strip() for row in read_rows(out)]
    references = [row["accepted"] for row in rows]
    found = json.loads((run / "summary.json").read_text())["validation"]
    assert set(found) == {"loss", *NAMES}
    for name in NAMES:
        if METRICS[name].needs == "answers":
            assert found[name] == pytest.approx(METRICS[name].compute(answers, references), rel=1e-12), name
    assert found["chrf"] > 0 and any(found[name] < 1 for name in ("f1", "rouge1"))
    best = max(line["validation"]["chrf"] for line in json.loads((run / "summary.json").read_text())["ranking"])
    assert found["chrf"] == best, member


def test_what_papers_quote_of_a_metric_stands_in_the_summaries_and_the_evaluation(commands, run):
    done = commands.run("evaluate", run)
    assert done.code == 0, done.err
    files = [run / "summary.json", *run.glob("members/*/summary.json"), *run.glob("members/*/evaluation.json")]
    assert len(files) == 4
    for file in files:
        assert json.loads(file.read_text())["signatures"] == SIGNATURES, file
    assert json.loads(done.out)["signatures"] == SIGNATURES


def test_samples_show_the_first_reference(run):
    samples = json.loads((run / "summary.json").read_text())["samples"]
    rows = read_rows(run.parent / "held_out.jsonl")
    assert [sample["wanted"] for sample in samples] == [row["answer"] for row in rows[: len(samples)]]


def test_a_row_without_references_is_named_before_anything_is_made(commands, run, tmp_path):
    held_out = tmp_path / "rows.jsonl"
    held_out.write_text('{"word": "a", "answer": "b", "accepted": ["b"]}\n{"word": "a", "answer": "b"}\n')
    done = commands.run("train", run.parent / "c.json", f"output_dir={tmp_path}/run", f"data.validation={held_out}")
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert done.errors == [
        f"error: {held_out} line 2: data.references is missing, null or empty for this row; fill it or drop the row"
    ]


def test_predictions_have_each_row_with_its_scores_and_intervals_hold_the_metrics(commands, run):
    out = run.parent / "predictions.jsonl"
    done = commands.run("evaluate", run, "--output", out)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    rows = read_rows(run.parent / "held_out.jsonl")
    predictions = read_rows(out)
    assert [{name: prediction[name] for name in rows[0]} for prediction in predictions] == rows
    assert [prediction["gold"] for prediction in predictions] == [
        row["accepted"] if len(row["accepted"]) > 1 else row["accepted"][0] for row in rows
    ]
    for name in NAMES:
        if METRICS[name].is_mean:
            assert sum(row[name] for row in predictions) / len(rows) == pytest.approx(found[name]), name
    assert all("generated" in row and row["loss"] > 0 for row in predictions)
    assert found["intervals_95"].keys() == {"loss", *NAMES}
    assert all(low <= found[name] <= high for name, (low, high) in found["intervals_95"].items())
    assert commands.run("evaluate", run, "--output", out).code == 0  # replaces earlier predictions
    held_out = run.parent / "held_out.jsonl"
    refused = commands.run("evaluate", run, "--output", held_out)
    assert refused.code == 2 and read_rows(held_out) == rows


def test_predictions_of_labels_have_probabilities(commands, tmp_path):
    config = write_config(
        tmp_path / "c.json",
        data={"labels": ["A", "B", "C"]},
        train={"max_steps": 1, "batch_size": 4},
        evaluate={"every": 0, "metrics": ["accuracy"], "max_new_tokens": 2},
    )
    rows = [
        row | {"answer": "ABC"[i % 3], "label": "own"}
        for i, row in enumerate(read_rows(TINY / "data" / "validation.jsonl")[:9])
    ]
    for which in ("train", "validation"):
        (tmp_path / f"{which}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.{which}={tmp_path / which}.jsonl" for which in ("train", "validation")]
    given.append("data.target= {{ answer }}")
    assert commands.run("train", config, *given).code == 0
    assert commands.run("evaluate", tmp_path / "run", "--output", tmp_path / "out.jsonl").code == 0
    for row, prediction in zip(rows, read_rows(tmp_path / "out.jsonl"), strict=True):
        shares = prediction["probabilities"]
        assert prediction["gold_label"] == prediction["gold"] == row["answer"] and shares.keys() == {"A", "B", "C"}
        assert prediction["label"] == max(shares, key=shares.get) and prediction["row_label"] == "own"
        assert sum(shares.values()) == pytest.approx(1)
        assert prediction["accuracy"] == float(prediction["label"] == row["answer"])
