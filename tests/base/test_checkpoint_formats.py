"""Quantized checkpoints are read as the numbers that their formats mean, any part of them; others are named."""

import shutil
from functools import partial
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ptune_dist.base.checkpoint_formats import dequantize
from ptune_dist.base.weight_files import open_weight_files
from tests.base.bases import QUERY, error_of, load, logits_of, rewrite_shape
from tests.base.mixtures import save_mixture
from tests.base.quantized_checkpoints import (
    awq,
    fp8_blocks,
    fp8_rows,
    fp8_whole,
    gptq,
    int8_rows,
    nf4,
    packed_int4,
    quantize_folder,
)

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
INT4 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
FORMATS = {
    "fp8 blocks": (fp8_blocks, FP8, 0.05),
    "fp8 rows": (fp8_rows, {"quant_method": "compressed-tensors"}, 0.05),
    "fp8 e5m2": (partial(fp8_rows, dtype=torch.float8_e5m2), {"quant_method": "compressed-tensors"}, 0.13),
    "fp8 whole": (fp8_whole, {"quant_method": "modelopt"}, 0.05),
    "int8": (int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 0.01),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.2),
    "nf4 not nested": (partial(nf4, nested=False), {"load_in_4bit": True}, 0.2),
    "fp4": (partial(nf4, kind="fp4"), {"load_in_4bit": True}, 0.3),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16}, 0.1),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, 0.1),
    "int4": (packed_int4, INT4, 0.1),
}


@pytest.fixture(params=FORMATS)
def stored(request, base) -> tuple[Path, torch.Tensor, float]:
    """A quantized base, a weight before that, and the largest error relative to the largest weight."""
    quantize, config, most = FORMATS[request.param]
    before = load_file(base / "model.safetensors")[QUERY]
    quantize_folder(base, quantize, config)
    return base, before, most


def test_a_weight_is_what_it_was_but_for_rounding_and_any_part_of_it_is_read(stored):
    base, before, most = stored
    weights = load(base).state_dict()[QUERY]
    assert 0 < (weights - before).abs().max() <= most * before.abs().max()


def test_int8_and_fp8_on_top_round_the_dequantized_rows(stored):
    base, _, _ = stored
    plain = load(base)
    saved = base.parent / "plain"
    shutil.copytree(base, saved)
    rewrite_shape(saved, quantization_config=None)
    save_file(plain.state_dict(), saved / "model.safetensors")
    for options in ({"int8": {"include": [], "threshold": None}}, {"fp8": {"include": []}}):
        assert torch.equal(logits_of(load(base, **options)), logits_of(load(saved, **options)))


def parts_of(folder: Path, config: dict, name: str, whole: torch.Tensor) -> None:
    """Every few elements, rows and columns are those of the whole."""
    files = dequantize(open_weight_files(str(folder), local_only=True), config, str(folder))
    flat = whole.reshape(-1)
    for start in range(0, len(flat), len(flat) // 5 + 1):
        for stop in (start + 1, start + 7, len(flat)):
            out = torch.empty(min(stop, len(flat)) - start)
            files.read_flat(name, start, out)
            assert torch.equal(out, flat[start : start + len(out)])
    assert torch.equal(files.read_rows(name, 1, 3), whole[1:3])
    if whole.dim() == 2:
        assert torch.equal(files.read_columns(name, 3, 9), whole[:, 3:9].T)


@pytest.mark.parametrize("kind", FORMATS)
def test_any_part_is_that_of_the_whole(kind, base):
    quantize, config, _ = FORMATS[kind]
    quantize_folder(base, quantize, config)
    parts_of(base, config, QUERY, load(base).get_submodule("model.layers.0.self_attn").state_dict()["q_proj.weight"])


def test_fp8_blocks_are_what_transformers_dequantizes(base):
    quantize_folder(base, fp8_blocks, FP8)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    )
    assert torch.equal(load(base).state_dict()[QUERY], theirs.state_dict()[QUERY])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_4_bits_are_what_bitsandbytes_dequantizes(tmp_path, kind, nested):
    # Its CPU kernel is wrong for rows that are shorter than a block of 64.
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    save_file(nf4("x.weight", weight, nested=nested, kind=kind), tmp_path / "model.safetensors")
    files = dequantize(open_weight_files(str(tmp_path), local_only=True), {}, str(tmp_path))
    assert torch.allclose(files.read_rows("x.weight", 0, 64), bnb.dequantize_4bit(codes, state), rtol=1e-6, atol=1e-7)


def test_a_scale_that_is_missing_is_named(base):
    quantize_folder(base, fp8_blocks, FP8)
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{QUERY}_scale_inv"]
    save_file(tensors, base / "model.safetensors")
    assert f"{QUERY} is in 8-bit floats without a scale" in error_of(load, base)


@pytest.mark.parametrize("method", ["hqq", "torchao", "quanto", "aqlm", "eetq", "bitnet", "quark", "new_format"])
def test_a_format_that_is_not_read_is_named_with_the_way_in(base, method):
    rewrite_shape(base, quantization_config={"quant_method": method})
    message = error_of(load, base)
    assert f"stored quantized as {method}, which is not read" in message and "float base" in message


def test_a_config_of_a_base_whose_weights_are_floats_is_no_obstacle(base):
    wanted = logits_of(load(base))
    rewrite_shape(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert torch.equal(logits_of(load(base)), wanted)


def test_mxfp4_experts_are_what_transformers_dequantizes(tmp_path):
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 12, 2, 16), dtype=torch.uint8)
    scales = torch.randint(115, 130, (3, 12, 2), dtype=torch.uint8)
    save_file({"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}, tmp_path / "model.safetensors")
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    parts_of(tmp_path, {"quant_method": "mxfp4"}, "experts.down_proj", wanted)


@pytest.mark.parametrize("kind", ["fp8 blocks", "gptq", "awq", "int4"])
def test_experts_that_are_packed_one_by_one_become_one_tensor(kind, tmp_path):
    quantize, config, most = FORMATS[kind]
    plain = save_mixture("qwen3_moe", tmp_path / "plain")
    packed = Path(shutil.copytree(plain, tmp_path / "packed"))
    quantize_folder(packed, quantize, config)
    before = load(plain).state_dict()
    found = load(packed).state_dict()
    for name in ("gate_up_proj", "down_proj"):
        wanted = before[f"model.layers.1.mlp.experts.{name}"]
        assert 0 < (found[f"model.layers.1.mlp.experts.{name}"] - wanted).abs().max() <= most * wanted.abs().max()
