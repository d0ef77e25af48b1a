"""An int8 base computes what its dequantized weights do, saves no activation, and can be partitioned anywhere."""

import weakref

import bitsandbytes.functional
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import JetMoeConfig
from transformers.pytorch_utils import Conv1D

from ptune_dist.base.int8 import Int8Embedding, Int8Linear, quantize_rows
from ptune_dist.base.load import fill_whole
from ptune_dist.base.quantized import QuantizedWeight
from ptune_dist.base.trained import parameters_of_head
from tests.base.bases import IDS, error_of, load, logits_of, open_only
from tests.conftest import ARCHITECTURES, ENCODERS, LABELS, SEQ2SEQ

KINDS = ARCHITECTURES + SEQ2SEQ + ENCODERS
TIED = ["gpt2", "qwen2", "opt", "bloom", "t5"]
PLAIN = {"include": [], "threshold": None}


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def random_weight(num_rows: int = 33, width: int = 47, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    numbers = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    return numbers * torch.logspace(-4, 1, num_rows)[:, None]


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None, threshold: float | None = None) -> Int8Linear:
    quantized, scales = quantize_rows(weight)
    layer = Int8Linear(*reversed(weight.shape), bias if bias is None else nn.Parameter(bias, False), threshold)
    layer.weight = nn.Parameter(quantized, False)
    layer.scales = nn.Parameter(scales.view(torch.int32), False)
    return layer


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference relative to the largest value."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


# Quantizing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_quantized_as_bitsandbytes_does(dtype):
    weight = random_weight().to(dtype)
    quantized, scales = quantize_rows(weight)
    theirs, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.float())
    assert (quantized.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(quantized, theirs) and torch.equal(scales * 127, largest)


def test_a_row_of_zeros_stays_zeros():
    weight = random_weight()
    weight[5] = 0
    layer = layer_of(weight)
    assert not layer.weight[5].any() and layer.float_scales[5] == 0
    assert not layer.float_weight(torch.float32)[5].any() and layer(torch.ones(1, 47)).isfinite().all()


def test_a_weight_is_off_by_half_a_step_at_most():
    weight = random_weight()
    layer = layer_of(weight)
    steps = layer.float_scales[:, None]
    assert ((layer.float_weight(torch.float32) - weight).abs() <= 0.5001 * steps).all()


# The layer


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_the_product_and_its_gradient_are_those_of_the_dequantized_weight(dtype, most, with_bias):
    bias = torch.randn(33).to(dtype) if with_bias else None
    layer = layer_of(random_weight(), bias)
    x = torch.randn(2, 3, 47).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 33).to(dtype)
    weight = layer.float_weight(torch.float32).double()
    y = layer(x)
    y.backward(grad)
    assert (y.dtype, y.shape, x.grad.dtype) == (dtype, (2, 3, 33), dtype)
    assert difference(y, x.double() @ weight.T + (0 if bias is None else bias.double())) <= most
    assert difference(x.grad, grad.double() @ weight) <= most


def test_half_precision_does_not_overflow_on_the_way():
    layer = layer_of(torch.full((4, 2000), 0.01))
    y = layer(torch.ones(1, 2000, dtype=torch.float16))  # 2000 times 127 exceeds float16
    assert difference(y, torch.full((1, 4), 20.0)) <= 2**-10


def test_half_precision_loses_no_small_gradient_on_the_way():
    x = torch.ones(1, 4, dtype=torch.float16).requires_grad_()
    layer_of(torch.full((200, 4), 0.001))(x).backward(torch.full((1, 200), 0.01, dtype=torch.float16))
    # a gradient times a scale of 8e-6 almost vanishes in float16
    assert difference(x.grad, torch.full((1, 4), 200 * 0.01 * 0.001)) <= 2**-9


class Float32Sizes(TorchDispatchMode):
    """The sizes of the float32 tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.sizes.add(made.numel())
        return made


@pytest.mark.parametrize("with_bias", [False, True])
def test_bfloat16_products_round_once_and_make_no_float32_tensor(with_bias):
    bias = torch.randn(33).bfloat16() if with_bias else None
    layer = layer_of(random_weight(), bias)
    x = torch.randn(5, 47).bfloat16().requires_grad_()
    grad = torch.randn(5, 33).bfloat16()
    with Float32Sizes() as made:
        y = layer(x)
        y.backward(grad)
    assert made.sizes <= {33}  # the scales
    plain = nn.functional.linear(x, layer.weight.bfloat16())
    scaled = plain * layer.float_scales if bias is None else torch.addcmul(bias, plain, layer.float_scales)
    assert scaled.dtype == torch.float32 and torch.equal(y, scaled.bfloat16())
    assert torch.equal(x.grad, (grad * layer.float_scales).bfloat16() @ layer.weight.bfloat16())


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_no_activation_is_kept_for_backward(threshold):
    layer = layer_of(random_weight(), torch.randn(33), threshold)
    saved = []
    with saved_tensors_hooks(saved.append, lambda packed: packed):
        x = torch.randn(3, 47).requires_grad_()
        hidden = x * 2
        y = layer(hidden)
    kept = weakref.ref(hidden)
    del hidden
    assert saved == [] and kept() is None
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("threshold, most", [(0.0, 0.02), (6.0, 0.02)])
def test_int8_activations_are_close_to_float_ones(threshold, most):
    layer = layer_of(random_weight(), torch.randn(33), threshold)
    x = torch.randn(2, 5, 47).requires_grad_()
    exact = layer_of(random_weight(), layer.bias)
    y = layer(x)
    assert difference(y, exact(x)) <= most
    assert torch.equal(*(torch.autograd.grad(found.sum(), x)[0] for found in (y, exact(x))))


def test_a_threshold_keeps_outlying_columns_exact():
    weight = random_weight()
    x = torch.randn(5, 47)
    x[:, 3] *= 100
    exact = layer_of(weight)(x)
    without, with_outliers = (difference(layer_of(weight, None, t)(x), exact) for t in (0.0, 6.0))
    assert with_outliers < 0.01 and with_outliers < without


def test_int8_embeddings_are_the_dequantized_rows():
    weight = random_weight(20, 8)
    table = Int8Embedding(20, 8, torch.bfloat16)
    table.weight = layer_of(weight).weight
    table.scales = layer_of(weight).scales
    wanted = table.float_weight(torch.float32)[IDS % 20].bfloat16()
    assert torch.equal(table(IDS % 20), wanted) and wanted.shape == (2, 6, 8)


# A whole base


def dequantize(base, like) -> None:
    """Copy the dequantized weights of an int8 base into a float base."""
    for name, module in like.named_modules():
        if isinstance(module, QuantizedWeight):
            weight = module.float_weight(torch.float32)
            base.get_submodule(name).weight.data = weight.T.contiguous() if module.stored_transposed else weight


@pytest.mark.parametrize("kind", KINDS)
def test_an_int8_base_computes_what_its_dequantized_weights_do(tiny_bases, kind):
    base = load(tiny_bases[kind], int8=PLAIN, labels=LABELS)
    floats = load(tiny_bases[kind], labels=LABELS)
    linear = [name for name, m in floats.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and name != "lm_head"]
    left = {name for name in linear if not isinstance(base.get_submodule(name), Int8Linear)}
    assert left == {name.rpartition(".")[0] for name, p in base.named_parameters() if p.requires_grad and p.dim() > 1}
    before = logits_of(floats)
    dequantize(floats, base)
    assert difference(logits_of(base), logits_of(floats)) <= 1e-5
    assert 0 < difference(logits_of(base), before) <= 0.03


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_base_with_int8_activations_is_close_to_the_float_one(tiny_bases, kind, threshold):
    base = load(tiny_bases[kind], int8={"include": [], "threshold": threshold})
    assert 0 < difference(logits_of(base), logits_of(load(tiny_bases[kind]))) <= 0.1


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_weights_and_scales_outlive_a_cast_of_the_base(tiny_bases, cast):
    opened = open_only(tiny_bases["llama"], int8=PLAIN)
    base = fill_whole(opened)
    before = {name: p.clone() for name, p in base.named_parameters() if p.dtype in (torch.int8, torch.int32)}
    assert len(before) == 2 * 4 * 2  # four products in each of two layers, two of them merged
    base.to(cast)
    assert all(torch.equal(base.get_parameter(name), p) for name, p in before.items())
    assert base.model.norm.weight.dtype == cast


def test_nothing_of_an_int8_base_is_trained_but_an_encoders_head(tiny_bases):
    assert not any(p.requires_grad for p in load(tiny_bases["gpt2"], int8=PLAIN).parameters())
    encoder = load(tiny_bases["bert"], int8=PLAIN, labels=LABELS)
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= set(trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("include", [["head"], ["embeddings"], ["head", "embeddings"]])
def test_head_and_embeddings_are_int8_where_asked_for(tiny_bases, kind, include):
    base = load(tiny_bases[kind], int8=PLAIN | {"include": include})
    assert isinstance(base.get_output_embeddings(), Int8Linear) == ("head" in include)
    assert isinstance(base.get_input_embeddings(), Int8Embedding) == ("embeddings" in include)
    floats = load(tiny_bases[kind])
    dequantize(floats, base)
    assert difference(logits_of(base), logits_of(floats)) <= 1e-5


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_and_its_embeddings_are_one_int8_weight(tiny_bases, kind):
    base = load(tiny_bases[kind], int8=PLAIN | {"include": ["embeddings", "head"]})
    head = base.get_output_embeddings()
    tokens = base.get_input_embeddings()
    assert head.weight is tokens.weight and head.scales is tokens.scales and head.weight.dtype == torch.int8
    floats_left = [p for p in base.parameters() if p.is_floating_point()]
    assert not any(p.dim() > 1 and len(p) == base.config.vocab_size for p in floats_left)
    floats = load(tiny_bases[kind])
    dequantize(floats, base)
    assert difference(logits_of(base), logits_of(floats)) <= 1e-5


def test_a_random_base_is_the_same_in_int8_except_for_rounding(base):
    (base / "model.safetensors").unlink()
    floats = load(base, random_init=True)
    quantized = load(base, random_init=True, int8=PLAIN)
    weight, scales = quantize_rows(floats.model.layers[1].mlp.gate_up_proj.weight)
    layer = quantized.model.layers[1].mlp.gate_up_proj
    assert torch.equal(layer.weight, weight) and torch.equal(layer.float_scales, scales)


# Errors


@pytest.mark.parametrize("kind", [*TIED, "bart"])
@pytest.mark.parametrize("one", ["head", "embeddings"])
def test_one_of_two_that_are_tied_is_refused(tiny_bases, kind, one):
    options = {"int8": PLAIN | {"include": [one]}, "starts": f"model.int8_include: {one} alone is not possible"}
    assert "ties its head to its embeddings" in error_of(load, tiny_bases[kind], **options)


def test_a_head_that_an_encoder_has_not_is_refused(tiny_bases):
    error_of(load, tiny_bases["bert"], int8=PLAIN | {"include": ["head"]}, starts="model.int8_include: ")


def test_a_head_that_is_trained_is_refused(tiny_bases):
    options = {"int8": PLAIN | {"include": ["head"]}, "choose_trained": parameters_of_head}
    error_of(load, tiny_bases["llama"], **options, starts="model.int8_include: the head is trained")


def test_embeddings_that_do_more_than_look_up_are_refused_by_their_type(tiny_bases):
    options = {"int8": PLAIN | {"include": ["head", "embeddings"]}, "starts": "model.int8_include: "}
    assert "BartScaledWordEmbedding" in error_of(load, tiny_bases["bart"], **options)


def test_fused_experts_are_refused_by_their_type(tmp_path):
    wide = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    JetMoeConfig(**wide, num_key_value_heads=2, kv_channels=8, num_local_experts=4).save_pretrained(tmp_path)
    message = error_of(load, tmp_path, random_init=True, int8=PLAIN, starts="model.quantization: ")
    assert "JetMoeParallelExperts" in message and "model.quantization=none" in message
    assert load(tmp_path, random_init=True)
