"""A prompt folder comes back as it was stored, and what cannot be read is named."""

import json
import shutil

import pytest
import torch

from ptune_dist.errors import UserError
from ptune_dist.prompts.store import load_prompt, save_prompt

TENSORS = {"virtual_tokens": torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), "other": torch.zeros(())}
FACTS = {"method": "prompt_tuning", "step": 7, "validation": {"loss": 0.5}, "base": {"path": "ü/base"}}


def test_tensors_and_facts_come_back_bit_for_bit(tmp_path):
    save_prompt(tmp_path / "run" / "prompt", TENSORS, FACTS)
    tensors, facts = load_prompt(tmp_path / "run" / "prompt")
    assert facts == FACTS and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_tensor_file_is_whole_by_itself_and_the_json_says_the_same(tmp_path):
    save_prompt(tmp_path / "a", TENSORS, FACTS)
    assert json.loads((tmp_path / "a" / "prompt.json").read_text()) == FACTS
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "prompt.safetensors", tmp_path / "b")
    assert load_prompt(tmp_path / "b")[1] == FACTS


def test_a_better_prompt_takes_the_place_of_the_one_before(tmp_path):
    save_prompt(tmp_path, TENSORS, FACTS)
    save_prompt(tmp_path, {"virtual_tokens": torch.ones(2, 2)}, FACTS | {"step": 9})
    tensors, facts = load_prompt(tmp_path)
    assert torch.equal(tensors["virtual_tokens"], torch.ones(2, 2)) and facts["step"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompt.json", "prompt.safetensors"]


def error_of(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_prompt(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_prompt_says_that_the_run_has_not_trained(tmp_path):
    assert error_of(tmp_path / "prompt").startswith(f"{tmp_path}/prompt/prompt.safetensors: ")
    assert "has the run trained?" in error_of(tmp_path / "prompt")


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", lambda data: b"{}" * 20])
def test_a_damaged_prompt_is_named(tmp_path, damage):
    save_prompt(tmp_path, TENSORS, FACTS)
    file = tmp_path / "prompt.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in error_of(tmp_path)


def test_a_tensor_file_of_someone_else_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "prompt.safetensors")
    assert str(tmp_path / "prompt.safetensors") in error_of(tmp_path)
