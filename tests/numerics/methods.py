"""Runs of one method, in as few launches as possible: what the tests of methods share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ptune_dist.base.recompute import DEFAULTS
from tests.conftest import LABELS, write_config
from tests.numerics.plain import NUM_VIRTUAL
from tests.numerics.test_curves import curve, train_all, zero_json

Spec = tuple[str, list[str]]  # a config and overrides
FEW = 6  # steps of runs that are to agree with each other, after longer ones have been compared with PEFT's
STAGE3 = {"deepspeed": zero_json(3)}
RECOMPUTED = {"deepspeed": zero_json(3) | {"activation_checkpointing": DEFAULTS}}
INT8 = {"model": {"quantization": "int8"}}
BF16 = {"model": {"dtype": "bfloat16"}}
WAYS: dict[str, dict[str, Any]] = {  # of computing the same curve: the sections of a config
    **{f"stage{stage}": {"deepspeed": zero_json(stage)} for stage in range(4)},
    "recomputed": RECOMPUTED,
    "small": STAGE3 | {"train": {"micro_batch_tokens": 60}},
    "cached": STAGE3 | {"train": {"context_cache_gib": 0.01}},
    "int8-0": INT8,
    "int8-3": INT8 | STAGE3,
    "bf16-0": BF16,
    "bf16-3": BF16 | STAGE3,
}


def write_run(
    folder: Path, name: str, base: Path, prompt: dict, start: dict[str, torch.Tensor] | None = None, **sections
) -> tuple[str, list[str]]:
    """A config for `train_all` whose run is folder/NAME; the prompt starts from the tensors `start` where given."""
    run = folder / name
    run.mkdir(parents=True)
    if start is not None:
        save_file(
            {key: tensor.detach().clone().contiguous() for key, tensor in start.items()}, run / "start.safetensors"
        )
        prompt = prompt | {"init": "file", "init_file": str(run / "start.safetensors")}
    config = write_config(
        run / "config.json",
        output_dir=str(run),
        prompt={"num_virtual_tokens": NUM_VIRTUAL} | prompt,
        **{"deepspeed": zero_json(0)} | sections | {"model": {"path": str(base)} | sections.get("model", {})},
    )
    return str(config), []


def labelled(rows: Path) -> dict:
    """Section `data` for an encoder over rows with a column `label`."""
    return {"train": str(rows), "labels": LABELS, "target": "{{ label }}"}


def pick(*names: str) -> dict[str, dict[str, Any]]:
    """Some of WAYS."""
    return {name: WAYS[name] for name in names}


def write_ways(
    folder: Path, base: Path, prompt: dict, start: dict[str, torch.Tensor] | None, ways: dict[str, dict], **sections
) -> dict[str, Spec]:
    """Configs for `train_all` by way, of FEW steps each; `sections` are those of all."""
    specs = {}
    for way, own in ways.items():
        train = {"max_steps": FEW} | sections.get("train", {}) | own.get("train", {})
        specs[way] = write_run(folder, way, base, prompt, start, **sections | own | {"train": train})
    return specs


def check_ways(
    folder: Path, wanted: dict[str, list[float]], specs: dict[str, dict[str, tuple[str, list[str]]]]
) -> None:
    """Train configs of `write_ways` for several cases on two ranks in one launch; each has the wanted curve.

    int8 bases give the same whole and sharded, near the wanted one; so do those in bf16. No base changes.
    """
    train_all([spec for ways in specs.values() for spec in ways.values()], folder, num_ranks=2)
    for case, ways in specs.items():
        runs = {way: Path(config).parent for way, (config, _) in ways.items()}
        curves = {way: curve(run) for way, run in runs.items()}
        for way, run in runs.items():
            hashes = json.loads((run / "base_hashes.json").read_text())
            assert hashes["after"] == hashes["before"] and hashes["before"], (case, way)
            if not way.startswith(("int8", "bf16")):
                assert curves[way] == pytest.approx(wanted[case], rel=1e-5), (case, way)
        for kind, near, same in (("int8", 0.1, 1e-5), ("bf16", 0.05, 0.02)):
            found = {way: losses for way, losses in curves.items() if way.startswith(kind)}
            for way, losses in found.items():
                assert losses == pytest.approx(wanted[case], rel=near), (case, way)
            if len(found) == 2:
                assert found[f"{kind}-3"] == pytest.approx(found[f"{kind}-0"], rel=same), (case, kind)
