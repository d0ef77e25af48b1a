"""Prompts to train without a base: what the tests of the training state share."""

from types import SimpleNamespace

import torch
from torch import nn

from ptune_dist.distributed.world import World
from ptune_dist.optim.loss_scale import LossScale
from ptune_dist.optim.optimizer import build_torch_optimizer
from ptune_dist.optim.prompt_state import Member, PromptState

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
SHAPES = {"a": (2, 3), "b.c": (6,)}  # parameters of modules have dots in their names


def settings(optimizer: str) -> SimpleNamespace:
    return SimpleNamespace(
        optimizer=optimizer, peak_rate=0.1, betas=(0.8, 0.95), eps=1e-6, momentum=0.9, weight_decay=0.01
    )


def build_member(optimizer: str = "adamw", max_grad_norm: float = 1.0) -> Member:
    named = {name: nn.Parameter(torch.linspace(-1, 1, 6).reshape(shape)) for name, shape in SHAPES.items()}
    return Member(named, build_torch_optimizer(settings(optimizer), list(named.values())), max_grad_norm)


def build_state(*names: str, loss_scale: LossScale | None = None, **options) -> PromptState:
    return PromptState({name: build_member(**options) for name in names or ("one",)}, ALONE, loss_scale)


def give_gradients(state: PromptState, seed: int = 0, **values: float) -> dict[str, list[torch.Tensor]]:
    """Random gradients for each member, or one value everywhere for the members that are named."""
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for name, member in state.members.items():
        for parameter in member.parameters:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.full_like(parameter, values[name]) if name in values else random
        given[name] = [parameter.grad.clone() for parameter in member.parameters]
    return given


def tensors_of(state: PromptState) -> dict[str, list[torch.Tensor]]:
    return {name: [p.detach().clone() for p in member.parameters] for name, member in state.members.items()}


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def take_step(state: PromptState, learning_rates: dict[str, float]) -> dict[str, str]:
    """`measure` and `move` the members that are named; returns their faults."""
    measured = state.measure(list(learning_rates), torch.zeros(0))
    return state.move(learning_rates, measured.norms)
