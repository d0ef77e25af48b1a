"""The ways in which a GPU multiplies by quantized weights, with their operators computed by torch on a CPU.

tests/base/test_quantized_gpu.py runs the kernels, and tests/gpu_offline/test_quantized.py compiles them.
"""

import sys

import pytest
import torch

from ptune_dist.base import fp8, int8
from ptune_dist.base import quantized_ops as ops
from tests.base.test_fp8 import layer_of as fp8_layer_of
from tests.base.test_int8 import difference, layer_of, random_weight


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_rows", [3, 300])  # either side of `MAX_FUSED_ROWS`
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_int8_weights(dtype, most, num_rows):
    bias = torch.randn(33).to(dtype)
    layer = layer_of(random_weight(), bias)
    x = torch.randn(2, num_rows, 47).to(dtype)
    grad = torch.randn(2, num_rows, 33).to(dtype)
    weight = layer.float_weight(torch.float32).double()
    assert difference(int8.multiply_on_gpu(x, layer), x.double() @ weight.T + bias.double()) <= most
    assert difference(int8.multiply_back_on_gpu(grad, layer), grad.double() @ weight) <= most


def test_a_small_gradient_in_float16_keeps_its_bits():
    layer = layer_of(0.02 * torch.randn(512, 64))
    grad = (1e-3 * torch.randn(1, 3, 512)).half()
    wanted = grad.double() @ layer.float_weight(torch.float32).double()
    assert difference(int8.multiply_back_on_gpu(grad, layer), wanted) <= 2**-9


@pytest.mark.parametrize("num_rows", [1, 100])
@pytest.mark.parametrize("sizes", [(33, 47), (64, 48)])  # those of the second are multiples of 8
def test_int8_activations(sizes, num_rows):
    bias = torch.randn(sizes[0])
    layer = layer_of(random_weight(*sizes), bias)
    x = torch.randn(1, num_rows, sizes[1])
    x[0, 0, 5] = 100
    exact = layer(x)
    errors = {}
    for threshold in (0.0, 6.0):
        ours = int8.multiply_int8_on_gpu(x, layer, threshold)
        assert difference(ours, int8.multiply_int8(x, layer, threshold)) <= 2**-10  # theirs is in float16
        errors[threshold] = difference(ours[0, 0], exact[0, 0])
    assert errors[6.0] <= 0.002 and errors[6.0] < errors[0.0]  # the outlier, 100, is the first row's largest entry
    assert torch.equal(int8.outlying_columns(x[0], 6.0), torch.tensor([5]))
    assert int8.outlying_columns(x[0], 200.0) is None


def test_a_layer_without_rows_has_none_to_answer():
    layer = layer_of(random_weight(), torch.randn(33))
    assert int8.multiply_on_gpu(torch.zeros(1, 0, 47), layer).shape == (1, 0, 33)
    assert int8.multiply_int8_on_gpu(torch.zeros(1, 0, 47), layer, 6.0).shape == (1, 0, 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_is_what_a_cpu_emulates(dtype):
    layer = fp8_layer_of(random_weight(64, 48), torch.randn(64).to(dtype))
    x = torch.randn(5, 48).to(dtype)
    grad = torch.randn(5, 64).to(dtype)
    assert difference(fp8.multiply(x, layer), fp8.multiply_emulated(x, layer)) <= 2**-7  # bfloat16
    assert difference(fp8.multiply_back(grad, layer), fp8.multiply_back_emulated(grad, layer)) <= 2**-7


def test_a_gpu_without_triton_is_reported_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ptune_dist.base.quantized_kernels", raising=False)
    ops.load_kernels.cache_clear()
    line = ops.describe_fallback(torch.device("cuda", 0))
    ops.load_kernels.cache_clear()
    assert line.startswith("model.quantization: ") and "triton" in line and "\n" not in line
    assert ops.describe_fallback(torch.device("cpu")) is None
