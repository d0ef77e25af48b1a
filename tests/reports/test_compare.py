"""Runs are compared on the same rows: what differs, how good and how certain; a page and charts hold all of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ptune_dist.cli import main
from ptune_dist.errors import UserError
from ptune_dist.metrics import METRICS
from ptune_dist.metrics.intervals import bootstrap, paired_p_value
from ptune_dist.reports.page import list_rows
from ptune_dist.reports.results import differing_keys, read_results, short_names
from tests.commands import Commands
from tests.conftest import TINY, write_config

GOLD = ["yes", "no"] * 30


def write_run(folder: Path, labels: list[str], rate: float = 0.1, gold: list[str] = GOLD) -> Path:
    """A finished run that has answered `labels`."""
    folder.mkdir(parents=True)
    right = [float(label == wanted) for label, wanted in zip(labels, gold, strict=True)]
    accuracy = sum(right) / len(right)
    config = {"output_dir": str(folder), "train": {"learning_rate": rate}, "data": {"template": "{{ text }}"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps({"validation": {"loss": 0.5, "accuracy": accuracy}}))
    steps = [{"step": n, "loss": 1 / n, "learning_rate": rate, "tokens_per_s": 10.0} for n in range(1, 5)]
    evaluations = [{"step": n, "loss": 1.0, "accuracy": accuracy} for n in (0, 4)]
    predictions = [
        {"row": n, "input": f"text {n} </script>", "gold_label": wanted, "label": label, "loss": 0.5, "num_tokens": 1}
        for n, (label, wanted) in enumerate(zip(labels, gold, strict=True))
    ]
    contents = {"metrics": steps, "evaluations": evaluations, "predictions": predictions}
    for name, lines in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_comparison_has_metrics_intervals_and_the_paired_p_value(tmp_path, capsys):
    worse = ["yes"] * 60
    better = ["yes" if n % 10 == 0 else wanted for n, wanted in enumerate(GOLD)]
    folders = [write_run(tmp_path / "a", worse), write_run(tmp_path / "b", better, rate=0.3)]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "train.learning_rate" in shown and "output_dir" not in shown.partition("validation")[0]
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert found["differing_keys"] == {"train.learning_rate": [0.1, 0.3]}
    first, second = found["metrics"]["accuracy"]
    references = [[wanted] for wanted in GOLD]
    accuracy = METRICS["accuracy"]
    assert (first["value"], second["value"]) == (0.5, pytest.approx(accuracy.compute(better, references)))
    assert second["interval_95"] == list(bootstrap(accuracy, better, references))
    key = "p_value_of_difference_from_first"
    assert second[key] == paired_p_value(accuracy, worse, better, references) < 0.01
    assert first[key] is None


def test_the_page_holds_charts_and_rows_and_needs_no_network(tmp_path):
    folders = [write_run(tmp_path / name, ["yes"] * 60) for name in "ab"]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") >= 4
    assert not re.search(r'(src|href)="https?://', page)
    rows = json.loads(re.search(r"const rows = (.*);\n", page).group(1))
    assert rows[3] == {"input": "text 3 </script>", "gold": "no", "answers": ["yes", "yes"], "right": [False] * 2}
    assert page.count("</script>") == 1
    for name in ("loss", "learning_rate", "tokens_per_s", "validation-accuracy"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "row, shown",
    [
        ({"gold": "a"}, ("a", "loss 0.5000", None)),
        ({"gold": ["a", "b"], "generated": " b"}, ("a | b", " b", True)),
        ({"gold": "a", "generated": "c"}, ("a", "c", False)),
        ({"gold": 1.5, "predicted": 1.5}, ("1.5", "1.5", None)),
        ({"continuation": "then", "generated": "this"}, ("then", "this", None)),
    ],
)
def test_only_labels_and_generated_answers_are_right_or_wrong(row, shown):
    own = {"input": "x", "loss": 0.5} | row
    (found,) = list_rows([SimpleNamespace(predictions=[own])])
    assert (found["gold"], *found["answers"], *found["right"]) == shown


def test_members_of_a_sweep_are_compared_and_plotted_over_the_swept_key(tmp_path):
    sweep = write_run(tmp_path / "sweep", ["yes"] * 60)
    for number, rate in enumerate((0.01, 0.1, 1.0)):
        write_run(sweep / "members" / f"rate={rate}", ["yes"] * (50 + number) + ["no"] * (10 - number), rate=rate)
    results = read_results([sweep])
    assert [result.name for result in results] == ["rate=0.01", "rate=0.1", "rate=1.0"]
    assert differing_keys(results) == {"train.learning_rate": [0.01, 0.1, 1.0]}
    assert main(["compare", str(sweep), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/accuracy-over-train.learning_rate.png").exists()


def test_two_members_of_a_sweep_are_plotted_over_words_too(tmp_path):
    for number, method in enumerate(("prompt_tuning", "p_tuning")):
        folder = write_run(tmp_path / "sweep/members" / method, ["yes"] * (50 + number) + ["no"] * (10 - number))
        content = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(content | {"prompt": {"method": method}}))
    assert main(["compare", str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/accuracy-over-prompt.method.png").exists()
    page = (tmp_path / "out/report.html").read_text()
    assert ">prompt_tuning</text>" in page and "bootstrap. p: of" in page


def test_names_and_values_are_whole_in_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folders = [write_run(tmp_path / f"learning_rate={rate},seed=0", GOLD, rate) for rate in (0.1, 0.2, 0.3)]
    assert main(["compare", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80


def test_other_rows_have_no_p_value_and_say_so(tmp_path, capsys):
    folders = [write_run(tmp_path / "a", ["yes"] * 60), write_run(tmp_path / "b", ["yes"] * 40, gold=GOLD[:40])]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert "no p values for b: evaluated on other rows than a" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert found["metrics"]["accuracy"][1]["p_value_of_difference_from_first"] is None


def test_names_are_as_long_as_needed():
    folders = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/y/members/one")]
    assert short_names(folders) == ["x/run", "y/run", "y/one"]
    assert short_names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is not a run of ptune-dist: it has no config.yaml"),
        (lambda run: (run / "summary.json").unlink(), "has no summary.json: the run is not finished"),
        (lambda run: (run / "summary.json").write_text("{"), "a file of this run is damaged"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), "a file of this run is damaged"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "a file of this run is damaged"),
    ],
)
def test_what_is_no_finished_run_is_named_in_one_line(tmp_path, damage, expected):
    run = write_run(tmp_path / "run", ["yes"] * 60)
    damage(run)
    with pytest.raises(UserError) as caught:
        read_results([run])
    assert str(caught.value).startswith(str(run)) and expected in str(caught.value)


def test_runs_without_a_metric_in_common_are_refused(tmp_path, capsys):
    folders = [write_run(tmp_path / name, ["yes"] * 60) for name in "ab"]
    (folders[1] / "summary.json").write_text('{"validation": {}}')
    assert main(["compare", *map(str, folders)]) == 2
    assert "no metric in common" in capsys.readouterr().err


@pytest.mark.long
def test_a_real_sweep_is_compared(commands: Commands, tmp_path: Path):
    config = write_config(
        tmp_path / "c.json",
        data={"validation": str(TINY / "data/validation.jsonl")},
        train={"max_steps": 2, "batch_size": 4},
        evaluate={"every": 1, "metrics": ["exact_match"], "max_examples": 4, "max_new_tokens": 4},
        sweep={"train.learning_rate": [0.3, 0.05, 0.01]},
    )
    assert commands.run("train", config).code == 0
    done = commands.run("compare", tmp_path / "run", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert list(found["differing_keys"]) == ["train.learning_rate"]
    for result, score in zip(read_results([tmp_path / "run"]), found["metrics"]["loss"], strict=True):
        low, high = score["interval_95"]
        assert low <= score["value"] == result.validation["loss"] <= high
        assert [line["step"] for line in result.evaluations] == [0, 1, 2]
