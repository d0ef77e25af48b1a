"""Quantized layers on a GPU: Triton's kernels and tensor cores against plain products of dequantized weights."""

import pytest
import torch
from torch import nn

from ptune_dist.base import fp8, int8
from ptune_dist.base import quantized_ops as ops
from ptune_dist.base.fp8 import E4M3, Fp8Linear
from ptune_dist.base.int8 import Int8Linear
from ptune_dist.base.quantized import QuantizedLinear
from tests.base.test_int8 import difference

pytestmark = pytest.mark.gpu
GPU = "cuda"
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= fp8.MIN_CAPABILITY
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="no fp8 tensor cores")
SIZES = [(256, 512), (1000, 264), (33, 47)]  # outputs, inputs
ROWS = [1, 40, 257, 2000]
HALVES = [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def layer_of(kind: type[QuantizedLinear], sizes: tuple[int, int], dtype: torch.dtype) -> QuantizedLinear:
    """With rows of different sizes, and a bias."""
    weight = torch.randn(*sizes, device=GPU) * torch.logspace(-1, 1, sizes[0], device=GPU)[:, None]
    layer = kind(sizes[1], sizes[0], nn.Parameter(torch.randn(sizes[0], device=GPU).to(dtype), False))
    codes, scales = layer.quantize(weight)
    layer.weight = nn.Parameter(codes, False)
    layer.scales = nn.Parameter(scales.view(torch.int32), False)
    return layer


def test_triton_is_used():
    assert ops.describe_fallback(torch.device(GPU)) is None


@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_compute_what_torch_does(sizes):
    codes = torch.randint(-127, 128, sizes, dtype=torch.int8, device=GPU)
    scales = torch.rand(sizes[0], device=GPU)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(ops.dequantize(codes, scales, dtype), (codes * scales[:, None]).to(dtype))
    assert torch.equal(ops.transpose_bytes(codes), codes.T)
    sums = torch.randint(-(10**6), 10**6, sizes, dtype=torch.int32, device=GPU)
    columns = torch.rand(sizes[1], device=GPU)
    wanted = sums.float() * scales[:, None] * columns
    assert torch.equal(ops.scale_sums(sums, scales, columns, torch.bfloat16), wanted.bfloat16())


@pytest.mark.parametrize("dtype", [torch.int8, pytest.param(E4M3, marks=needs_fp8)])
@pytest.mark.parametrize("width", [47, 512, 28672])
def test_activations_are_rounded_as_by_torch(width, dtype):
    rows = (torch.randn(50, width, device=GPU) * torch.logspace(-8, 2, 50, device=GPU)[:, None]).bfloat16()
    rows[7] = 0
    for factors in (None, torch.rand(width, device=GPU)):
        codes, scales = ops.quantize_activations(rows, factors, dtype)
        wanted, wanted_scales = ops.quantize_eagerly(rows, factors, dtype)
        assert torch.equal(scales, wanted_scales)
        assert torch.equal(codes.float(), wanted.float())
    rows[3, 5] = float("nan")
    assert ops.quantize_activations(rows, None, dtype)[1].isfinite().logical_not().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype, most", [*HALVES, (torch.float32, 1e-5)])
def test_int8_products_are_those_of_the_dequantized_weight(dtype, most, sizes, num_rows):
    layer = layer_of(Int8Linear, sizes, dtype)
    x = torch.randn(1, num_rows, sizes[1], device=GPU).to(dtype).requires_grad_()
    grad = torch.randn(1, num_rows, sizes[0], device=GPU).to(dtype)
    y = layer(x)
    y.backward(grad)
    weight = layer.float_weight(torch.float32).double()
    assert difference(y, x.double() @ weight.T + layer.bias.double()) <= most
    assert difference(x.grad, grad.double() @ weight) <= most


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype, most", HALVES)
def test_int8_activations_are_multiplied_exactly(dtype, most, sizes, num_rows):
    layer = layer_of(Int8Linear, sizes, dtype)
    x = torch.randn(num_rows, sizes[1], device=GPU).to(dtype)
    x[0, 5] = 100
    codes, scales = ops.quantize_eagerly(x, None, torch.int8)
    rounded = codes.double() * scales.double()[:, None]
    weight = layer.float_weight(torch.float32).double()
    wanted = rounded @ weight.T + layer.bias.double()
    assert difference(int8.multiply_int8_on_gpu(x, layer, 0.0), wanted) <= most
    exact = x.double() @ weight.T + layer.bias.double()
    with_outliers, without = (difference(int8.multiply_int8_on_gpu(x, layer, t)[0], exact[0]) for t in (6.0, 0.0))
    assert with_outliers <= 0.02 and with_outliers <= without


@needs_fp8
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("sizes", [(256, 512), (1008, 272), (33, 47)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_products_are_those_that_a_cpu_emulates(dtype, sizes, num_rows):
    layer = layer_of(Fp8Linear, sizes, dtype)
    x = torch.randn(1, num_rows, sizes[1], device=GPU).to(dtype).requires_grad_()
    grad = torch.randn(1, num_rows, sizes[0], device=GPU).to(dtype)
    y = layer(x)
    y.backward(grad)
    # Sums on tensor cores have fewer bits than float32, and results are bfloat16.
    assert difference(y[0], fp8.multiply_emulated(x[0].detach(), layer)) <= 0.02
    assert difference(x.grad[0], fp8.multiply_back_emulated(grad[0], layer)) <= 0.02
