"""A trained head is apart from the frozen base, in float32, and computes as if it were in its place."""

import pytest
import torch

from ptune_dist.base.trained import set_apart, trained_parameters
from tests.base.bases import IDS, load
from tests.conftest import ENCODERS, LABELS

CPU = torch.device("cpu")


def load_encoder(folder, dtype=torch.float32):
    return load(folder, dtype=dtype, labels=LABELS)


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_is_trained_leaves_the_parameters_and_nothing_else_does(tiny_bases, kind):
    base = load_encoder(tiny_bases[kind])
    trained = {name: p.detach().clone() for name, p in base.named_parameters() if p.requires_grad}
    frozen = {name for name, p in base.named_parameters() if not p.requires_grad}
    assert trained and trained_parameters(base).keys() == trained.keys()
    set_apart(base, CPU, torch.float32)
    assert {name for name, _ in base.named_parameters()} == frozen
    assert all(torch.equal(found, trained[name]) for name, found in trained_parameters(base).items())
    assert trained_parameters(base).keys() == trained.keys()


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_base_computes_as_before_and_gradients_are_the_same(tiny_bases, kind):
    plain, apart = load_encoder(tiny_bases[kind]), load_encoder(tiny_bases[kind])
    set_apart(apart, CPU, torch.float32)
    logits = [base(input_ids=IDS).logits for base in (plain, apart)]
    assert torch.equal(*logits)
    for found in logits:
        found.square().sum().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert all(torch.equal(p.grad, wanted[name]) for name, p in trained_parameters(apart).items())


@pytest.mark.parametrize("kind", ENCODERS)
def test_under_bfloat16_the_head_is_float32_and_computes_in_bfloat16(tiny_bases, kind):
    base = load_encoder(tiny_bases[kind], torch.bfloat16)
    set_apart(base, CPU, torch.bfloat16)
    wanted = load_encoder(tiny_bases[kind], torch.bfloat16)
    for parameter in wanted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    logits = base(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, wanted(input_ids=IDS).logits)
    logits.float().square().sum().backward()
    for parameter in trained_parameters(base).values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0
    with torch.no_grad():
        next(iter(trained_parameters(base).values())).add_(1.0)
    assert not torch.equal(base(input_ids=IDS).logits, logits)  # each forward reads what a step has changed


def test_modules_that_share_a_parameter_still_share_it():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    set_apart(model, CPU, torch.float32)
    assert model[0].weight is model[1].weight
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]
