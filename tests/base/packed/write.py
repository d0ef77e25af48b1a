"""Write one small weight in each packed format, with the code that the formats' own packages publish.

The packages cannot be installed beside this project (they want CUDA, or other versions of its requirements), so their
sources are unpacked and imported. What they ask for and do not need here is replaced by empty modules:

    mkdir src && cd src
    pip download --no-deps compressed-tensors==0.20.0 nvidia-modelopt==0.47.0
    pip download --no-deps --no-binary :all: --no-build-isolation autoawq==0.2.9 gptqmodel==7.7.0
    pip download --no-deps -d old compressed-tensors==0.9.4     # the last kind that stores the order of columns
    for file in *.whl *.tar.gz; do bsdtar xf $file; done; (cd old && bsdtar xf *.whl)
    pip install --no-deps --target deps loguru
    python tests/base/packed/write.py src
    python tests/base/packed/write.py src old

Each file holds the stored tensors, `expected`, which is what the package's own code dequantizes in float32, and the
`quantization_config` as metadata.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
NOT_NEEDED = {"omegaconf", "pcre", "logbar", "tokenicer", "device_smi", "defuser", "threadpoolctl", "kernels"}
NOT_NEEDED |= {"hf_transfer", "random_word", "torchao", "datasets", "maturin", "pulp", "torchprofile"}


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        is_wanted = fullname.partition(".")[0] in NOT_NEEDED
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_wanted else None

    def create_module(self, spec: Any) -> types.ModuleType:
        made = types.ModuleType(spec.name)
        vars(made).update({"__path__": [], "__version__": "9", "__getattr__": attribute})
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()


def weight_of(num_rows: int, width: int) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)) * 0.05


def write(name: str, stored: dict[str, torch.Tensor], expected: torch.Tensor, config: dict[str, Any]) -> None:
    tensors = {f"x.{leaf}": tensor.detach().contiguous() for leaf, tensor in stored.items()}
    tensors["expected"] = expected.detach().float().contiguous()
    save_file(tensors, HERE / f"{name}.safetensors", {"quantization_config": json.dumps(config)})


# compressed-tensors


def compressed(name: str, shape: tuple[int, int], weights: dict[str, Any], activations: str | None = None) -> None:
    """`weights` as in a `config_groups` entry; `activations` a type, which decides between kinds of storage."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    acts = {"num_bits": 8, "type": activations, "dynamic": True} if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=acts)
    kind = infer_module_format(torch.nn.Linear, scheme).value
    weight = weight_of(*shape)
    state = {"weight": weight} | scales_for(weight, scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    config = {"quant_method": "compressed-tensors", "format": kind}
    config["config_groups"] = {"group_0": json.loads(scheme.model_dump_json())}
    expected = compressor.decompress(stored, scheme)["weight"]
    if "weight_global_scale" in stored:  # the package dequantizes these in bfloat16
        codes = unpack_fp4_from_uint8(stored["weight_packed"], *shape, dtype=torch.float32)
        scale = stored["weight_scale"].float()
        expected = dequantize(codes, scale, args=scheme.weights, global_scale=stored["weight_global_scale"])
    write(name, stored, expected, config)


def scales_for(weight: torch.Tensor, args: Any) -> dict[str, torch.Tensor]:
    """Scales and zero points by the package's own formula."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    num_rows, width = weight.shape
    if args.strategy == "block":
        high, low = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -width % low, 0, -num_rows % high))
        parts = padded.view(padded.shape[0] // high, high, padded.shape[1] // low, low).transpose(1, 2).flatten(2)
    elif args.group_size:
        parts = weight.unflatten(1, (-1, args.group_size))
    else:
        parts = weight[:, None] if args.strategy == "channel" else weight.reshape(1, 1, -1)
    smallest, largest = parts.amin(-1), parts.amax(-1)
    found: dict[str, torch.Tensor] = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(smallest.amin(), largest.amax()).float().reshape(1)
    scale, zero = calculate_qparams(smallest, largest, args, global_scale=found.get("weight_global_scale"))
    return found | {"weight_scale": scale, "weight_zero_point": zero}


def write_compressed() -> None:
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    compressed("ct_int4_group", (32, 64), four | {"symmetric": True})
    compressed("ct_int4_asymmetric", (20, 64), four | {"symmetric": False})
    compressed("ct_int4_channel", (32, 44), four | {"strategy": "channel", "group_size": None, "symmetric": True})
    compressed("ct_int8_packed", (32, 64), four | {"num_bits": 8, "symmetric": False})
    compressed("ct_int2", (32, 64), four | {"num_bits": 2, "symmetric": True})
    compressed("ct_int3", (32, 96), four | {"num_bits": 3, "symmetric": False})
    eight = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    compressed("ct_int8_channel", (32, 64), eight, "int")
    compressed("ct_int8_asymmetric", (32, 64), eight | {"symmetric": False}, "int")
    real = {"num_bits": 8, "type": "float", "symmetric": True}
    compressed("ct_fp8_tensor", (32, 64), real | {"strategy": "tensor"}, "float")
    compressed("ct_fp8_channel", (32, 64), real | {"strategy": "channel"}, "float")
    compressed("ct_fp8_block", (40, 56), real | {"strategy": "block", "block_structure": [16, 32]}, "float")
    tiny = {"num_bits": 4, "type": "float", "symmetric": True}
    compressed("ct_nvfp4", (32, 64), tiny | {"strategy": "tensor_group", "group_size": 16})
    compressed("ct_mxfp4", (32, 64), tiny | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"})
    compressed("ct_mxfp8", (32, 64), real | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"})


def write_old_compressed() -> None:
    """Version 0.9.4 stores the order of columns where calibration sorted them."""
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    for bits in (3, 4):
        given = {"num_bits": bits, "symmetric": True, "strategy": "group", "group_size": 16, "actorder": "group"}
        args = QuantizationArgs(**given)
        weight = weight_of(32, 160 if bits == 3 else 64)
        groups = torch.arange(weight.shape[1], dtype=torch.int32) // 16
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
        scale = torch.stack([weight[:, groups == g].abs().amax(1) for g in range(int(groups.max()) + 1)], 1) / 2 ** (
            bits - 1
        )
        zero = torch.zeros_like(scale, dtype=torch.int8)
        stored = PackedQuantizationCompressor().compress_weight(
            weight=weight, scale=scale, zero_point=zero, g_idx=groups, quantization_args=args
        )
        stored |= {"weight_scale": scale, "weight_g_idx": groups}
        codes = quantize(weight, scale, zero, args, dtype=torch.int8, g_idx=groups)
        expected = dequantize(codes, scale, zero, args, g_idx=groups)
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        config |= {"config_groups": {"group_0": {"weights": given}}}
        write(f"ct_old_int{bits}_ordered", stored, expected, config)


# GPTQ, AWQ, ModelOpt


def gptq(name: str, bits: int, *, group: int = 32, symmetric: bool = True, in_order: bool = True, v2: bool = False):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    weight = weight_of(64, 96)
    size = group if group > 0 else 96
    groups = torch.arange(96, dtype=torch.int32) // size
    if not in_order:
        groups = groups[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    parts = torch.stack([weight[:, groups == g] for g in range(96 // size)], 1)
    most = 2**bits - 1
    if symmetric:
        scales = parts.abs().amax(2) * 2 / most
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        scales = (parts.amax(2) - parts.amin(2)) / most
        zeros = (-parts.amin(2) / scales).round().clamp(0, most)
        zeros[0, 0] = 0
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = weight
    made = TorchLinear(bits, group, symmetric, not in_order, 96, 64, register_buffers=True, format=FORMAT.GPTQ_V2)
    made.pack_original(linear, scales, zeros, groups)
    made.scales = made.scales.float()  # of rounded numbers
    expected = made.dequantize_weight().T
    if not v2:
        settings = QuantizeConfig(bits=bits, group_size=group, sym=symmetric, desc_act=not in_order)
        convert_gptq_v2_to_v1_format_module(made, settings)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": not in_order, "sym": symmetric}
    config["checkpoint_format"] = "gptq_v2" if v2 else "gptq"
    stored = {leaf: getattr(made, leaf) for leaf in ("qweight", "qzeros", "g_idx")}
    write(name, stored | {"scales": made.scales.half()}, expected, config)


def write_gptq() -> None:
    for bits in (2, 3, 4, 8):
        gptq(f"gptq_{bits}", bits)
        gptq(f"gptq_{bits}_asymmetric_v2", bits, symmetric=False, v2=True)
    gptq("gptq_4_asymmetric", 4, symmetric=False)
    gptq("gptq_3_asymmetric", 3, symmetric=False)
    gptq("gptq_4_ordered", 4, in_order=False)
    gptq("gptq_4_channel", 4, group=-1)


def write_awq() -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for name, group in (("awq", 32), ("awq_channel", 96)):
        weight = weight_of(64, 96)
        parts = weight.unflatten(1, (-1, group))
        scales = ((parts.amax(2) - parts.amin(2)) / 15).half().float()
        zeros = (-parts.amin(2) / scales).round().clamp(0, 15)
        zeros[0, 0] = 0
        linear = torch.nn.Linear(96, 64, bias=False)
        codes = (parts / scales[..., None]).round() + zeros[..., None]
        linear.weight.data = ((codes.clamp(0, 15) - zeros[..., None]) * scales[..., None]).flatten(1)
        made = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        expected = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).T
        config = {"quant_method": "awq", "bits": 4, "group_size": group if name == "awq" else -1, "version": "gemm"}
        config["zero_point"] = True
        write(name, {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales}, expected, config)


def write_modelopt() -> None:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    weight = weight_of(32, 64)
    packed, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16)
    expected = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    stored = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
    write("modelopt_nvfp4", stored, expected, config)


def main(source: Path, is_old: bool) -> None:
    sys.meta_path.append(EmptyModules())
    folders = [source / "old"] if is_old else [folder for folder in source.iterdir() if folder.name != "old"]
    sys.path[:0] = [str(folder) for folder in [source, *folders] if folder.name != "deps"]
    sys.path.append(str(source / "deps"))
    if is_old:
        write_old_compressed()
        return
    write_compressed()
    write_gptq()
    write_awq()
    write_modelopt()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), "old" in sys.argv[2:])
