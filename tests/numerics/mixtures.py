"""Bases of mixtures of experts, and plain ones with the numbers that their 8-bit or packed weights mean."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ptune_dist.base.int8 import quantize_rows
from ptune_dist.base.merge import MergedPart
from ptune_dist.base.quantized import QuantizedWeight
from ptune_dist.tiny.make import build_tokenizer
from tests.base.bases import load, rewrite_shape
from tests.base.mixtures import save_mixture

KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
INT8 = {"int8": {"include": [], "threshold": None}}


def save_base(kind: str, folder: Path) -> Path:
    """A tiny mixture with the byte-level tokenizer; "mxfp4" is gpt-oss with experts as OpenAI publishes them."""
    save_mixture("gpt_oss" if kind == "mxfp4" else kind, folder)
    build_tokenizer().save_pretrained(folder)
    if kind == "mxfp4":
        pack_experts(folder)
    return folder


def pack_experts(folder: Path) -> None:
    """Replace experts by random MXFP4 ones of about the same size."""
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        num_experts, num_inputs, num_outputs = tensor.shape
        shape = (num_experts, num_outputs, num_inputs // 32, 16)
        stored[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        stored[f"{name}_scales"] = torch.randint(120, 123, shape[:-1], dtype=torch.uint8, generator=generator)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    rewrite_shape(folder, quantization_config={"quant_method": "mxfp4"})


def save_unpacked(packed: Path, folder: Path) -> Path:
    """The same base with experts in float32, by transformers' own formula."""
    save_base("gpt_oss", folder)
    stored = load_file(packed / "model.safetensors")
    for name in [name for name in stored if name.endswith("_blocks")]:
        target = name.removesuffix("_blocks")
        scales = stored.pop(f"{target}_scales")
        stored[target] = convert_moe_packed_tensors(stored.pop(name), scales, dtype=torch.float32).contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_dequantized(source: Path, folder: Path) -> Path:
    """A float32 base whose weights are those of `source` in int8."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    modules = dict(load(source, **INT8).named_modules())
    num_experts = 0
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            is_expert = isinstance(modules.get(f"{path}.{leaf}"), QuantizedWeight)
            is_linear = leaf == "weight" and isinstance(modules.get(path), (QuantizedWeight, MergedPart))
            if is_expert or is_linear:
                codes, scales = quantize_rows(parameter.data.flatten(0, -2))
                parameter.data = (codes.float() * scales[:, None]).view(parameter.shape)
                num_experts += is_expert
    assert num_experts == 4  # two layers
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
