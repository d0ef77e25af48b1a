"""Triton's kernels for quantized layers on CUDA; `quantized_ops` says what each computes and when it is used.

Sizes of blocks are chosen for an H100 and fit the shared memory of every GPU from compute capability 7.5 on, which
tests/gpu_offline/test_quantized.py checks by compiling them. Nothing is tuned at run time: it would take seconds for
each new number of rows.

Shapes: M rows, K and N as in a product [M, K] x [K, N], O outputs and I inputs of a layer.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ptune_dist.base.quantized import LARGEST, SMALLEST

jit: Any = triton.jit  # its types know only the call inside of a kernel
COLUMNS = 2048  # of a row that one program of an elementwise kernel computes
TILE = 128  # rows and columns of a transposed tile
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds a float32 to the nearest integer


@jit
def dequantize_kernel(codes, scales, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(codes + row * width + columns, mask=inside, other=0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    codes = codes.contiguous()
    num_rows, width = codes.shape
    out = torch.empty(num_rows, width, dtype=dtype, device=codes.device)
    if out.numel():
        block = min(COLUMNS, triton.next_power_of_2(width))
        dequantize_kernel[num_rows, triton.cdiv(width, block)](codes, scales, out, width, BLOCK=block)
    return out


@jit
def multiply_int8_kernel(
    rows,
    weight,
    scales,
    out,
    M,
    N,
    K,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    row_starts = rows + m.to(tl.int64)[:, None] * K
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + steps
        left = tl.load(row_starts + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        inside = (k < K)[:, None] & (n < N)[None, :]
        if IS_TRANSPOSED:
            right = tl.load(weight + k.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0)
            factors = tl.load(scales + k, mask=k < K, other=0.0)
            left = (left.to(tl.float32) * factors[None, :]).to(left.dtype)
        else:
            right = tl.load(weight + n.to(tl.int64)[None, :] * K + k[:, None], mask=inside, other=0)
        sums = tl.dot(left, right.to(left.dtype), sums)
    if not IS_TRANSPOSED:
        sums = sums * tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    to = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def fused_blocks(num_rows: int) -> dict[str, int]:
    """Sizes for `multiply_int8_kernel`: few rows are spread over many programs, each of which reads long rows."""
    if num_rows <= 32:
        return {"BLOCK_M": 16 if num_rows <= 16 else 32, "BLOCK_N": 32, "BLOCK_K": 256, "num_stages": 3, "num_warps": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_stages": 3, "num_warps": 4}


def multiply_int8(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    rows = rows.contiguous()
    num_rows, depth = rows.shape
    num_outputs = weight.shape[1] if is_transposed else weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=rows.dtype, device=rows.device)
    if out.numel():
        blocks = fused_blocks(num_rows)
        grid = triton.cdiv(num_rows, blocks["BLOCK_M"]), triton.cdiv(num_outputs, blocks["BLOCK_N"])
        multiply_int8_kernel[grid](
            rows, weight, scales, out, num_rows, num_outputs, depth, IS_TRANSPOSED=is_transposed, **blocks
        )
    return out


@jit
def quantize_kernel(
    rows,
    factors,
    codes,
    scales,
    width,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    steps = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    not_finite = tl.zeros((BLOCK,), dtype=tl.float32)  # 0, or NaN where an entry is infinite or NaN: a maximum drops it
    for first in range(0, width, BLOCK):
        columns = first + steps
        inside = columns < width
        values = tl.load(rows + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            values *= tl.load(factors + columns, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(values))
        not_finite += values * 0.0
    top = tl.max(largest, axis=0) + tl.sum(not_finite, axis=0)
    tl.store(scales + row, tl.div_rn(top, LARGEST))
    factor = tl.where(top > SMALLEST, tl.div_rn(LARGEST, top), 0.0)
    for first in range(0, width, BLOCK):  # read again, from the cache
        columns = first + steps
        inside = columns < width
        values = tl.load(rows + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            values *= tl.load(factors + columns, mask=inside, other=0.0)
        values *= factor
        if codes.dtype.element_ty == tl.int8:
            values = (values + ROUNDER) - ROUNDER
        tl.store(codes + row * width + columns, values.to(codes.dtype.element_ty), mask=inside)


def quantize_activations(
    rows: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rows.contiguous()
    codes = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    if codes.numel():
        quantize_rows(rows, factors, codes, scales, LARGEST[dtype])
    return codes, scales


def quantize_rows(
    rows: torch.Tensor, factors: torch.Tensor | None, codes: torch.Tensor, scales: torch.Tensor, largest: float
) -> None:
    """Fill codes [M, K] and scales [M] for contiguous rows [M, K], the largest entry of each becoming `largest`."""
    num_rows, width = rows.shape
    quantize_kernel[num_rows,](
        rows,
        scales if factors is None else factors,
        codes,
        scales,
        width,
        LARGEST=largest,
        SMALLEST=SMALLEST,
        HAS_FACTORS=factors is not None,
        BLOCK=min(2 * COLUMNS, triton.next_power_of_2(width)),
        num_warps=8,
        enable_fp_fusion=False,  # ROUNDER must be added to a rounded product, as by torch: ties would fall otherwise
    )


@jit
def scale_sums_kernel(sums, row_scales, column_scales, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(sums + row * width + columns, mask=inside, other=0).to(tl.float32) * tl.load(row_scales + row)
    values *= tl.load(column_scales + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


def scale_sums(
    sums: torch.Tensor, row_scales: torch.Tensor, column_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    num_rows, width = sums.shape
    out = torch.empty(num_rows, width, dtype=dtype, device=sums.device)
    if out.numel():
        block = min(COLUMNS, triton.next_power_of_2(width))
        grid = num_rows, triton.cdiv(width, block)
        scale_sums_kernel[grid](sums.contiguous(), row_scales, column_scales, out, width, BLOCK=block)
    return out


@jit
def transpose_kernel(matrix, out, num_rows, width, TILE: tl.constexpr):
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    tile = tl.load(matrix + rows[:, None] * width + columns[None, :], mask=inside)
    tl.store(out + columns[:, None] * num_rows + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


def transpose_bytes(matrix: torch.Tensor) -> torch.Tensor:
    num_rows, width = matrix.shape
    out = torch.empty(width, num_rows, dtype=matrix.dtype, device=matrix.device)
    if out.numel():
        grid = triton.cdiv(num_rows, TILE), triton.cdiv(width, TILE)
        transpose_kernel[grid](matrix.contiguous(), out, num_rows, width, TILE=TILE)
    return out
