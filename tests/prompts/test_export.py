"""What `export` writes: PEFT's adapter folder, and the tensors of vLLM's prompt-embeds input."""

import base64
import io
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ptune_dist.errors import UserError
from ptune_dist.prompts.export import check_for_peft, export_peft, export_prompt_embeds, head_modules

VECTORS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
FACTS = {
    "method": "prompt_tuning",
    "num_virtual_tokens": 4,
    "width": 8,
    "base": {"path": "/bases/tiny", "family": "causal", "num_layers": 2, "num_attention_heads": 3},
}
HEAD = {"head.classifier.weight": torch.ones(3, 8), "head.bert.pooler.dense.weight": torch.zeros(8, 8)}


def facts_of(family: str) -> dict:
    return FACTS | {"base": FACTS["base"] | {"family": family}}


def test_the_peft_adapter_is_one_tensor_and_a_configuration_that_peft_reads_as_prompt_tuning(tmp_path):
    from peft import PeftConfig, PromptTuningConfig

    export_peft({"virtual_tokens": VECTORS}, FACTS, "CAUSAL_LM", tmp_path / "adapter")
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


def test_a_seq2seq_adapter_is_for_the_encoder_alone(tmp_path):
    export_peft({"virtual_tokens": VECTORS}, facts_of("seq2seq"), "SEQ_2_SEQ_LM", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["num_transformer_submodules"]) == ("SEQ_2_SEQ_LM", 1)
    assert config["modules_to_save"] is None
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], VECTORS)


def test_an_encoders_head_is_exported_as_modules_that_peft_saves(tmp_path):
    export_peft({"virtual_tokens": VECTORS} | HEAD, facts_of("encoder"), "SEQ_CLS", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["bert.pooler.dense", "classifier"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {
        "prompt_embeddings",
        "base_model.classifier.weight",
        "base_model.bert.pooler.dense.weight",
    }
    assert torch.equal(tensors["base_model.classifier.weight"], HEAD["head.classifier.weight"])


def test_a_head_of_several_layers_is_one_module_for_peft():
    names = ["classifier.dense.weight", "classifier.out_proj.bias", "pooler.dense.bias", "albert.pooler.weight"]
    assert head_modules(names) == ["albert.pooler", "classifier", "pooler"]


def test_a_head_cannot_go_with_prompt_embeds(tmp_path):
    with pytest.raises(UserError, match="--to prompt-embeds: .* classification head: use --to peft"):
        export_prompt_embeds({"virtual_tokens": VECTORS} | HEAD, None, [], torch.float32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def look_up(embed: torch.nn.Embedding):
    """As a base does it: vectors of one token or more."""

    def vectors(ids: list[int]) -> torch.Tensor:
        return torch.stack([embed.weight[i].detach() for i in ids])

    return vectors


def test_prompt_embeds_are_the_virtual_tokens_followed_by_each_inputs_embeddings(tmp_path):
    embed, inputs = torch.nn.Embedding(10, 8), [([], [1, 2, 3]), ([], [])]
    export_prompt_embeds({"virtual_tokens": VECTORS}, look_up(embed), inputs, torch.float32, tmp_path)
    tensors = load_file(tmp_path / "prompt_embeds.safetensors")
    assert set(tensors) == {"virtual_tokens", "prompt_embeds.0", "prompt_embeds.1"}
    assert torch.equal(tensors["virtual_tokens"], VECTORS)
    assert torch.equal(tensors["prompt_embeds.0"], torch.cat([VECTORS, embed.weight[[1, 2, 3]]]))
    assert torch.equal(tensors["prompt_embeds.1"], VECTORS)


def test_a_request_holds_what_vllm_reads_of_an_input(tmp_path):
    """As vLLM decodes it: base64 of `torch.save`, loaded with weights only; as many token ids as vectors."""
    embed, inputs = torch.nn.Embedding(10, 8), [([7], [1, 2, 3]), ([], [])]
    export_prompt_embeds({"virtual_tokens": VECTORS}, look_up(embed), inputs, torch.bfloat16, tmp_path, placeholder=9)
    tensors = load_file(tmp_path / "prompt_embeds.safetensors")
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    for number, (line, ids) in enumerate(zip(lines, [[7, 9, 9, 9, 9, 1, 2, 3], [9, 9, 9, 9]], strict=True)):
        request = json.loads(line)
        found = torch.load(io.BytesIO(base64.b64decode(request["prompt_embeds"], validate=True)), weights_only=True)
        assert found.dtype == torch.bfloat16 and torch.equal(found, tensors[f"prompt_embeds.{number}"])
        assert request["prompt_token_ids"] == ids and request["prompt_is_token_ids"] == [False] * len(ids)


def test_prompt_embeds_of_a_context_have_it_before_the_virtual_tokens(tmp_path):
    embed, inputs = torch.nn.Embedding(10, 8), [([1, 2, 3], []), ([4], [5, 6])]
    export_prompt_embeds({"virtual_tokens": VECTORS}, look_up(embed), inputs, torch.float32, tmp_path)
    tensors = load_file(tmp_path / "prompt_embeds.safetensors")
    assert torch.equal(tensors["prompt_embeds.0"], torch.cat([embed.weight[[1, 2, 3]], VECTORS]))
    assert torch.equal(tensors["prompt_embeds.1"], torch.cat([embed.weight[[4]], VECTORS, embed.weight[[5, 6]]]))


def test_prompt_embeds_are_in_the_bases_dtype(tmp_path):
    embed = torch.nn.Embedding(10, 8, dtype=torch.bfloat16)
    export_prompt_embeds({"virtual_tokens": VECTORS}, look_up(embed), [([], [5])], torch.bfloat16, tmp_path)
    tensors = load_file(tmp_path / "prompt_embeds.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["prompt_embeds.0"][4:], embed.weight[[5]])


def test_without_inputs_the_virtual_tokens_stand_alone(tmp_path):
    export_prompt_embeds({"virtual_tokens": VECTORS}, None, [], torch.float32, tmp_path)
    assert list(load_file(tmp_path / "prompt_embeds.safetensors")) == ["virtual_tokens"]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("infix", "--to peft: PEFT has no placement infix: use --to prompt-embeds"),
        ("template", "--to peft: PEFT has no placement template: use --to prompt-embeds"),
        ("decoder", "--to peft: PEFT has no placement decoder"),
    ],
)
def test_a_placement_that_peft_has_not_is_refused(placement, message):
    with pytest.raises(UserError) as caught:
        check_for_peft({}, FACTS | {"placement": placement})
    assert str(caught.value) == message
    check_for_peft({}, FACTS | {"placement": "prefix"})
    check_for_peft({}, FACTS | {"placement": "encoder"})


def test_an_earlier_export_is_replaced(tmp_path):
    for vectors in (VECTORS, 2 * VECTORS):
        export_peft({"virtual_tokens": vectors}, FACTS, "CAUSAL_LM", tmp_path)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], 2 * VECTORS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--out: {tmp_path}/file"):
        export_peft({"virtual_tokens": VECTORS}, FACTS, "CAUSAL_LM", tmp_path / "file")
