"""The sum of gradients over replicas: the only thing that training sends between ranks that hold the same tensors."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ptune_dist.distributed.world import World


def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Replace the gradient of each float32 parameter by its sum over all ranks, with one all-reduce in float32.

    A gradient that this rank lacks counts as zeros. Afterwards every `grad` is a view of one flat buffer. Collective:
    every rank must call, with parameters of the same shapes in the same order.
    """
    if not parameters:
        return
    flat = flatten_gradients(parameters)
    if world.size > 1:
        dist.all_reduce(flat)
    set_gradients(parameters, flat)


def flatten_gradients(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The gradients of all parameters, one after another, in float32. One that is lacking counts as zeros."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([gradient.detach().reshape(-1).float() for gradient in gradients])


def set_gradients(parameters: Sequence[nn.Parameter], flat: torch.Tensor) -> None:
    """Have each parameter's gradient be its part of what `flatten_gradients` gives."""
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view(parameter.shape)
