"""Runs of one method, in as few launches as possible: what the tests of methods share."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import LABELS, write_config
from tests.numerics.plain import NUM_VIRTUAL
from tests.numerics.test_curves import zero_json


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
