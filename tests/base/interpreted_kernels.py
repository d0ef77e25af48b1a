"""Triton's kernels against torch's operations on a CPU, by Triton's interpreter: run with TRITON_INTERPRET=1.

The interpreter of Triton 3.7 cuts bfloat16 off instead of rounding it and rounds fp8 in its own way, so half precision
is float16 here, and fp8 numbers are compared before they are rounded. tests/base/test_quantized_gpu.py compares all.
"""

import torch

from ptune_dist.base import quantized_kernels as kernels
from ptune_dist.base import quantized_ops as ops

E4M3 = torch.float8_e4m3fn


def check_dequantize(codes: torch.Tensor, scales: torch.Tensor) -> None:
    for dtype in (torch.float16, torch.float32):
        wanted = (codes * scales[:, None]).to(dtype)
        assert torch.equal(kernels.dequantize(codes, scales, dtype), wanted)
        assert torch.equal(kernels.dequantize(codes[:, ::2], scales, dtype), wanted[:, ::2])


def check_multiply(codes: torch.Tensor, scales: torch.Tensor, num_rows: int) -> None:
    weight = codes * scales[:, None]
    for is_transposed, width in ((False, codes.shape[1]), (True, codes.shape[0])):
        rows = torch.randn(num_rows, width).half()
        wanted = rows.float() @ (weight if is_transposed else weight.T)
        found = kernels.multiply_int8(rows, codes, scales, is_transposed)
        assert found.dtype == rows.dtype
        assert (found - wanted).abs().max() <= 2**-10 * wanted.abs().max(), (is_transposed, num_rows)


def check_quantize(width: int) -> None:
    rows = torch.randn(6, width).half() * torch.logspace(-3, 1, 6)[:, None].half()
    rows[2] = 0
    rows[4] *= 1e-3
    for factors in (None, torch.rand(width)):
        codes, scales = kernels.quantize_activations(rows, factors, torch.int8)
        wanted, wanted_scales = ops.quantize_eagerly(rows, factors, torch.int8)
        assert torch.equal(codes, wanted) and torch.equal(scales, wanted_scales)
        assert not codes[2].any() and not scales[2]
        unrounded = torch.empty(rows.shape)
        kernels.quantize_rows(rows, factors, unrounded, scales, ops.LARGEST[E4M3])
        wanted, wanted_scales = ops.quantize_eagerly(rows, factors, E4M3)
        assert torch.equal(unrounded.to(E4M3).float(), wanted.float()) and torch.equal(scales, wanted_scales)


def check_what_is_not_finite() -> None:
    rows = torch.randn(3, 5000).half()
    rows[0, 4999] = float("nan")
    rows[1, 7] = float("inf")
    _, scales = kernels.quantize_activations(rows, None, torch.int8)
    assert not scales[:2].isfinite().any() and scales[2].isfinite()


def check_scale_sums() -> None:
    sums = torch.randint(-(10**6), 10**6, (7, 3000), dtype=torch.int32)
    rows, columns = torch.rand(7), torch.rand(3000)
    assert torch.equal(kernels.scale_sums(sums, rows, columns, torch.float32), sums.float() * rows[:, None] * columns)


def check_transpose(codes: torch.Tensor) -> None:
    assert torch.equal(kernels.transpose_bytes(codes), codes.T)


if __name__ == "__main__":
    torch.manual_seed(0)
    some_codes = torch.randint(-127, 128, (150, 300), dtype=torch.int8)
    some_scales = torch.rand(150)
    check_dequantize(some_codes, some_scales)
    for rows_of_a_product in (1, 20, 70):
        check_multiply(some_codes, some_scales, rows_of_a_product)
    for columns_of_a_row in (5, 64, 5000):
        check_quantize(columns_of_a_row)
    check_what_is_not_finite()
    check_scale_sums()
    check_transpose(some_codes)
    print("all kernels agree")
