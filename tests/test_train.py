"""The loop as its users meet it: which prompt is kept, when it stops, what a run leaves."""

import html
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_command, run_commands
from tests.conftest import TINY, write_config

VALIDATION = {"validation": str(TINY / "data" / "validation.jsonl")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that gets worse after its first steps, so that early stopping and the best prompt have work to do."""
    folder = tmp_path_factory.mktemp("train")
    config = write_config(
        folder / "config.json", data=VALIDATION, prompt={"num_virtual_tokens": 10},
        train={"max_steps": 200, "batch_size": 4, "learning_rate": 3.0, "schedule": "constant", "max_grad_norm": 0},
        evaluate={"every": 5, "metrics": ["perplexity"], "patience": 2, "max_examples": 16, "num_samples": 2,
                  "max_new_tokens": 4},
        checkpoint={"every": 5, "keep": 2},
    )  # fmt: skip
    done = run_command("train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run"


@pytest.mark.long
def test_training_stops_after_patience_evaluations_without_a_better_one(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped_early"] and summary["steps"] < 200
    assert summary["steps"] == summary["best_step"] + 2 * 5
    assert len(read_metrics(run)) == summary["steps"]


def test_the_best_prompt_on_validation_is_kept_not_the_last(run):
    summary = json.loads((run / "summary.json").read_text())
    tensors, facts = load_prompt(run / "prompt")
    assert facts["step"] == summary["best_step"]
    assert facts["validation"] == summary["validation"]
    done = run_command("evaluate", str(run))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((run / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(summary["validation"]["loss"], rel=1e-6)
    assert json.loads((run / "prompt" / "prompt.json").read_text()) == facts
    assert tensors["virtual_tokens"].dtype == torch.float32


def test_a_run_leaves_what_the_readme_names(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "tensorboard",
        "checkpoints",
        "prompt",
        "summary.json",
    }
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    line = read_metrics(run)[0]
    assert set(line) >= {"step", "loss", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s",
                         "peak_memory_bytes", "time_s"}  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {"steps", "train_loss", "validation", "before", "samples_per_s", "tokens_per_s",
                            "peak_memory_bytes", "world_size", "zero_stage", "quantization", "wall_s",
                            "versions"}  # fmt: skip
    assert "truncated" in (run / "train.log").read_text().splitlines()[0]


def test_tensorboard_holds_the_scalars_and_the_generated_samples(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in read_metrics(run)], rel=1e-6)
    assert "validation/perplexity" in events.Tags()["scalars"]
    text = events.Tensors("validation/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| input | wanted | answer |")


def test_plain_text_trains_as_language_modelling_in_blocks(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 30, encoding="utf-8")
    config = write_config(
        tmp_path / "config.json", data={"train": str(text), "validation": str(text), "template": None, "target": None},
        train={"max_steps": 10, "learning_rate": 0.1}, evaluate={"metrics": ["perplexity"]},
    )  # fmt: skip
    done = run_command("train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation"]["loss"] < summary["before"]["loss"]


def test_sampling_flags_sample_and_the_seed_decides(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"word": "sample"}\n' * 8)
    sampling = ["--temperature", "3", "--top-p", "0.95", "--seed", "1"]
    flags = {"greedy": [], "once": sampling, "again": sampling, "other": [*sampling[:-1], "2"]}
    common = ["generate", str(run), "--input-file", str(rows), "--max-new-tokens", "8", "--output"]
    run_commands([[*common, str(tmp_path / name), *more] for name, more in flags.items()])
    answers = {
        name: [json.loads(line)["generated"] for line in (tmp_path / name).read_text().splitlines()] for name in flags
    }
    assert len(set(answers["greedy"])) == 1
    assert len(set(answers["once"])) > 1
    assert answers["again"] == answers["once"] != answers["other"]


def test_validate_and_env_tell_what_they_promise():
    done = run_command("validate", "configs/quickstart.yaml")
    assert done.returncode == 0, done.stderr
    for promised in ("num_virtual_tokens: 10", "512", "p50/p90/max", "truncated", "<virtual tokens>", '"stage": 3'):
        assert promised in done.stdout
    assert done.stdout.count("<virtual tokens>") == 5 and "[ RECIPES<eos>]" in done.stdout
    done = run_command("env")
    assert done.returncode == 0 and f"torch {torch.__version__}" in done.stdout and "deepspeed" in done.stdout


def test_a_loss_that_does_not_fall_is_named_after_a_tenth_of_the_steps(tmp_path):
    config = write_config(
        tmp_path / "config.json", data=VALIDATION, prompt={"num_virtual_tokens": 4},
        train={"max_steps": 100, "batch_size": 4, "learning_rate": 1e-9},
        evaluate={"metrics": ["loss"], "max_examples": 16, "num_samples": 0},
    )  # fmt: skip
    done = run_command("train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation"]["loss"] >= summary["base_without_prompt"]["loss"]
    assert done.stdout.splitlines()[-1] == f"warning: {summary['no_gain']}"
    assert summary["no_gain"] in html.unescape((tmp_path / "run" / "report.html").read_text())
    (line,) = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "has not fallen" in line]
    assert "warning: the loss has not fallen by 2% after 10 steps" in line
    assert "set train.learning_rate to the method's default, 0.3 (it is 1e-09)" in line
