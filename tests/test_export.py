"""What `export` writes: PEFT's adapter folder, and the tensors of vLLM's prompt-embeds input."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ptune_dist.errors import UserError
from ptune_dist.export import export_peft, export_prompt_embeds

VECTORS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
FACTS = {
    "num_virtual_tokens": 4,
    "width": 8,
    "base": {"path": "/bases/tiny", "num_layers": 2, "num_attention_heads": 3},
}


def test_the_peft_adapter_is_one_tensor_and_a_configuration_that_peft_reads_as_prompt_tuning(tmp_path):
    from peft import PeftConfig, PromptTuningConfig

    export_peft({"virtual_tokens": VECTORS}, FACTS, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"] and torch.equal(tensors["prompt_embeddings"], VECTORS)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, PromptTuningConfig)
    assert (config.task_type, config.base_model_name_or_path, config.inference_mode) == (
        "CAUSAL_LM",
        "/bases/tiny",
        True,
    )
    assert (config.num_virtual_tokens, config.token_dim, config.num_layers) == (4, 8, 2)
    assert (config.num_attention_heads, config.num_transformer_submodules) == (3, 1)


def test_prompt_embeds_are_the_virtual_tokens_followed_by_each_inputs_embeddings(tmp_path):
    embed = torch.nn.Embedding(10, 8)
    export_prompt_embeds({"virtual_tokens": VECTORS}, embed, [[1, 2, 3], []], torch.float32, tmp_path)
    tensors = load_file(tmp_path / "prompt_embeds.safetensors")
    assert set(tensors) == {"virtual_tokens", "prompt_embeds.0", "prompt_embeds.1"}
    assert torch.equal(tensors["virtual_tokens"], VECTORS)
    assert torch.equal(tensors["prompt_embeds.0"], torch.cat([VECTORS, embed.weight[[1, 2, 3]]]))
    assert torch.equal(tensors["prompt_embeds.1"], VECTORS)


def test_prompt_embeds_are_in_the_bases_dtype(tmp_path):
    embed = torch.nn.Embedding(10, 8, dtype=torch.bfloat16)
    export_prompt_embeds({"virtual_tokens": VECTORS}, embed, [[5]], torch.bfloat16, tmp_path)
    tensors = load_file(tmp_path / "prompt_embeds.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["prompt_embeds.0"][4:], embed.weight[[5]])


def test_without_inputs_the_virtual_tokens_stand_alone(tmp_path):
    export_prompt_embeds({"virtual_tokens": VECTORS}, None, [], torch.float32, tmp_path)
    assert list(load_file(tmp_path / "prompt_embeds.safetensors")) == ["virtual_tokens"]


def test_an_earlier_export_is_replaced(tmp_path):
    for vectors in (VECTORS, 2 * VECTORS):
        export_peft({"virtual_tokens": vectors}, FACTS, tmp_path)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], 2 * VECTORS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--out: {tmp_path}/file"):
        export_peft({"virtual_tokens": VECTORS}, FACTS, tmp_path / "file")
