"""What quantized layers compute on CUDA, each as one kernel, as operators of torch.

Operators, because they then have shapes on fake tensors and under `torch.compile`. Where Triton's kernels cannot be
used, the same is computed by several of torch's own.

Shapes: M rows, K and N as in a product [M, K] x [K, N], O outputs and I inputs of a layer.
"""

import functools
from types import ModuleType

import torch

from ptune_dist.base.quantized import LARGEST, SMALLEST

MIN_INT8_ROWS = 17  # of `torch._int_mm` on CUDA


@functools.cache
def load_kernels() -> ModuleType | None:
    """The module of Triton kernels, once one of them has run; else None, and `describe_fallback` says why."""
    global _failure
    try:
        from ptune_dist.base import quantized_kernels as kernels

        kernels.dequantize(
            torch.zeros(1, 16, dtype=torch.int8, device="cuda"), torch.ones(1, device="cuda"), torch.float16
        )
    except Exception as error:  # no Triton, no compiler, no Python.h, a GPU that is too old
        _failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return None
    return kernels


_failure = ""


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    return load_kernels() if tensor.is_cuda else None


def describe_fallback(device: torch.device) -> str | None:
    """A line for the log if quantized layers on this device use torch's own operations; None if not, or on a CPU."""
    if device.type != "cuda" or load_kernels():
        return None
    return f"model.quantization: no Triton kernels here, so torch's own, slower operations are used ({_failure})"


@torch.library.custom_op("ptune_dist::dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 codes [O, I] times their rows' float32 scales [O], rounded to `dtype` once."""
    kernels = kernels_for(codes)
    if kernels is None:
        return torch.mul(codes, scales[:, None], out=torch.empty(codes.shape, dtype=dtype, device=codes.device))
    return kernels.dequantize(codes, scales, dtype)


@dequantize.register_fake
def _(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@torch.library.custom_op("ptune_dist::multiply_int8", mutates_args=())
def multiply_int8(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """Half-precision rows [M, K] times an int8 weight, dequantized as it is read; sums are float32.

    The weight is [N, K] with a scale for each output; `is_transposed`, which is the product of backward: [K, N] with a
    scale for each entry of the contraction.
    """
    kernels = kernels_for(rows)
    if kernels is not None:
        return kernels.multiply_int8(rows, weight, scales, is_transposed)
    if is_transposed:
        return torch.mul(rows, scales, out=torch.empty_like(rows)) @ weight.to(rows.dtype)
    return rows @ dequantize(weight, scales, rows.dtype).T


@multiply_int8.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1] if is_transposed else weight.shape[0])


@torch.library.custom_op("ptune_dist::quantize_activations", mutates_args=())
def quantize_activations(
    rows: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, K], each column times its factor [K] if given, as `dtype` of 8 bits; each row's float32 scale [M]."""
    kernels = kernels_for(rows)
    if kernels is None:
        return quantize_eagerly(rows, factors, dtype)
    return kernels.quantize_activations(rows, factors, dtype)


@quantize_activations.register_fake
def _(rows: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(rows.shape[0], dtype=torch.float32)


def quantize_eagerly(
    rows: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_activations` computes, on any device, by operations of torch."""
    rows = rows.float() if factors is None else rows.float() * factors
    largest = rows.abs().amax(dim=1)
    # A tensor, because torch divides a Python number by multiplying it with the reciprocal, which rounds twice.
    most = largest.new_full((), LARGEST[dtype])
    factor = torch.where(largest > SMALLEST, most / largest, 0.0)
    scaled = rows * factor[:, None]
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), largest / most


@torch.library.custom_op("ptune_dist::scale_sums", mutates_args=())
def scale_sums(
    sums: torch.Tensor, row_scales: torch.Tensor, column_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sums of products of integers [M, N] times the scales of their rows [M] and columns [N], in `dtype`."""
    kernels = kernels_for(sums)
    if kernels is None:
        return (sums * row_scales[:, None] * column_scales).to(dtype)
    return kernels.scale_sums(sums, row_scales, column_scales, dtype)


@scale_sums.register_fake
def _(sums: torch.Tensor, row_scales: torch.Tensor, column_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return sums.new_empty(sums.shape, dtype=dtype)


@torch.library.custom_op("ptune_dist::transpose_bytes", mutates_args=())
def transpose_bytes(matrix: torch.Tensor) -> torch.Tensor:
    """An int8 matrix [O, I] copied to [I, O]; torch's own copy moves single bytes."""
    kernels = kernels_for(matrix)
    if kernels is None:
        return matrix.T.clone(memory_format=torch.contiguous_format)
    return kernels.transpose_bytes(matrix)


@transpose_bytes.register_fake
def _(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.new_empty(matrix.shape[1], matrix.shape[0])
