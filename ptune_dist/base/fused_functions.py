"""Elementwise work of a frozen layer as functions with few saved tensors: RMSNorm, gated activation, rotary embedding.

torch runs these one operation at a time and saves what each of them needs, float32 copies included. Here a function
saves its inputs in their own precision and computes the rest again in backward. There are no gradients of weights,
because the base is frozen. All arithmetic is in float32; the result is rounded once.

Shapes: N positions (or positions x heads), D width of a row, H heads, R rotated part of a head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

from ptune_dist.base.fused_kernels import Kernel

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
}


def slope(activation: str, x: torch.Tensor) -> torch.Tensor:
    """The derivative of an activation."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        factor = math.sqrt(2 / math.pi)
        t = torch.tanh(factor * (x + 0.044715 * x * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * factor * (1 + 3 * 0.044715 * x * x)
    return (x > 0).to(x.dtype)


def norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, ..., D] -> y like x and 1 / the root mean square [N, ...] in float32."""
    rows = x.float()
    rstd = torch.rsqrt(rows.square().mean(-1) + eps)
    y = rows * rstd[..., None] * (weight.float() + offset)
    return y.to(x.dtype), rstd


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float
) -> tuple[torch.Tensor]:
    normed = x.float() * rstd[..., None]
    scaled = grad.float() * (weight.float() + offset)
    dx = rstd[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (dx.to(x.dtype),)


def gated_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> tuple[torch.Tensor]:
    return ((ACTIVATIONS[activation](gate.float()) * up.float()).to(gate.dtype),)


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = gate.float()
    g = grad.float()
    d_gate = g * up.float() * slope(activation, wide)
    return d_gate.to(gate.dtype), (g * ACTIVATIONS[activation](wide)).to(up.dtype)


def merged_forward(both: torch.Tensor, activation: str) -> tuple[torch.Tensor]:
    """both [N, 2 D] -> [N, D]."""
    gate, up = both.chunk(2, dim=-1)
    return gated_forward(gate, up, activation)


def merged_backward(grad: torch.Tensor, both: torch.Tensor, activation: str) -> tuple[torch.Tensor]:
    gate, up = both.chunk(2, dim=-1)
    return (torch.cat(gated_backward(grad, gate, up, activation), dim=-1),)


def activation_forward(x: torch.Tensor, activation: str) -> tuple[torch.Tensor]:
    return (ACTIVATIONS[activation](x.float()).to(x.dtype),)


def activation_backward(grad: torch.Tensor, x: torch.Tensor, activation: str) -> tuple[torch.Tensor]:
    return ((grad.float() * slope(activation, x.float())).to(x.dtype),)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """x [N, H, D], cos and sin [N, R]: rotated by the angle (sign 1), or the gradient of that (sign -1)."""
    rotated = cos.shape[-1]
    half = rotated // 2
    wide = x[..., :rotated].float()
    first = wide[..., :half]
    second = wide[..., half:]
    cos = cos[:, None].float()
    sin = sin[:, None].float()
    if sign > 0:
        turned = torch.cat([-second * sin[..., :half], first * sin[..., half:]], dim=-1)
    else:
        turned = torch.cat([second * sin[..., half:], -first * sin[..., :half]], dim=-1)
    out = (wide * cos + turned).to(x.dtype)
    return out if rotated == x.shape[-1] else torch.cat([out, x[..., rotated:]], dim=-1)


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotate(q, cos, sin, sign), rotate(k, cos, sin, sign)


NORM_FORWARD = Kernel(norm_forward)
NORM_BACKWARD = Kernel(norm_backward)
GATED_FORWARD = Kernel(gated_forward)
GATED_BACKWARD = Kernel(gated_backward)
MERGED = (Kernel(merged_forward), Kernel(merged_backward))
ALONE = (Kernel(activation_forward), Kernel(activation_backward))
ROTATE = Kernel(rotate_both)


class RMSNorm(torch.autograd.Function):
    """The norm's weight is read from its module in backward too: ZeRO-3 gathers it anew."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module, eps: float, offset: float) -> torch.Tensor:
        y, rstd = NORM_FORWARD([x], [module.get_parameter("weight")], eps, offset)
        ctx.save_for_backward(x, rstd)
        ctx.module = module
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, rstd = ctx.saved_tensors
        (dx,) = NORM_BACKWARD([grad, x, rstd], [ctx.module.weight], ctx.offset)
        return dx, None, None, None


class GatedActivation(torch.autograd.Function):
    """activation(gate) * up, of [N, D] each."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return GATED_FORWARD([gate, up], [], activation)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        d_gate, d_up = GATED_BACKWARD([grad, *ctx.saved_tensors], [], ctx.activation)
        return d_gate, d_up, None


class Activation(torch.autograd.Function):
    """A function of one tensor by its two kernels: an activation that torch computes in several operations, or
    activation(gate) * up of one tensor [N, 2 D] with both, whose gradient is one tensor too.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernels: tuple[Kernel, Kernel], activation: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        forward, ctx.backward_kernel = kernels
        ctx.activation = activation
        return forward([x], [], activation)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.backward_kernel([grad, *ctx.saved_tensors], [], ctx.activation)[0], None, None


class Rotary(torch.autograd.Function):
    """q [N, H, D] and k [N, G, D] rotated by the angles of cos and sin [N, R]; only these are saved."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return ROTATE([q, k, cos, sin], [], 1.0)

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        dq, dk = ROTATE([grad_q, grad_k, *ctx.saved_tensors], [], -1.0)
        return dq, dk, None, None
