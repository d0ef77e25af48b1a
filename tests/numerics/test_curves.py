"""Invariants 1, 2 and 3: the base stays bitwise what it was, and the loss curve is that of a plain loop and of PEFT,
for every architecture, ZeRO stage, number of ranks and size of micro-batch."""

import json
from pathlib import Path

import pytest
import torch

from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_module
from tests.conftest import ARCHITECTURES, extended_beyond, write_config
from tests.numerics.plain import NUM_VIRTUAL, peft_curve, plain_curve, write_initial_prompt

SCRIPT = str(Path(__file__).with_name("train_many.py"))
WIDTHS = {"opt": 16}  # of embeddings, where not 32


def zero_json(stage: int, **more) -> dict:
    """DeepSpeed's JSON with buffers so small that a tiny base is really cut, gathered and reduced in pieces."""
    zero = {"stage": stage, "reduce_bucket_size": 100, "stage3_param_persistence_threshold": 0}
    return {"zero_optimization": (zero if stage == 3 else {"stage": stage}) | more}


def write_spec(folder: Path, base: Path, name: str, deepspeed: dict, overrides: list[str]) -> tuple[str, list[str]]:
    run = folder / name
    run.mkdir(parents=True)
    config = write_config(
        run / "config.json",
        output_dir=str(run),
        model={"path": str(base)},
        prompt={
            "num_virtual_tokens": NUM_VIRTUAL,
            "init": "file",
            "init_file": str(write_initial_prompt(WIDTHS.get(base.name, 32), run / "initial.safetensors")),
        },
        deepspeed=deepspeed,
    )
    return str(config), overrides


def train_all(
    specs: list[tuple[str, list[str]]], folder: Path, num_ranks: int, script: str = SCRIPT, **how
) -> dict[str, Path]:
    """Train every spec in one launch; the run folders by name."""
    file = folder / f"specs-{num_ranks}.json"
    file.write_text(json.dumps(specs))
    done = run_module(script, str(file), num_ranks=num_ranks, timeout=600, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {Path(config).parent.name: Path(config).parent for config, _ in specs}


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def assert_base_untouched(run: Path, base: Path) -> None:
    """Bitwise what it was after loading, and all of what the file holds."""
    from safetensors.torch import load_file

    hashes = json.loads((run / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"]
    assert hashes["num_elements"] >= sum(t.numel() for t in load_file(base / "model.safetensors").values())


@pytest.mark.long
def test_every_architecture_trains_as_a_plain_loop_and_as_peft_does(tiny_bases, tmp_path):
    specs = [write_spec(tmp_path, tiny_bases[kind], kind, zero_json(0), []) for kind in ARCHITECTURES]
    runs = train_all(specs, tmp_path, num_ranks=1)
    for kind in ARCHITECTURES:
        ours = curve(runs[kind])
        assert min(line["grad_norm"] for line in read_metrics(runs[kind])) > 1e-3, kind  # the prompt is felt
        assert ours == pytest.approx(plain_curve(tiny_bases[kind]), rel=1e-5), kind
        assert ours == pytest.approx(peft_curve(tiny_bases[kind]), rel=1e-5), kind
        assert_base_untouched(runs[kind], tiny_bases[kind])


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", extended_beyond([1, 2], [1, 2, 4]))  # four ranks: test_sharding
def test_the_curve_depends_on_no_stage_no_world_size_no_micro_batch(tiny_bases, tmp_path, num_ranks):
    base = tiny_bases["llama"]
    expected = plain_curve(base)
    specs = [write_spec(tmp_path, base, "stage1", zero_json(1), [])]  # the others: test_sharding
    for stage in (0, 2, 3):  # 60 positions: one to three rows at a time, an uneven number of micro-batches
        specs.append(write_spec(tmp_path, base, f"small{stage}", zero_json(stage), ["train.micro_batch_tokens=60"]))
    for name, run in train_all(specs, tmp_path, num_ranks).items():
        assert curve(run) == pytest.approx(expected, rel=1e-5), name
        assert_base_untouched(run, base)


@pytest.mark.long
def test_sharded_training_of_every_architecture_is_the_plain_loop(tiny_bases, tmp_path):
    kinds = [kind for kind in ARCHITECTURES if kind != "llama"]
    specs = [write_spec(tmp_path, tiny_bases[kind], kind, zero_json(3), []) for kind in kinds]
    runs = train_all(specs, tmp_path, num_ranks=2)
    for kind in kinds:
        assert curve(runs[kind]) == pytest.approx(plain_curve(tiny_bases[kind]), rel=1e-5), kind
        assert_base_untouched(runs[kind], tiny_bases[kind])


@pytest.mark.long
def test_adafactor_and_sgd_step_as_torch_does_on_whole_tensors_whatever_the_stage(tiny_bases, tmp_path):
    base = tiny_bases["gpt2"]
    builders = {
        "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.05),
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    }
    specs = [
        write_spec(
            tmp_path, base, f"{name}{stage}", zero_json(stage), [f"train.optimizer={name}", "train.momentum=0.9"]
        )
        for name in builders
        for stage in (0, 3)  # the others: the test above, with AdamW
    ]
    for name, run in train_all(specs, tmp_path, num_ranks=2).items():
        assert curve(run) == pytest.approx(plain_curve(base, builders[name[:-1]]), rel=1e-5), name
