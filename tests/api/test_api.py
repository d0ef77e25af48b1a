"""The Python API does what the command does, in one process that is afterwards what it was before."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import ptune_dist
from tests.commands import Commands
from tests.conftest import TINY
from tests.processes import ROOT, process_env

VALIDATION = TINY / "data" / "validation.jsonl"


def content_of(output_dir: Path, **sections: dict) -> dict:
    """A config as nested dicts; `sections` are merged in."""
    content = {
        "output_dir": output_dir,
        "model": {"path": TINY / "causal"},
        "prompt": {"num_virtual_tokens": 4},
        "data": {
            "train": TINY / "data" / "train.jsonl",
            "validation": VALIDATION,
            "template": "{{ word }} =",
            "target": " {{ answer }}",
        },
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.05, "micro_batch_tokens": 1024},
        "evaluate": {"every": 2, "metrics": ["exact_match"], "num_samples": 0, "max_examples": 8},
        "checkpoint": {"every": 0},
    }
    return {key: value | sections.get(key, {}) if isinstance(value, dict) else value for key, value in content.items()}


def read_rows(count: int) -> list[dict]:
    return [json.loads(line) for line in VALIDATION.read_text().splitlines()[:count]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "run"
    ptune_dist.train(content_of(folder))
    return folder


def test_importing_the_package_imports_nothing_large():
    code = (
        "import sys, ptune_dist; assert not {'torch', 'deepspeed', 'transformers', 'pydantic'} & set(sys.modules);"
        "assert set(ptune_dist.__all__) <= set(dir(ptune_dist)); ptune_dist.UserError"
    )
    env = process_env()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_is_trained_and_watched_and_leaves_the_process_as_it_was(tmp_path, run):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    state = (sys.excepthook, threading.excepthook, os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
    seen: list[tuple[int, dict]] = []
    config = ptune_dist.load_config(content_of(tmp_path / "again"), {"deepspeed": "zero3_fp32"})
    summary = ptune_dist.train(config, on_metrics=lambda step, values: seen.append((step, values)))
    assert {number: signal.getsignal(number) for number in before} == before
    assert (sys.excepthook, threading.excepthook, os.environ.get("RANK"), os.environ.get("WORLD_SIZE")) == state
    assert not dist.is_initialized()
    lines = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    assert [values["train/loss"] for _, values in seen if "train/loss" in values] == [line["loss"] for line in lines]
    assert [step for step, values in seen if "validation/exact_match" in values] == [0, 2, 4]
    assert summary == json.loads((tmp_path / "again/summary.json").read_text())
    first = json.loads((run / "summary.json").read_text())  # another run of this process, at ZeRO stage 0
    assert summary["validation"]["loss"] == pytest.approx(first["validation"]["loss"], rel=1e-5)


def test_answers_scores_and_evaluations_are_those_of_the_command(run, tmp_path, commands: Commands):
    rows = read_rows(6)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = [
        commands.start("generate", run, "--input-file", file, "--output", tmp_path / "answers.jsonl"),
        commands.start("evaluate", run, f"data.validation={file}", "--output", tmp_path / "scores.jsonl"),
    ]
    prompt = ptune_dist.load(run)
    answers = prompt.generate(rows)
    scores = prompt.score(rows)
    assert not dist.is_initialized()
    for each in started:
        done = commands.finish(each)
        assert done.code == 0, done.err
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers == [line["generated"] for line in written]
    assert len(set(answers)) > 1
    assert prompt.generate(rows[0]["word"]) == prompt.generate(rows[0]) == answers[:1]
    written = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in scores] == pytest.approx([line["loss"] for line in written], rel=1e-5)
    assert [row["gold"] for row in scores] == [row["answer"] for row in rows]
    assert prompt.score(rows[0])[0]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-5)
    evaluated = json.loads((run / "evaluation.json").read_text())
    found = ptune_dist.evaluate(run, {"data.validation": str(file)})
    assert json.loads(json.dumps(found)) == evaluated


def test_an_export_follows_the_overrides_of_load(run, tmp_path):
    moved = tmp_path / "base"
    moved.symlink_to(TINY / "causal")
    lost = tmp_path / "run"
    shutil.copytree(run, lost)
    config = (lost / "config.yaml").read_text()
    (lost / "config.yaml").write_text(config.replace(str(TINY / "causal"), str(tmp_path / "old")))
    prompt = ptune_dist.load(lost, overrides={"model.path": moved})
    assert (prompt.export("model", tmp_path / "model") / "model.safetensors").exists()


def test_an_attached_model_answers_as_the_command_does(run):
    prompt = ptune_dist.load(run)
    rows = read_rows(6)
    model = AutoModelForCausalLM.from_pretrained(TINY / "causal", dtype=torch.float32)
    inputs = prompt.encode(rows)
    how = {"max_new_tokens": 12, "do_sample": False}
    with prompt.attach(model):
        found = model.generate(**inputs, **how)
    plain = model.generate(**inputs, **how)
    width = inputs["input_ids"].shape[1]
    texts = [text.strip() for text in prompt.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)]
    assert texts == prompt.generate(rows, max_new_tokens=12)
    assert not found[:, width:].equal(plain[:, width : found.shape[1]])


def test_a_finished_run_has_a_page_of_its_own(run):
    page = (run / "report.html").read_text()
    assert all(
        text in page
        for text in ("base without prompt", "before training", "trained prompt", "peak memory, MiB", "<svg")
    )
    first = json.loads(re.search(r"const rows = (.*);\n", page).group(1))[0]
    assert first["input"] == f"{read_rows(1)[0]['word']} =" and first["gold"] == read_rows(1)[0]["answer"]


def test_live_curves_hold_the_numbers_that_a_run_reports():
    curves = ptune_dist.LiveCurves()
    for step, loss in enumerate((3.0, 2.0, 1.0), 1):
        curves(step, {"train/loss": loss, "train/grad_norm": 9.0})
    curves(3, {"validation/loss": 1.5, "validation/accuracy": 0.5})
    assert curves.points["train/loss"] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    charts = curves.svg().split("</svg>")[:-1]
    assert ["train/loss" in chart and "validation/loss" in chart for chart in charts] == [True, False]
    assert "accuracy" in charts[1] and "grad_norm" not in curves.svg()


def test_mistakes_are_exceptions_that_name_the_key(run):
    with pytest.raises(ptune_dist.UserError, match=r"^config: unknown key train.lr"):
        ptune_dist.load_config(content_of(run, train={"lr": 0.1}))
    with pytest.raises(ptune_dist.UserError, match="rows does not have; did you mean 'wrd'"):
        ptune_dist.load(run).generate([{"wrd": "x"}])
    with pytest.raises(ptune_dist.UserError, match="inputs: there are none"):
        ptune_dist.load(run).generate([])
    wrong = {"temperature": 0, "top_k": -1, "top_p": 3.0, "max_new_tokens": 0, "seed": 0.5}
    for name, value in wrong.items():
        with pytest.raises(ptune_dist.UserError, match=f"^{name}: {value} is not "):
            ptune_dist.load(run).generate("x", **{name: value})
    for ask in (ptune_dist.load(run).generate, ptune_dist.load(run).score):
        with pytest.raises(ptune_dist.UserError, match="^inputs: give a row .*, not int"):
            ask(5)
    with pytest.raises(ptune_dist.UserError, match="there is no such folder"):
        ptune_dist.load(run / "nothing")
    assert not dist.is_initialized()


def test_an_interrupted_run_is_saved_and_resumed_by_the_same_call(tmp_path):
    content = content_of(tmp_path / "run", evaluate={"every": 0})

    def interrupt(step: int, values: dict) -> None:
        if step == 2 and "train/loss" in values:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="train the same config again"):
        ptune_dist.train(content, on_metrics=interrupt)
    assert not dist.is_initialized() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    steps: list[int] = []
    summary = ptune_dist.train(content, on_metrics=lambda step, _: steps.append(step))
    assert summary["steps"] == 4 and min(step for step in steps if step) == 3


def test_a_run_may_be_trained_in_a_thread_and_an_error_of_the_callers_own_ends_it(tmp_path):
    caught: list[Exception] = []

    def work() -> None:
        try:
            ptune_dist.train(content_of(tmp_path / "run"), on_metrics=lambda *_: 1 // 0)
        except ZeroDivisionError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1 and not dist.is_initialized()
    assert ptune_dist.train(content_of(tmp_path / "run"))["steps"] == 4
