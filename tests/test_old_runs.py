"""Runs made by an earlier version (tests/old_runs) are resumed, evaluated, asked and exported by this one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ptune_dist.run.metrics_log import read_metrics
from tests.commands import Commands, run_command
from tests.processes import ROOT

OLD = ROOT / "tests" / "old_runs"
# By key of metrics.jsonl. A gradient's norm is more sensitive to the order of sums than a loss.
TOLERANCES = {"step": 0.0, "loss": 1e-5, "learning_rate": 1e-5, "grad_norm": 1e-3}


def copy_old_run(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(OLD / name, folder / name))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def assert_same_curve(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Lines of metrics.jsonl agree in what does not depend on the machine."""
    for key, tolerance in TOLERANCES.items():
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=tolerance), key


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def succeed(commands: Commands, *argv: object) -> str:
    """Standard output of a command that must end well and say nothing on standard error."""
    finished = commands.run(*argv)
    assert finished.code == 0, finished.err
    return finished.out


def assert_evaluates_as_before(commands: Commands, run: Path, old: Path, *more: str) -> None:
    """`evaluate` writes the metrics and answers that the old version wrote."""
    expected = read_json(old / "evaluation.json")
    (run / "evaluation.json").unlink(missing_ok=True)
    succeed(commands, "evaluate", *more)
    found = read_json(run / "evaluation.json")
    assert found.pop("samples") == expected.pop("samples")
    assert Path(found.pop("data")) == ROOT / expected.pop("data")
    assert found.pop("intervals_95").keys() == expected.keys() - {"num_examples", "signatures"}
    assert found == pytest.approx(expected, rel=1e-5)


def assert_exports_as_before(out: Path, old: Path) -> None:
    """A PEFT adapter holds the same tensors and settings."""
    found = load_file(out / "adapter_model.safetensors")
    expected = load_file(old / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    settings = [read_json(folder / "adapter_config.json") for folder in (out, old)]
    for each in settings:
        each.pop("base_model_name_or_path")
    assert settings[0] == settings[1]


def assert_resumes_as_before(commands: Commands, run: Path, name: str) -> None:
    """A finished run reports that it is finished; with more steps it has the losses that the old version had."""
    train = ("train", run / "config.yaml", f"output_dir={run}")
    before = (run / "metrics.jsonl").read_bytes()
    assert "finished" in succeed(commands, *train)
    assert (run / "metrics.jsonl").read_bytes() == before
    succeed(commands, *train, "train.max_steps=70")
    assert_same_curve(read_metrics(run)[60:], read_lines(OLD / f"{name}-went-on.jsonl"))


def test_an_interrupted_run_on_two_ranks_ends_as_the_old_version_ended_it_undisturbed(tmp_path):
    run = copy_old_run("interrupted", tmp_path)
    done = run_command("train", str(run / "config.yaml"), f"output_dir={run}", num_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from step 26" in done.stdout
    assert_same_curve(read_metrics(run), read_lines(OLD / "interrupted-undisturbed.jsonl"))
    summary, undisturbed = read_json(run / "summary.json"), read_json(OLD / "interrupted-undisturbed-summary.json")
    for key in ("before", "validation"):
        assert summary[key] == pytest.approx(undisturbed[key], rel=1e-5)
    for key in ("steps", "best_step", "samples", "evaluations_since_best", "world_size", "zero_stage"):
        assert summary[key] == undisturbed[key]


def test_a_finished_sweep_evaluates_exports_and_resumes(commands, tmp_path):
    run = copy_old_run("sweep", tmp_path)
    for more, member in (((), "learning_rate=0.05"), (("--member", "learning_rate=0.01"), "learning_rate=0.01")):
        own, old = run / "members" / member, OLD / "sweep" / "members" / member
        assert_evaluates_as_before(commands, own, old, str(run), *more)
    succeed(commands, "export", run, "--to", "peft", "--out", tmp_path / "adapter")
    assert_exports_as_before(tmp_path / "adapter", OLD / "sweep-peft")
    assert_resumes_as_before(commands, run, "sweep")


def test_a_finished_infix_run_evaluates_generates_and_resumes(commands, tmp_path):
    run = copy_old_run("infix", tmp_path)
    assert_evaluates_as_before(commands, run, OLD / "infix", str(run))
    (answer,) = read_lines(OLD / "infix-generated.jsonl")
    answer["generated"] = answer["generated"].strip()  # the old version left whitespace at the ends
    assert json.loads(succeed(commands, "generate", run, "--input", answer["word"])) == answer
    assert_resumes_as_before(commands, run, "infix")


def test_a_finished_encoder_run_keeps_its_head_and_resumes(commands, tmp_path):
    run = copy_old_run("encoder", tmp_path)
    assert_evaluates_as_before(commands, run, OLD / "encoder", str(run))
    succeed(commands, "export", run, "--to", "peft", "--out", tmp_path / "adapter")
    assert_exports_as_before(tmp_path / "adapter", OLD / "encoder-peft")
    assert_resumes_as_before(commands, run, "encoder")
