"""A run stops and is resumed: finished, refused, interrupted, damaged, diverged, out of disk. Nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptune_dist.run.checkpoint import list_checkpoints, load_checkpoint
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import Finished
from tests.conftest import TINY, build_tiny_base, extended_beyond, write_config
from tests.processes import ROOT, process_env

VALIDATION = str(TINY / "data" / "validation.jsonl")


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def prompt_of(run: Path) -> torch.Tensor:
    return load_file(run / "prompt" / "prompt.safetensors")["virtual_tokens"]


def curve_of(run: Path) -> list[tuple[int, float, float, float]]:
    return [(m["step"], m["loss"], m["learning_rate"], m["grad_norm"]) for m in read_metrics(run)]


def only_error(finished: Finished, code: int) -> str:
    """The one line of a command that ended badly."""
    assert finished.code == code, finished.err
    assert len(finished.err.splitlines()) == 1 and len(finished.errors) == 1, finished.err
    return finished.errors[0]


# Going on


def test_a_finished_run_is_not_started_again_and_is_resumed_only_as_it_began(commands, tmp_path):
    evaluate = {"every": 2, "max_examples": 4, "max_new_tokens": 2}
    config = write_config(
        tmp_path / "c.yaml",
        data={"validation": VALIDATION},
        train={"max_steps": 4},
        evaluate=evaluate,
        checkpoint={"every": 2},
    )
    run = tmp_path / "run"
    assert commands.run("train", config).code == 0
    before = files_of(run)

    again = commands.run("train", config)
    assert (again.code, again.err) == (0, "") and "finished" in again.out and str(run) in again.out
    message = only_error(commands.run("train", config, "train.resume=never"), 2)
    assert str(run) in message and "train.resume" in message
    message = only_error(commands.run("train", config, "train.learning_rate=0.1", "train.max_steps=9"), 2)
    assert "train.learning_rate 0.05, not 0.1" in message and str(run) in message
    only_error(commands.run("train", config, "train.max_steps=9", f"data.validation={tmp_path}/no.jsonl"), 2)
    assert files_of(run) == before  # none of the four changed a byte

    further = commands.run("train", config, "train.max_steps=6")
    assert (further.code, further.err) == (0, "")
    assert [m["step"] for m in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "summary.json").read_text())["steps"] == 6

    # How a run is judged may change; the best prompt by the metric before does not count against the new one.
    judged = commands.run("train", config, "train.max_steps=8", "evaluate.metrics=[exact_match]")
    assert (judged.code, judged.err) == (0, "")
    assert "exact_match" in json.loads((run / "summary.json").read_text())["validation"]


def test_a_start_that_failed_is_no_run(commands, tmp_path):
    config, run = write_config(tmp_path / "c.yaml", train={"max_steps": 2}), tmp_path / "run"
    only_error(commands.run("train", config, "data.max_length=5"), 2)
    only_error(commands.run("train", config, "data.template='{{ wrd }}'"), 2)
    finished = commands.run("train", config, "train.learning_rate=0.2", "train.resume=never")
    assert (finished.code, finished.err) == (0, "")
    assert read_metrics(run)[0]["learning_rate"] == 0.2


def test_changed_rows_are_refused_and_the_run_is_left_as_it_was(commands, tmp_path):
    rows = Path(shutil.copy(TINY / "data" / "train.jsonl", tmp_path / "rows.jsonl"))
    config = write_config(
        tmp_path / "c.yaml", data={"train": str(rows)}, train={"max_steps": 2}, checkpoint={"every": 1}
    )
    assert commands.run("train", config).code == 0
    before = files_of(tmp_path / "run")
    rows.write_text(rows.read_text().replace("RECIPES", "RECIPE"))
    message = only_error(commands.run("train", config, "train.max_steps=4"), 2)
    assert "data.train" in message and str(rows) in message
    assert files_of(tmp_path / "run") == before


# Interruptions


@pytest.fixture(scope="module")
def unbroken(commands, tmp_path_factory) -> tuple[Path, Path]:
    """The config and the folder of a run of 60 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(
        folder / "c.yaml", train={"max_steps": 60, "schedule": "cosine"}, checkpoint={"every": 10, "keep": 3}
    )
    assert commands.run("train", config).code == 0
    return config, folder / "run"


def assert_same_result(run: Path, unbroken: Path) -> None:
    assert torch.equal(prompt_of(run), prompt_of(unbroken))
    assert curve_of(run) == curve_of(unbroken)


@pytest.mark.long
@pytest.mark.parametrize(
    "number",
    extended_beyond([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]),
    ids=lambda number: number.name,
)
def test_a_run_that_is_asked_to_stop_saves_ends_with_75_and_resumes_to_the_same_result(
    commands, unbroken, tmp_path, number
):
    config, whole = unbroken
    run = tmp_path / "run"
    for num_lines in (5, 17):  # twice, at whatever step it is
        started = commands.start("train", config, f"output_dir={run}", "checkpoint.every=0")
        started.wait_for(run / "metrics.jsonl", num_lines)
        os.kill(started.pid, number)
        stopped = commands.finish(started)
        assert (stopped.code, stopped.err) == (75, "")
        step = load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).step
        assert num_lines <= step < 60 and f"stopped at step {step}" in stopped.out
        assert read_metrics(run)[-1]["step"] == step and not (run / "summary.json").exists()
    assert commands.run("train", config, f"output_dir={run}").code == 0
    assert_same_result(run, whole)


@pytest.mark.long
def test_a_killed_run_resumes_from_its_last_checkpoint_to_the_same_result(commands, unbroken, tmp_path):
    config, whole = unbroken
    run = tmp_path / "run"
    for num_lines in (3, 15, 37):  # before the first checkpoint, and between two
        started = commands.start("train", config, f"output_dir={run}")
        started.wait_for(run / "metrics.jsonl", num_lines)
        os.kill(started.pid, signal.SIGKILL)
        assert commands.finish(started).code == -signal.SIGKILL
    assert commands.run("train", config, f"output_dir={run}").code == 0
    assert_same_result(run, whole)


def test_a_stopped_run_may_be_ended_where_it_stands(commands, unbroken, tmp_path):
    config, _ = unbroken
    run = tmp_path / "run"
    more = (f"output_dir={run}", f"data.validation={VALIDATION}", "evaluate.every=0", "evaluate.max_examples=4",
            "evaluate.num_samples=0")  # fmt: skip
    started = commands.start("train", config, *more)
    started.wait_for(run / "metrics.jsonl", 5)
    os.kill(started.pid, signal.SIGTERM)
    assert commands.finish(started).code == 75
    step = read_metrics(run)[-1]["step"]
    ended = commands.run("train", config, *more, f"train.max_steps={step}")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads((run / "summary.json").read_text())["validation"]["loss"] > 0
    assert prompt_of(run).shape == (4, 160)


# Damage


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(commands, unbroken, tmp_path):
    config, whole = unbroken
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "summary.json").unlink()
    newest, *others = reversed(list_checkpoints(run / "checkpoints"))
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    finished = commands.run("train", config, f"output_dir={run}")
    assert finished.code == 0
    assert len([line for line in (finished.out + finished.err).splitlines() if str(file) in line]) == 1
    assert_same_result(run, whole)
    assert load_checkpoint(newest).step == 60  # made good

    (run / "summary.json").unlink()
    for folder in (newest, *others):
        (folder / "prompt.safetensors").write_bytes(b"")
    before = files_of(run)
    finished = commands.run("train", config, f"output_dir={run}")
    message = only_error(finished, 1)
    assert "all checkpoints are damaged" in message and str(run / "checkpoints") in message
    assert all(str(folder) in finished.out for folder in (newest, *others))
    assert json.loads((run / "status.json").read_text())["reason"] in message
    assert files_of(run) | {"status.json": b""} == before | {"status.json": b""}


# Divergence


def diverge(commands, folder: Path, **sections) -> tuple[Path, Finished, Path]:
    """A run on learned positions whose plain, unclipped steps throw the prompt out of float32's range after a few."""
    config = write_config(
        folder / "c.yaml", model={"path": str(build_tiny_base("gpt2", folder / "base"))},
        train={"max_steps": 100, "optimizer": "sgd", "momentum": 0.999, "learning_rate": 1e21, "max_grad_norm": 0,
               "schedule": "constant"},
        checkpoint={"every": 1, "keep": 4}, **sections,
    )  # fmt: skip
    finished = commands.run("train", config)
    return folder / "run", finished, config


def test_a_loss_that_is_not_finite_ends_the_run_with_the_step_and_the_rows(commands, tmp_path):
    run, finished, config = diverge(commands, tmp_path)
    message = only_error(finished, 1)
    last = read_metrics(run)[-1]["step"]
    assert 2 <= last < 100
    assert f"the loss is nan at step {last + 1}" in message
    assert message.count("train.jsonl line ") == 3 and str(run) in message
    assert all(m["loss"] < 100 for m in read_metrics(run))
    assert [load_checkpoint(path).step for path in list_checkpoints(run / "checkpoints")] == list(
        range(last - 3, last + 1)
    )
    before = files_of(run / "checkpoints")
    assert only_error(commands.run("train", config), 1) == message  # again the same, from the last checkpoint
    assert files_of(run / "checkpoints") == before


def test_a_prompt_whose_validation_is_not_finite_is_never_the_best_and_ends_the_run(commands, tmp_path):
    run, finished, _ = diverge(
        commands, tmp_path, data={"validation": VALIDATION},
        evaluate={"every": 1, "max_examples": 4, "num_samples": 0},
    )  # fmt: skip
    last = read_metrics(run)[-1]["step"]
    assert f"the validation loss is nan at step {last}" in only_error(finished, 1)
    assert load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).step == last  # saved before it was judged
    facts = json.loads((run / "prompt" / "prompt.json").read_text())
    assert facts["validation"]["loss"] < 100, "the best prompt was overwritten by one that gives nan"


def test_a_base_that_holds_nan_ends_the_run_at_its_first_step(commands, tmp_path):
    from safetensors.torch import save_file

    base = Path(shutil.copytree(TINY / "causal", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    finished = commands.run("train", write_config(tmp_path / "c.yaml", model={"path": str(base)}))
    assert "the loss is nan at step 1" in only_error(finished, 1)


# A full disk


def run_on_small_disk(folder: Path, size: str, **sections) -> tuple[subprocess.CompletedProcess, Path]:
    """Train into a file system of `size`, seen by that process alone; what it left is copied to `folder`/left."""
    probe = ["mount", "-t", "tmpfs", "none", str(folder)]
    ways = [["unshare", "-m"], ["unshare", "-rm"]]  # as root, and as the root of a user namespace
    able = [way for way in ways if subprocess.run([*way, *probe], capture_output=True).returncode == 0]
    if not able:
        pytest.skip("no file system can be mounted here")
    disk, left = folder / "disk", folder / "left"
    disk.mkdir()
    config = write_config(folder / "c.yaml", output_dir=str(disk / "run"), **sections)
    train = f"{sys.executable} -m ptune_dist train {config}"
    script = f"mount -t tmpfs -o size={size} none {disk} && {train}; s=$?; cp -r {disk}/run {left}; exit $s"
    finished = subprocess.run(
        [*able[0], "sh", "-c", script], cwd=ROOT, env=process_env(), capture_output=True, text=True, timeout=120
    )
    return finished, left


def test_a_full_disk_while_saving_is_one_line_and_the_checkpoints_before_are_whole(tmp_path):
    finished, left = run_on_small_disk(
        tmp_path, "400k", prompt={"num_virtual_tokens": 64}, train={"max_steps": 40}, checkpoint={"every": 2, "keep": 9}
    )
    error = only_error(Finished(finished.returncode, finished.stdout, finished.stderr), 1)
    assert "cannot save the checkpoint of step" in error and "No space left on device" in error
    kept = [load_checkpoint(path).step for path in list_checkpoints(left / "checkpoints")]
    assert kept == list(range(2, 2 * len(kept) + 1, 2)) and kept
    assert f"step-{kept[-1]:08d} is kept" in error and f"step {kept[-1] + 2}:" in error
    assert {path.name for path in (left / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in kept}


def test_a_full_disk_while_writing_metrics_is_one_line_too(tmp_path):
    finished, left = run_on_small_disk(tmp_path, "24k", train={"max_steps": 400})
    error = only_error(Finished(finished.returncode, finished.stdout, finished.stderr), 1)
    assert "No space left on device" in error and "disk/run" in error
