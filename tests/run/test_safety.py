"""A run is safe from its surroundings: another process in its directory, a dead launcher, the base's own settings for
generation, a missing prompt file."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.commands import Commands
from tests.conftest import TINY, build_tiny_base, write_config
from tests.processes import ROOT, command_line, process_env


def start(config: Path, num_ranks: int) -> subprocess.Popen:
    """Start training under torchrun, and return once three steps are logged."""
    process = subprocess.Popen(
        command_line("ptune_dist", "train", str(config), num_ranks=num_ranks),
        cwd=ROOT,
        env=process_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = config.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.long
def test_ranks_end_when_torchrun_is_killed_and_a_second_run_is_refused_while_they_train(
    commands: Commands, tmp_path: Path
):
    config = write_config(tmp_path / "config.json", train={"max_steps": 100_000})
    launcher = start(config, num_ranks=2)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    try:
        second = commands.run("train", str(config))
        assert second.code == 2 and "another process is training here" in second.err
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))  # they saved before they ended


@pytest.mark.long
def test_answers_do_not_depend_on_the_generation_config_of_the_base(commands: Commands, tmp_path: Path):
    config = write_config(
        tmp_path / "config.json",
        prompt={"num_virtual_tokens": 10},
        train={"max_steps": 60, "batch_size": 32},
        data={"validation": str(TINY / "data" / "validation.jsonl")},
        evaluate={"metrics": ["exact_match"], "every": 0, "max_examples": 64},
    )
    assert commands.run("train", str(config)).code == 0
    run = tmp_path / "run"
    expected = json.loads((run / "summary.json").read_text())["validation"]["exact_match"]
    base = Path(shutil.copytree(TINY / "causal", tmp_path / "base"))
    poison = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 3.0}
    (base / "generation_config.json").write_text(json.dumps(poison))
    done = commands.run("evaluate", str(run), f"model.path={base}")
    assert done.code == 0, done.err
    assert expected > 0.5 and json.loads((run / "evaluation.json").read_text())["exact_match"] == expected


def test_a_run_does_not_need_the_file_that_its_prompt_started_from(commands: Commands, tmp_path: Path):
    first = write_config(tmp_path / "config.json", train={"max_steps": 2})
    assert commands.run("train", str(first)).code == 0
    second = write_config(
        tmp_path / "second.json",
        output_dir=str(tmp_path / "second"),
        train={"max_steps": 2},
        prompt={"init": "file", "init_file": str(tmp_path / "run")},
    )
    assert commands.run("train", str(second)).code == 0
    shutil.rmtree(tmp_path / "run")
    done = commands.run("generate", str(tmp_path / "second"), "--input", "hello", "--max-new-tokens", "2")
    assert done.code == 0, done.err
    done = commands.run("train", str(second), "train.max_steps=3")
    assert done.code == 0, done.err


def test_answers_stop_at_the_last_learned_position(commands: Commands, tmp_path: Path):
    base = build_tiny_base("gpt2", tmp_path / "base")  # 128 positions
    config = write_config(
        tmp_path / "config.json",
        model={"path": str(base)},
        data={"max_length": 124},
        train={"max_steps": 1},
    )
    assert commands.run("train", str(config)).code == 0
    for length, max_tokens in ((100, 22), (121, 1), (122, 0)):  # 4 virtual tokens and " =" take positions as well
        done = commands.run(
            "generate", str(tmp_path / "run"), "--input", "x" * length, "--max-new-tokens", "200", "--temperature", "5"
        )
        assert done.code == 0, done.err[-1500:]
        assert len(json.loads(done.out)["generated"].encode()) <= 4 * max_tokens + 4


def test_a_run_that_stopped_early_is_resumed_without_patience(commands: Commands, tmp_path: Path):
    config = write_config(
        tmp_path / "config.json",
        data={"validation": str(TINY / "data" / "validation.jsonl")},
        train={"max_steps": 20, "learning_rate": 1e-9},
        evaluate={"every": 1, "patience": 1, "max_examples": 4, "num_samples": 0},
    )
    assert commands.run("train", str(config)).code == 0
    stopped_at = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert stopped_at < 20
    done = commands.run("train", str(config), "evaluate.patience=0")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20
