"""Quantized checkpoints of public formats: which tensors they hold, dequantized one by one while they are read."""

import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from ptune_dist.base.packed import Mxfp4Experts, Scaled, open_4bit, read_whole
from ptune_dist.base.packed_layout import find_bits, find_block, open_grouped
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
SCALES = ("_scale_inv", "_scale")
# Values, in lower case, of the options that change what is stored.
READ_OPTIONS = {
    "awq": {"version": {"gemm"}, "format": {"gemm"}, "checkpoint_format": {"gemm"}},
    "gptq": {"checkpoint_format": {"gptq", "gptq_v2"}, "format": {"gptq", "gptq_v2"}, "pack_dtype": {"int32"}},
    "compressed-tensors": {
        "format": {
            *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
            *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
        }
    },
    "modelopt": {
        "quant_algo": {
            *("fp8", "fp8_pb_wo", "fp8_per_channel_per_token", "nvfp4", "nvfp4_awq", "w4a16_nvfp4", "w8a16"),
            *("w4a8_nvfp4_fp8", "w4a8_mxfp4_fp8", "mxfp8", "w8a8_sq_per_channel", "mixed_precision"),
        }
    },
}


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
    what = f"{method} with transforms" if config.get("transform_config") else None
    if method not in METHODS:
        what = method
    for key, is_read in READ_OPTIONS.get(method, {}).items():
        for value in values_of(config, key):
            what = what if str(value).lower() in is_read else f"{method} with {key} {value}"
    if what:
        raise UserError(
            f"model.path: {path} is stored quantized as {what}, which is not read ({READ} are): give the float base "
            "that it was made from, and set model.quantization=int8 to save memory"
        )


def values_of(config: Any, key: str) -> list[Any]:
    """All values of a key, at any depth; without those that are absent or not set."""
    if not isinstance(config, dict):
        return []
    found = [config[key]] if config.get(key) is not None and not isinstance(config[key], dict) else []
    return found + [value for inner in config.values() for value in values_of(inner, key)]


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
    """A weight of 8-bit floats, integers or FP4 with its scales beside it; None if this is none. Raises UserError."""
    shapes = files.shapes
    dtype = files.dtype_of(name)
    stem = name.removesuffix("_packed")
    scales = scales_of(name, stem, shapes)
    is_8bit = dtype in (*FLOATS_OF_8_BITS, torch.int8)
    if scales is None or len(shapes[name]) < 2 or not (is_8bit or dtype in (torch.uint8, torch.int32)):
        return None
    beside = {end: stem + end for end in ("_scale_2", "_global_scale", "_zero_point", "_g_idx") if stem + end in shapes}
    width = shapes[name][-1]
    made = Scaled(shapes[name], name, scales, (1, width), zeros=beside.get("_zero_point"))
    if dtype == torch.int32:
        made.bits, width, made.is_dense = find_bits(files, name, stem, config)
    elif dtype == torch.uint8 or (dtype == torch.int8 and config.get("quant_method") == "fp8"):
        made.is_fp4 = True
        width *= 2
        made.factor = factor_of(files, beside)
    elif scales.endswith(".SCB"):
        made.factor = 1 / 127
    made.shape = (*shapes[name][:-1], width)
    made.is_single = torch.Size(shapes[scales]).numel() == 1
    made.block = find_block(made.shape, shapes[scales], config, name)
    if "_g_idx" in beside and int(read_whole(files, beside["_g_idx"]).min()) >= 0:
        made.order = beside["_g_idx"]
    return stem, made, {name, scales, *beside.values()}


def scales_of(name: str, stem: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
    names = [stem + end for end in SCALES]
    if name.endswith(".weight"):
        names += [name.removesuffix(".weight") + end for end in (".scale", ".qscale_weight", ".SCB")]
    return next((found for found in names if found in shapes), None)


def factor_of(files: WeightFiles, beside: dict[str, str]) -> float:
    """What multiplies all scales of FP4: ModelOpt stores it, compressed-tensors its inverse. Raises UserError."""
    for end in beside.keys() & {"_scale_2", "_global_scale"}:
        found = read_whole(files, beside[end]).float()
        if found.numel() != 1:
            raise UserError(
                f"model.path: {beside[end]} has a scale for each expert, which is not read: give the float base"
            )
        return float(found) if end == "_scale_2" else 1 / float(found)
    return 1.0


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
        used = {prefix + leaf for leaf in ("qweight", "qzeros", "scales", "g_idx")}
        return f"{prefix}weight", open_grouped(files, prefix, config), used
    return None
