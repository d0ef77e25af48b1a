"""Linear layers whose frozen weight is stored in 8-bit floats (e4m3) and multiplied on fp8 tensor cores.

Activations and gradients are quantized row by row as they come, so both operands of a product have rowwise scales; all
are e4m3, whose range suffices where every row has a scale of its own (the recipe "rowwise" of torchao). The weight is
frozen, so there is no product for its gradient. Accumulation is fast (22 bits or so), as in that recipe: without it
Hopper's rowwise kernels lose much of their speed.

In the product of backward, grad [M, O] @ weight [O, I], the weight's scales lie along the contraction: they multiply
the gradient before it is quantized. `torch._scaled_mm` wants the weight's columns contiguous there. A transposed copy
is made each time, 2 bytes of traffic for each weight or about 6% of the product at 8,192 rows (an estimate), instead of
keeping a second copy of the base.

On a CPU the same numbers are rounded in the same places, and multiplied in float32.

Shapes: M rows, O outputs and I inputs of a layer.
"""

import functools
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ptune_dist.base import quantized_ops as ops
from ptune_dist.base.experts import quantize_experts
from ptune_dist.base.int8 import Int8Embedding, Int8Experts, Int8Linear
from ptune_dist.base.quantized import Format, QuantizedLinear, quantize_layers
from ptune_dist.errors import UserError

E4M3 = torch.float8_e4m3fn
MIN_CAPABILITY = (8, 9)  # of a GPU with fp8 tensor cores
ALIGNMENT = 16  # of both widths of a weight, for `torch._scaled_mm`


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of e4m3 numbers, as int8 [O, I], and float32 scales [O] of a float matrix."""
    codes, scales = ops.quantize_eagerly(rows, None, E4M3)
    return codes.view(torch.int8), scales


class Fp8Product(torch.autograd.Function):
    """x [..., I] -> [..., O]. No activation is saved; the layer is passed as an object as in `Int8Product`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "Fp8Linear") -> torch.Tensor:
        ctx.layer = layer
        rows = x.reshape(-1, x.shape[-1])
        y = (multiply if layer.runs_on_tensor_cores(x) else multiply_emulated)(rows, layer)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer = ctx.layer
        rows = grad.reshape(-1, grad.shape[-1])
        found = (multiply_back if layer.runs_on_tensor_cores(grad) else multiply_back_emulated)(rows, layer)
        return found.to(grad.dtype).view(*grad.shape[:-1], found.shape[-1]), None


def multiply(rows: torch.Tensor, layer: "Fp8Linear") -> torch.Tensor:
    """Outputs [M, O] in bfloat16 from inputs [M, I]."""
    codes, scales = ops.quantize_activations(rows, None, E4M3)
    bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
    return scaled_product(codes, scales, layer.weight, layer.float_scales, bias)


def multiply_back(rows: torch.Tensor, layer: "Fp8Linear") -> torch.Tensor:
    """The gradient of inputs [M, I] in bfloat16 from that of outputs [M, O]."""
    codes, scales = ops.quantize_activations(rows, layer.float_scales, E4M3)
    ones = torch.ones(layer.in_features, device=rows.device)
    return scaled_product(codes, scales, ops.transpose_bytes(layer.weight), ones)


def scaled_product(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """e4m3 rows [M, K] times a weight [N, K] transposed, each row of either with a scale: bfloat16 [M, N]."""
    return cast(Any, torch)._scaled_mm(
        rows,
        weight.view(E4M3).T,
        scale_a=row_scales[:, None],
        scale_b=weight_scales[None],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def multiply_emulated(rows: torch.Tensor, layer: "Fp8Linear") -> torch.Tensor:
    """What `multiply` computes, in float32 on any device."""
    codes, scales = ops.quantize_eagerly(rows, None, E4M3)
    y = (codes.float() @ layer.codes.T).mul_(scales[:, None]).mul_(layer.float_scales)
    return y if layer.bias is None else y.add_(layer.bias)


def multiply_back_emulated(rows: torch.Tensor, layer: "Fp8Linear") -> torch.Tensor:
    """What `multiply_back` computes, in float32 on any device."""
    codes, scales = ops.quantize_eagerly(rows, layer.float_scales, E4M3)
    return (codes.float() @ layer.codes).mul_(scales[:, None])


class Fp8Linear(QuantizedLinear):
    """A frozen nn.Linear in e4m3."""

    quantize = staticmethod(quantize_rows)

    @property
    def codes(self) -> torch.Tensor:
        return self.weight.view(E4M3).float()

    def runs_on_tensor_cores(self, x: torch.Tensor) -> bool:
        """Whether products with `x` run in fp8; narrow layers of odd widths are emulated on a GPU too."""
        return x.is_cuda and self.in_features % ALIGNMENT == 0 and self.out_features % ALIGNMENT == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Fp8Product.apply(x, self)


def make_fp8(model: PreTrainedModel, *, include: list[str], dtype: torch.dtype, skip: set[str]) -> None:
    """Replace the linear layers of a model on the meta device by fp8 layers, as `quantize_layers` does.

    Head and token embeddings, if included, and fused experts are in int8, the more exact of the two where nothing is
    multiplied in fp8.
    """
    experts = functools.partial(quantize_experts, build=Int8Experts)
    format_ = Format("fp8", Fp8Linear, Int8Linear, Int8Embedding, experts)
    quantize_layers(model, format_, include=include, dtype=dtype, skip=skip)


def check_device(device: torch.device) -> None:
    """Raise UserError if this device is a GPU that cannot multiply in fp8. A CPU emulates it."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        raise UserError(
            "model.quantization: fp8 needs a GPU of compute capability 8.9 or newer, and the "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: set model.quantization=int8"
        )
