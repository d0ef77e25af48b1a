"""Experts are read and quantized rank by rank, and compute what their dequantized weights do."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from ptune_dist.base.load import fill_whole
from ptune_dist.base.quantized import QuantizedExperts
from tests.base.bases import load, logits_of, open_only
from tests.base.mixtures import MIXTURES, save_mixture

INT8 = {"int8": {"include": [], "threshold": None}}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory):
    return save_mixture(request.param, tmp_path_factory.mktemp(request.param))


def dequantized(folder, base):
    """transformers' own model with the numbers of a quantized base's experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = dict(model.named_parameters())
    for name, module in base.named_modules():
        if isinstance(module, QuantizedExperts):
            plain[name].data = module.float_weight(torch.float32).view(plain[name].shape)
    return model


def experts_of(base) -> list[str]:
    return sorted({name.rpartition(".")[0] for name, m in base.named_modules() if isinstance(m, QuantizedExperts)})


def inputs_of_experts(experts) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    if not hasattr(experts, "has_gate"):  # Llama 4's
        return (torch.randn(12, 32, requires_grad=True),)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    return torch.randn(7, 32, requires_grad=True), chosen, torch.rand(7, 2)


def test_a_mixture_is_read_without_a_whole_copy_and_is_what_transformers_loads(mixture):
    opened = open_only(mixture)
    assert opened.note is None
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    assert torch.allclose(logits_of(fill_whole(opened)), logits_of(model), rtol=1e-5, atol=1e-6)


def test_int8_experts_and_their_gradients_are_those_of_the_dequantized_weights(mixture):
    base = load(mixture, **INT8)
    model = dequantized(mixture, base)
    names = experts_of(base)
    assert names
    for name in names:
        ours = base.get_submodule(name)
        x, *rest = inputs_of_experts(ours)
        found = ours(x, *rest)
        wanted = model.get_submodule(name)(x, *rest)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
        (grad,) = torch.autograd.grad(found.square().sum(), x)
        (plain,) = torch.autograd.grad(wanted.square().sum(), x)
        assert (grad - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_int8_experts_hold_one_byte_for_each_weight_and_are_close_to_the_float_ones(mixture):
    base = load(mixture, **INT8)
    plain = load(mixture)
    for name, module in base.named_modules():
        if isinstance(module, QuantizedExperts):
            weight = plain.get_parameter(name)
            assert module.weight.dtype == torch.int8 and module.weight.numel() == weight.numel()
            found = module.float_weight(torch.float32).view(weight.shape)
            assert 0 < (found - weight).abs().max() <= weight.abs().max() / 127


def test_no_float_weight_of_an_expert_is_saved_for_backward(mixture):
    base = load(mixture, **INT8)
    experts: Any = base.get_submodule(experts_of(base)[0])
    x, *rest = inputs_of_experts(experts)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x, *rest)
    assert max(sizes) < experts.down_proj.weight.numel() * 4


def test_experts_beyond_the_last_and_unused_ones_contribute_nothing(mixture):
    base = load(mixture, **INT8)
    experts: Any = base.get_submodule(experts_of(base)[0])
    if not hasattr(experts, "has_gate"):
        pytest.skip("Llama 4 sorts tokens before its experts")
    x = torch.randn(3, 32)
    chosen = torch.tensor([[1, 4], [4, 4], [1, 4]])
    found = experts(x, chosen, torch.ones(3, 2))
    alone = experts(x, torch.tensor([[1], [1], [1]]), torch.ones(3, 1))
    assert torch.allclose(found[[0, 2]], alone[[0, 2]]) and not found[1].any()
