"""Quantized checkpoints of public formats: which tensors they hold, dequantized one by one while they are read."""

import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from ptune_dist.base.packed import Grouped, Mxfp4Experts, Scaled, open_4bit
from ptune_dist.base.weight_files import WeightFiles
from ptune_dist.errors import UserError

READ = "fp8, mxfp8, fbgemm_fp8, mxfp4, modelopt, compressed-tensors, bitsandbytes, gptq, awq"
METHODS = {"fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "modelopt", "compressed-tensors", "bitsandbytes", "gptq", "awq"}
CHUNK_ELEMENTS = 4 << 20
FLOATS_OF_8_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
# Facts of quantized activations and caches, which a float base does without.
HELPERS = re.compile(
    r"(\.|_)(input_scale|input_scale_ub|input_global_scale|activation_scale|output_scale|k_scale|v_scale|q_scale|"
    r"weight_shape|weight_format|qzeros|g_idx|workspace)$"
)
SCALES = ("_scale_inv", "_scale", ".qscale_weight")


class Packed(Protocol):
    shape: tuple[int, ...]

    def read(self, files: WeightFiles, first: int, last: int) -> torch.Tensor: ...


class DequantizedFiles:
    """A checkpoint whose quantized tensors read as float ones, with the interface of `weight_files.WeightFiles`."""

    def __init__(self, files: WeightFiles, packed: dict[str, Packed], hidden: set[str]):
        self._files = files
        self._packed = packed
        plain = {name: shape for name, shape in files.shapes.items() if name not in hidden}
        self.shapes = plain | {name: tensor.shape for name, tensor in packed.items()}

    @property
    def bytes_read(self) -> int:
        return self._files.bytes_read

    def holds_floats(self, name: str) -> bool:
        return name in self._packed or self._files.holds_floats(name)

    def read_flat(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements [start, start + len(out)) of the flattened tensor, a few rows at a time."""
        if name not in self._packed:
            self._files.read_flat(name, start, out)
            return
        width = self.shapes[name][-1]
        stop = start + len(out)
        step = max(1, CHUNK_ELEMENTS // width)
        last_row = -(-stop // width)
        for first in range(start // width, last_row, step):
            last = min(first + step, last_row)
            rows = self._packed[name].read(self._files, first, last).reshape(-1)
            begin = max(start, first * width)
            end = min(stop, last * width)
            out[begin - start : end - start].copy_(rows[begin - first * width : end - first * width])

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last), float32 where they are dequantized."""
        if name not in self._packed:
            return self._files.read_rows(name, first, last)
        shape = self.shapes[name]
        inner = torch.Size(shape[1:-1]).numel()
        return self._packed[name].read(self._files, first * inner, last * inner).view(last - first, *shape[1:])

    def read_columns(self, name: str, first: int, last: int) -> torch.Tensor:
        if name not in self._packed:
            return self._files.read_columns(name, first, last)
        return self.read_rows(name, 0, self.shapes[name][0])[:, first:last].T.contiguous()


StoredWeights = WeightFiles | DequantizedFiles


def quantization_of(shape: PretrainedConfig, path: str) -> dict[str, Any]:
    """The `quantization_config` of a base, removed from its shape; empty for a float one. Raises UserError."""
    config = getattr(shape, "quantization_config", None) or getattr(
        shape.get_text_config(), "quantization_config", None
    )
    for part in (shape, shape.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    own = Path(path) / "hf_quant_config.json"  # older exports of ModelOpt
    if not config and own.is_file():
        config = json.loads(own.read_text())
    if not config:
        return {}
    found = dict(config) if isinstance(config, dict) else config.to_dict()
    producer = found.get("producer")
    default = producer.get("name") if isinstance(producer, dict) else None
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        default = "bitsandbytes"
    method = str(found.get("quant_method") or default)
    found["quant_method"] = "compressed-tensors" if method == "compressed_tensors" else method
    check_method(found, path)
    return found


def check_method(config: dict[str, Any], path: str) -> None:
    """Raise UserError for a format, or an option of one, that is not read."""
    method = config["quant_method"]
    what = None
    if method not in METHODS:
        what = method
    elif method == "awq" and (config.get("version") or config.get("format") or "gemm").lower() != "gemm":
        what = f"awq {config.get('version') or config.get('format')}"
    elif method == "gptq" and str(config.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
        what = f"gptq {config['checkpoint_format']}"
    elif config.get("transform_config") or (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        what = f"{method} with transforms or sparsity"
    if what:
        raise UserError(
            f"model.path: {path} is stored quantized as {what}, which is not read ({READ} are): give the float base "
            "that it was made from, and set model.quantization=int8 to save memory"
        )


def dequantize(files: WeightFiles, config: dict[str, Any], path: str) -> StoredWeights:
    """The same weights as float ones; the files themselves where nothing in them is quantized. Raises UserError."""
    packed: dict[str, Packed] = {}
    hidden: set[str] = set()
    for name in files.shapes:
        found = open_scaled(files, name, config) or open_other(files, name, config)
        if found is None:
            continue
        target, tensor, used = found
        packed[target] = tensor
        hidden |= used
    if any(".pre_quant_scale" in name or "_pre_quant_scale" in name for name in files.shapes):
        raise UserError(
            f"model.path: {path} scales activations before its products (pre_quant_scale): give the float base"
        )
    for name in files.shapes:
        if config and files.dtype_of(name) in FLOATS_OF_8_BITS and name not in hidden:
            raise UserError(f"model.path: {path}: {name} is in 8-bit floats without a scale: give the float base")
    if not packed:
        return files
    hidden |= {name for name in files.shapes if HELPERS.search(name)}
    return DequantizedFiles(files, packed, hidden)


Found = tuple[str, Packed, set[str]]  # logical name, its tensor, and the stored tensors that it is made of


def open_scaled(files: WeightFiles, name: str, config: dict[str, Any]) -> Found | None:
    """A weight of 8-bit floats, integers or FP4 with its scales beside it; None if this is none."""
    shapes = files.shapes
    dtype = files.dtype_of(name)
    shape = shapes[name]
    stem = name.removesuffix("_packed")
    scales = next((s for s in (stem + end for end in SCALES[:2]) if s in shapes), None)
    if scales is None and name.endswith(".weight"):
        other = [name.removesuffix(".weight") + end for end in (".scale", ".qscale_weight", ".SCB")]
        scales = next((s for s in other if s in shapes), None)
    is_8bit = dtype in (*FLOATS_OF_8_BITS, torch.int8)
    if scales is None or len(shape) < 2 or not (is_8bit or dtype in (torch.uint8, torch.int32)):
        return None
    kind = "plain"
    factor = 1.0
    used = {name, scales}
    width = shape[-1]
    if dtype == torch.int32:
        bits = weight_bits(config)
        kind = f"int{bits}"
        width = packed_width(files, stem, width * 32 // bits)
    elif dtype == torch.uint8 or (dtype == torch.int8 and config.get("quant_method") == "fp8"):
        kind = "fp4"
        width *= 2
        for end, invert in (("_scale_2", False), ("_global_scale", True)):
            if stem + end in shapes:
                out = torch.empty(1)
                files.read_flat(stem + end, 0, out)
                factor = 1 / float(out) if invert else float(out)
                used.add(stem + end)
    elif scales.endswith(".SCB"):
        factor = 1 / 127
    zeros = f"{stem}_zero_point" if f"{stem}_zero_point" in shapes else None
    logical = (*shape[:-1], width)
    block = block_of(logical, shapes[scales], config)
    if zeros is not None:
        used.add(zeros)
        if files.dtype_of(zeros) == torch.int32:
            return None
    return stem, Scaled(logical, name, scales, block, kind, factor, zeros), used


def block_of(shape: tuple[int, ...], scales: tuple[int, ...], config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, from the shape of the scales."""
    given = config.get("weight_block_size")
    num_rows, width = shape[-2:]
    if len(scales) < 2:
        return (1, width) if torch.Size(scales).numel() == num_rows and num_rows > 1 else (num_rows, width)
    rows, columns = scales[-2:]
    if given and (rows, columns) == (-(-num_rows // given[0]), -(-width // given[1])):
        return given[0], given[1]
    return -(-num_rows // rows), -(-width // columns)


def weight_bits(config: dict[str, Any]) -> int:
    groups = list((config.get("config_groups") or {}).values())
    found: set[Any] = {(group.get("weights") or {}).get("num_bits") for group in groups}
    if len(found) != 1 or not found <= {4, 8}:
        raise UserError(f"model.path: integers of {sorted(map(str, found))} bits are not read: give the float base")
    return found.pop()


def packed_width(files: WeightFiles, stem: str, width: int) -> int:
    if f"{stem}_shape" not in files.shapes:
        return width
    out = torch.empty(2, dtype=torch.int64)
    files.read_flat(f"{stem}_shape", 0, out)
    return int(out[1])


def open_other(files: WeightFiles, name: str, config: dict[str, Any]) -> Found | None:
    """MXFP4 experts, 4 bits of bitsandbytes, GPTQ and AWQ."""
    shapes = files.shapes
    if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in shapes:
        target = name.removesuffix("_blocks")
        num_experts, num_outputs, groups, _ = shapes[name]
        shape = (num_experts, groups * 32, num_outputs)
        return target, Mxfp4Experts(shape, name, f"{target}_scales"), {name, f"{target}_scales"}
    if f"{name}.quant_map" in shapes:
        state = next(other for other in shapes if other.startswith(f"{name}.quant_state.bitsandbytes__"))
        return name, open_4bit(files, name, state), {other for other in shapes if other.startswith(f"{name}.")} | {name}
    if name.endswith(".qweight") and config.get("quant_method") in ("gptq", "awq"):
        prefix = name.removesuffix("qweight")
        bits = int(config.get("bits") or config.get("w_bit") or 4)
        if bits not in (2, 4, 8) or (config["quant_method"] == "awq" and bits != 4):
            raise UserError(f"model.path: {config['quant_method']} with {bits} bits is not read: give the float base")
        is_awq = config["quant_method"] == "awq"
        num_outputs = shapes[f"{prefix}scales"][1]
        num_inputs = shapes[name][0] * (1 if is_awq else 32 // bits)
        offset = 0 if is_awq or config.get("checkpoint_format") == "gptq_v2" else 1
        tensor = Grouped((num_outputs, num_inputs), prefix, bits, is_awq, offset)
        return f"{prefix}weight", tensor, {prefix + leaf for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    return None
