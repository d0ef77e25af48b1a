"""Tiny checkpoints quantized by the published formulas, to check what is read from them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.base.bases import rewrite_shape

E4M3 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


def fp8_blocks(name: str, weight: torch.Tensor, block: int = 16) -> Tensors:
    """DeepSeek's and Qwen3's: a scale for each block, in weight_scale_inv; the last blocks may be smaller."""
    num_rows, width = weight.shape
    rows = -(-num_rows // block)
    columns = -(-width // block)
    padded = torch.zeros(rows * block, columns * block)
    padded[:num_rows, :width] = weight
    parts = padded.view(rows, block, columns, block)
    scales = parts.abs().amax((1, 3)).clamp(min=1e-9) / 448
    codes = (parts / scales[:, None, :, None]).to(E4M3).view(rows * block, -1)[:num_rows, :width]
    return {name: codes.contiguous(), name + "_scale_inv": scales}


def fp8_rows(name: str, weight: torch.Tensor, dtype: torch.dtype = E4M3) -> Tensors:
    """compressed-tensors' and FBGEMM's: a scale for each row."""
    scales = weight.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
    return {name: (weight / scales).to(dtype), name + "_scale": scales}


def fp8_whole(name: str, weight: torch.Tensor) -> Tensors:
    """ModelOpt's: one scale, and one for the activations, which is not needed."""
    scale = weight.abs().max() / 448
    helper = torch.ones(())
    return {name: (weight / scale).to(E4M3), name + "_scale": scale, name.replace("weight", "input_scale"): helper}


def int8_rows(name: str, weight: torch.Tensor) -> Tensors:
    """bitsandbytes' 8 bits."""
    largest = weight.abs().amax(1)
    codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
    flag = torch.tensor(0, dtype=torch.uint8)
    return {name: codes, name.replace("weight", "SCB"): largest, name.replace("weight", "weight_format"): flag}


def nf4(name: str, weight: torch.Tensor, nested: bool = True, kind: str = "nf4") -> Tensors:
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    return {name: codes} | {f"{name}.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}


def gptq(name: str, weight: torch.Tensor, group: int = 16, in_order: bool = True) -> Tensors:
    """AutoGPTQ's: int4 packed along inputs, zero points less one packed along outputs."""
    codes, zeros, scales = integers(weight, group)
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // group
    if not in_order:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        codes = codes[:, order]
        groups = groups[order]
    prefix = name.removesuffix("weight")
    return {
        prefix + "qweight": pack(codes.T.contiguous(), range(8), along_rows=True),
        prefix + "qzeros": pack(zeros.T.contiguous() - 1, range(8)),
        prefix + "scales": scales.T.contiguous(),
        prefix + "g_idx": groups,
    }


def awq(name: str, weight: torch.Tensor, group: int = 16) -> Tensors:
    """AutoAWQ's GEMM: int4 packed along outputs, in the order 0 2 4 6 1 3 5 7."""
    codes, zeros, scales = integers(weight, group)
    prefix = name.removesuffix("weight")
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        prefix + "qweight": pack(codes.T.contiguous(), order),
        prefix + "qzeros": pack(zeros.T.contiguous(), order),
        prefix + "scales": scales.T.contiguous(),
    }


def packed_int4(name: str, weight: torch.Tensor, group: int = 16) -> Tensors:
    """compressed-tensors' pack-quantized: symmetric int4, eight in an int32 along a row."""
    parts = weight.unflatten(1, (-1, group))
    scales = parts.abs().amax(2) / 7.5
    codes = (parts / scales[..., None]).round().clamp(-8, 7).flatten(1).int() + 8
    shape = torch.tensor(weight.shape)
    return {name + "_packed": pack(codes, range(8)), name + "_scale": scales, name + "_shape": shape}


def integers(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [O, I], zero points [O, G] from 1 to 15 and scales [O, G] in float16."""
    parts = weight.unflatten(1, (-1, group))
    low = parts.amin(2)
    scales = ((parts.amax(2) - low) / 15).half()
    zeros = (-low / scales).round().clamp(1, 15).int()
    codes = ((parts / scales[..., None]).round() + zeros[..., None]).clamp(0, 15).int()
    return codes.flatten(1), zeros, scales


def pack(codes: torch.Tensor, order, along_rows: bool = False) -> torch.Tensor:
    """Eight 4-bit numbers in an int32, one after another in memory as `order` lists them."""
    if along_rows:
        return pack(codes.T.contiguous(), order).T.contiguous()
    packed = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, number in enumerate(order):
        packed |= (codes[:, number::8].long() & 15) << (4 * place)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def quantize_folder(folder: Path, quantize, config: dict[str, Any]) -> None:
    """Quantize the linear layers of a base in place, as `quantize(name, weight)` does."""
    stored: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_linear = tensor.dim() == 2 and "_proj" in name
        stored |= quantize(name, tensor) if is_linear else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    rewrite_shape(folder, quantization_config=json.loads(json.dumps(config)))
