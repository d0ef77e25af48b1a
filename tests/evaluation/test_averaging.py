"""The mean of the last checkpoints' prompts."""

import pytest
import torch

from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.evaluation.averaging import average
from ptune_dist.run.checkpoint import Snapshot, save_checkpoint
from tests.conftest import TINY, write_config

VALIDATION = f"data.validation={TINY}/data/validation.jsonl"


def test_the_mean_is_that_of_the_tensors_and_a_damaged_checkpoint_is_left_out(tmp_path):
    tensors = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    folders = []
    for step, tensor in enumerate(tensors):
        prompt = {"prompt/virtual_tokens": tensor, "prompt/places": torch.tensor([step])}
        folders.append(save_checkpoint(tmp_path, Snapshot(step, prompt, {"x": tensor}, {}), keep=9))
    mean = average(folders)
    assert torch.allclose(mean["prompt/virtual_tokens"], sum(tensors) / 3, atol=1e-6)
    assert mean["prompt/places"].tolist() == [2]
    (folders[0] / "prompt.safetensors").write_bytes(b"x")
    assert torch.allclose(average(folders)["prompt/virtual_tokens"], (tensors[1] + tensors[2]) / 2, atol=1e-6)
    assert average(folders[:2]) is None


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["train.average_last=1"], "train.average_last: 1 checkpoint is no mean"),
        (["train.average_last=2"], "train.average_last needs data.validation"),
        (["train.average_last=2", VALIDATION], "train.average_last: 2 needs checkpoint.every above 0 and"),
        (["train.average_last=3", VALIDATION, "checkpoint.every=5"], "and checkpoint.keep=3"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(tmp_path, overrides, says):
    with pytest.raises(UserError) as caught:
        load_config(write_config(tmp_path / "config.json"), overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)
