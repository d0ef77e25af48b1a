"""Invariant 6: a run that is killed at any moment and started again ends where the undisturbed run ends."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from ptune_dist.run.checkpoint import list_checkpoints, load_checkpoint
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_command, run_module, start_ranks, wait_for_ranks
from tests.conftest import write_config
from tests.processes import ROOT

NUM_STEPS = 24
ZERO3 = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 100, "stage3_param_persistence_threshold": 0}}


def write_run(folder: Path, deepspeed: dict = ZERO3, num_steps: int = NUM_STEPS, every: int = 6, **model) -> Path:
    folder.mkdir()
    return write_config(
        folder / "config.json",
        output_dir=str(folder / "run"),
        model=model,
        train={"max_steps": num_steps, "learning_rate": 0.02, "schedule": "cosine"},
        checkpoint={"every": every, "keep": 100},
        deepspeed=deepspeed,
    )


def kill_during(config: Path, *, num_ranks: int, after_step: int) -> None:
    """Start training and kill -9 every rank, whatever it does, once `after_step` has been logged."""
    started = start_ranks("ptune_dist", ["train", str(config)], config.parent, num_ranks)
    metrics = config.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < after_step:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for rank in started:
        os.kill(rank.pid, signal.SIGKILL)
    assert wait_for_ranks(started) == [-signal.SIGKILL] * num_ranks, "training ended before it could be killed"


def train(config: Path, *overrides: str, num_ranks: int) -> Path:
    done = run_command("train", str(config), *overrides, num_ranks=num_ranks)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return config.parent / "run"


def losses(run: Path, num_steps: int = NUM_STEPS) -> list[float]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))  # each step once
    return [line["loss"] for line in lines]


def final_files(run: Path, num_steps: int = NUM_STEPS) -> list[bytes]:
    last = run / "checkpoints" / f"step-{num_steps:08d}"
    return [(last / name).read_bytes() for name in ("prompt.safetensors", "optimizer.safetensors")]


@pytest.mark.long
def test_a_killed_run_resumes_exactly_and_at_another_world_size_or_stage_to_1e_5(tmp_path):
    undisturbed = train(write_run(tmp_path / "undisturbed"), num_ranks=2)
    config = write_run(tmp_path / "killed")
    kill_during(config, num_ranks=2, after_step=13)
    begun = len(list_checkpoints(tmp_path / "killed" / "run" / "checkpoints"))
    assert 2 <= begun < NUM_STEPS // 6
    one, four = write_run(tmp_path / "one"), write_run(tmp_path / "four")
    for other in (one, four):
        shutil.copytree(config.parent / "run", other.parent / "run")

    resumed = train(config, num_ranks=2)
    assert losses(resumed) == losses(undisturbed)
    assert final_files(resumed) == final_files(undisturbed)

    # from 2 ranks to 1 and back
    for num_ranks in (1, 2):
        run = train(one, f"output_dir={tmp_path}/one/run", num_ranks=num_ranks)
        assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
        (run / "summary.json").unlink()
        shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])

    stage2 = ROOT / "configs" / "deepspeed" / "zero2_fp32.json"
    run = train(four, f"output_dir={tmp_path}/four/run", f"deepspeed={stage2}", num_ranks=4)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)


@pytest.mark.long
def test_a_bf16_run_resumes_bitwise_from_its_float32_masters_at_every_stage(llama, tmp_path):
    specs, num_steps = [], 6  # few: bfloat16 is slow on a CPU without instructions for it
    model = {"path": str(llama), "dtype": "bfloat16"}
    for stage in range(4):
        deepspeed = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        specs.append([str(write_run(tmp_path / f"stage{stage}", deepspeed, num_steps, every=2, **model)), []])
    train_many(specs, tmp_path)
    resumed = []
    for config, _ in specs:
        run, copy = Path(config).parent / "run", Path(config).parent / "resumed"
        shutil.copytree(run, copy)
        (copy / "summary.json").unlink()
        for checkpoint in list_checkpoints(copy / "checkpoints")[1:]:  # as if it had been killed before step 4
            shutil.rmtree(checkpoint)
        resumed.append([config, [f"output_dir={copy}"]])
    train_many(resumed, tmp_path)
    for config, _ in specs:
        run, copy = Path(config).parent / "run", Path(config).parent / "resumed"
        assert losses(copy, num_steps) == losses(run, num_steps)
        assert final_files(copy, num_steps) == final_files(run, num_steps)


def train_many(specs: list, folder: Path) -> None:
    """Train several configs in one process."""
    file = folder / "specs.json"
    file.write_text(json.dumps(specs))
    done = run_module(str(Path(__file__).with_name("train_many.py")), str(file))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_a_checkpoint_holds_the_prompt_and_its_optimizer_and_nothing_of_the_base(tmp_path):
    config = write_run(tmp_path / "small")
    run = train(config, "train.max_steps=3", num_ranks=1)
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    snapshot = load_checkpoint(checkpoint)
    assert {name: tuple(t.shape) for name, t in snapshot.prompt.items()} == {"prompt/virtual_tokens": (4, 160)}
    assert set(snapshot.optimizer) == {f"prompt/virtual_tokens.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert size < 4 * (4 * 160 * 4) + 65536  # four times the prompt's bytes and 64 kB, for any base
