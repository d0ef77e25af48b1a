"""An fp8 base multiplies rounded rows by rounded weights, exactly; saves no activation; and mixes up no rows."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ptune_dist.base import fp8
from ptune_dist.base.fp8 import E4M3, Fp8Linear, quantize_rows
from ptune_dist.base.int8 import Int8Embedding, Int8Linear
from ptune_dist.base.load import fill_whole
from tests.base.bases import error_of, load, logits_of, open_only
from tests.base.test_int8 import difference, random_weight
from tests.conftest import ENCODERS, LABELS, SEQ2SEQ

PLAIN: dict[str, Any] = {"include": []}
HALF_STEP = 2**-4  # the largest relative rounding error of an entry with three bits


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Fp8Linear:
    codes, scales = quantize_rows(weight)
    layer = Fp8Linear(*reversed(weight.shape), bias if bias is None else nn.Parameter(bias, False))
    layer.weight = nn.Parameter(codes, False)
    layer.scales = nn.Parameter(scales.view(torch.int32), False)
    return layer


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """The rows as fp8 holds them, in float64."""
    codes, scales = quantize_rows(rows)
    return codes.view(E4M3).double() * scales.double()[:, None]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference, relative: about 0.04 where both factors of a product are rounded to three bits."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_rows_keep_their_largest_entry_and_three_bits_of_the_others():
    weight = random_weight()
    weight[5] = 0
    codes, scales = quantize_rows(weight)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(scales, weight.abs().amax(dim=1) / 448)
    found = layer_of(weight).float_weight(torch.float32)
    smallest = weight.abs().amax(dim=1, keepdim=True) / 448 * 2**-10  # half a step near zero
    assert ((found - weight).abs() <= (HALF_STEP * weight.abs()).maximum(smallest) * 1.0001).all()
    assert not found[5].any()
    assert torch.allclose(found.abs().amax(dim=1), weight.abs().amax(dim=1), rtol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_product_and_gradient_are_exact_products_of_rounded_factors(dtype, most, with_bias):
    bias = torch.randn(33).to(dtype) if with_bias else None
    layer = layer_of(random_weight(), bias)
    x = torch.randn(2, 3, 47).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 33).to(dtype)
    y = layer(x)
    y.backward(grad)
    assert (y.dtype, y.shape, x.grad.dtype) == (dtype, (2, 3, 33), dtype)
    weight = layer.float_weight(torch.float32).double()
    wanted = rounded(x.detach().view(-1, 47)) @ weight.T + (0 if bias is None else bias.double())
    assert difference(y.view(-1, 33), wanted) <= most
    # The scales of the weight's rows lie along the contraction: they are part of what is rounded.
    scaled = grad.view(-1, 33).float() * layer.float_scales
    wanted = rounded(scaled) @ (weight / layer.float_scales.double()[:, None])
    assert difference(x.grad.view(-1, 47), wanted) <= most
    exact = x.double() @ random_weight().double().T + (0 if bias is None else bias.double())
    assert distance(y, exact) <= 0.06
    assert distance(x.grad, grad.double() @ random_weight().double()) <= 0.06


def test_a_row_knows_nothing_of_the_others():
    layer = layer_of(random_weight())
    x = torch.randn(4, 47)
    alone = torch.cat([layer(row[None]) for row in x])
    x[2] *= 1e6
    together = layer(x)
    x[2, 3] = float("nan")
    for found in (together, layer(x)):
        assert torch.allclose(found[[0, 1, 3]], alone[[0, 1, 3]], rtol=1e-5, atol=1e-6)
    assert layer(x)[2].isnan().all()


def test_rows_of_zeros_and_of_tiny_numbers_have_a_gradient():
    grad = torch.randn(3, 33)
    grad[0] = 0
    grad[1] *= 1e-20
    x = torch.randn(3, 47, requires_grad=True)
    layer_of(random_weight())(x).backward(grad)
    assert not x.grad[0].any() and x.grad.isfinite().all()
    assert distance(x.grad[1], (grad @ random_weight())[1]) <= 0.06


def test_no_activation_is_kept_for_backward():
    layer = layer_of(random_weight(), torch.randn(33))
    saved = []
    with saved_tensors_hooks(saved.append, lambda packed: packed):
        x = torch.randn(3, 47).requires_grad_()
        y = layer(x * 2)
    assert not [tensor for tensor in saved if tensor.numel() > 1]
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", *SEQ2SEQ, ENCODERS[0]])
def test_a_base_in_fp8_is_near_the_float_one(tiny_bases, kind):
    base = load(tiny_bases[kind], fp8=PLAIN, labels=LABELS)
    assert any(isinstance(module, Fp8Linear) for module in base.modules())
    assert not any(isinstance(module, (Int8Linear, Int8Embedding)) for module in base.modules())
    assert 0 < difference(logits_of(base), logits_of(load(tiny_bases[kind], labels=LABELS))) <= 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # with a head of its own, and with a tied one
def test_head_and_embeddings_are_in_int8(tiny_bases, kind):
    base = load(tiny_bases[kind], fp8={"include": ["head", "embeddings"]})
    assert isinstance(base.get_output_embeddings(), Int8Linear)
    assert isinstance(base.get_input_embeddings(), Int8Embedding)
    assert 0 < difference(logits_of(base), logits_of(load(tiny_bases[kind], fp8=PLAIN))) <= 0.1


def test_weights_and_scales_outlive_a_cast_of_the_base(tiny_bases):
    base = fill_whole(open_only(tiny_bases["llama"], fp8=PLAIN))
    before = {name: p.clone() for name, p in base.named_parameters() if p.dtype in (torch.int8, torch.int32)}
    assert len(before) == 2 * 4 * 2  # four products in each of two layers, two of them merged
    base.to(torch.bfloat16)
    assert all(torch.equal(base.get_parameter(name), p) for name, p in before.items())


def test_a_gpu_without_fp8_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    message = error_of(fp8.check_device, torch.device("cuda", 0), starts="model.quantization: ")
    assert "NVIDIA A100-SXM4-80GB has 8.0" in message and "model.quantization=int8" in message
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    fp8.check_device(torch.device("cuda", 0))
    fp8.check_device(torch.device("cpu"))
