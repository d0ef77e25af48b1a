"""Linear layers whose frozen weight is stored in int8, with products in floating point or in int8.

Row-wise absmax quantization as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339).

On CUDA a weight-only product takes one of two ways, by its number of rows M. Many rows make it bound by arithmetic:
one kernel dequantizes the weight (3 bytes of traffic for each weight) and cuBLAS multiplies. Few rows make it bound by
reading the weight: a kernel that dequantizes inside the product reads 1 byte for each weight instead of 5, but
multiplies more slowly than cuBLAS. With B bytes/s of memory, R operations/s of cuBLAS and r of the kernel both take
equally long at M = 3 / (2 B (1/r - 1/R)), about 400 rows for an H100 (B = 3e12, R = 650e12, r = 350e12, estimates).
`configs/bench/quantized_gpu_products.yaml` measures both ways.

Shapes: M rows, O outputs and I inputs of a layer.
"""

import functools
import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base import quantized_ops as ops
from ptune_dist.base.experts import quantize_experts
from ptune_dist.base.quantized import (
    ExpertWeight,
    Format,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    quantize_layers,
)

LEVELS = 127.0
MAX_FUSED_ROWS = 256  # of a product that dequantizes as it multiplies, see above


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [O, I] and float32 scales [O] of a float matrix, with bitsandbytes' arithmetic in float32 on any device.

    The CUDA kernel of bitsandbytes is not used: it requires float16, which loses the small weights of bfloat16.
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=1)
    factor = torch.where(largest > 0, LEVELS / largest, 0.0)
    return (rows * factor[:, None]).round_().to(torch.int8), largest / LEVELS


class Int8Product(torch.autograd.Function):
    """x [..., I] -> [..., O]. The weight is frozen, so backward needs only the weight, and no activation is saved.

    The layer is passed as an object, because under ZeRO-3 its parameters are gathered anew for backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "Int8Linear") -> torch.Tensor:
        ctx.layer = layer
        if layer.threshold is not None:
            return (multiply_int8_on_gpu if x.is_cuda else multiply_int8)(x, layer, layer.threshold)
        return multiply(x, layer)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return multiply_back(grad, ctx.layer), None


Layer = QuantizedLinear | ExpertWeight


def multiply(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """A layer's outputs [..., O] from float activations x [..., I]."""
    if x.is_cuda:
        return multiply_on_gpu(x, layer)
    if x.dtype == torch.float16:  # 127 times an activation may exceed its range
        return nn.functional.linear(x, layer.float_weight(x.dtype), layer.bias)
    # int8 values are exact in bfloat16 too. The scale is applied to the outputs, which are fewer than the weights.
    y = nn.functional.linear(x, layer.weight.to(x.dtype))
    # In place: without `out`, the product with float32 scales would be a float32 tensor.
    if layer.bias is None:
        return torch.mul(y, layer.float_scales, out=y)
    return torch.addcmul(layer.bias, y, layer.float_scales, out=y)


def multiply_back(grad: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The gradient of a layer's inputs [..., I] from that of its outputs, grad [..., O]."""
    if grad.is_cuda:
        return multiply_back_on_gpu(grad, layer)
    if grad.dtype == torch.float16:
        return grad @ layer.float_weight(grad.dtype)
    scaled = torch.mul(grad, layer.float_scales, out=torch.empty_like(grad))
    return scaled @ layer.weight.to(grad.dtype)


def multiply_on_gpu(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """A layer's outputs [..., O] from float activations x [..., I]."""
    bias = getattr(layer, "bias", None)
    rows = x.reshape(-1, x.shape[-1])
    if is_fused(rows):
        y = ops.multiply_int8(rows, layer.weight, layer.float_scales, is_transposed=False)
        y = y if bias is None else y.add_(bias)
    else:
        y = nn.functional.linear(rows, ops.dequantize(layer.weight, layer.float_scales, x.dtype), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def multiply_back_on_gpu(grad: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The gradient of a layer's inputs [..., I] from that of its outputs, grad [..., O]."""
    rows = grad.reshape(-1, grad.shape[-1])
    if is_fused(rows) and rows.dtype != torch.float16:  # the kernel scales the gradient, which may become too small
        found = ops.multiply_int8(rows, layer.weight, layer.float_scales, is_transposed=True)
    else:
        found = rows @ ops.dequantize(layer.weight, layer.float_scales, grad.dtype)
    return found.view(*grad.shape[:-1], found.shape[-1])


def is_fused(rows: torch.Tensor) -> bool:
    """Whether a product dequantizes as it multiplies: only tensor cores for half precision are fast there."""
    return len(rows) <= MAX_FUSED_ROWS and rows.dtype != torch.float32


def multiply_int8(x: torch.Tensor, layer: "Int8Linear", threshold: float) -> torch.Tensor:
    """LLM.int8(): activations are quantized too, except columns with an entry beyond the threshold (0: all are)."""
    # On import it warns that it found no 4-bit kernel, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional as bnb

    rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float16, copy=True)
    quantized, stats, outliers = bnb.int8_vectorwise_quant(rows, threshold=threshold)
    largest = layer.float_scales * LEVELS
    if outliers is not None and outliers.numel():
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            rows, quantized, layer.weight, stats, largest, outliers, None
        )
    else:
        y = torch.ops.bitsandbytes.int8_scaled_mm(quantized, layer.weight, stats, largest, dtype=torch.float16)
    y = y.to(x.dtype) if layer.bias is None else y.to(x.dtype) + layer.bias
    return y.view(*x.shape[:-1], -1)


def multiply_int8_on_gpu(x: torch.Tensor, layer: "Int8Linear", threshold: float) -> torch.Tensor:
    """The same on int8 tensor cores, without the detour through float16, which bfloat16's activations may overflow.

    To find outlying columns the host waits for the GPU once in each product; with a threshold of 0 it does not.
    """
    rows = x.reshape(-1, x.shape[-1])
    outliers = outlying_columns(rows, threshold) if threshold and len(rows) else None
    is_kept = None
    if outliers is not None:
        is_kept = torch.ones(x.shape[-1], device=x.device).index_fill_(0, outliers, 0.0)
    quantized, row_scales = ops.quantize_activations(rows, is_kept, torch.int8)
    y = ops.scale_sums(multiply_integers(quantized, layer.weight), row_scales, layer.float_scales, x.dtype)
    if outliers is not None:
        weight = ops.dequantize(layer.weight[:, outliers], layer.float_scales, x.dtype)
        y.addmm_(rows[:, outliers], weight.T)
    y = y if layer.bias is None else y.add_(layer.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def outlying_columns(rows: torch.Tensor, threshold: float) -> torch.Tensor | None:
    """Indices of the columns with an entry beyond the threshold; None if there are none. Waits for the GPU."""
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=0)
    found = (largest > threshold).nonzero().view(-1)
    return found if len(found) else None


def multiply_integers(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [M, I] times weight [O, I] transposed, both int8: int32 [M, O]; float32 in shapes that cuBLAS refuses."""
    if rows.shape[1] % 8 or weight.shape[0] % 8:
        return rows.float() @ weight.float().T
    num_missing = max(0, ops.MIN_INT8_ROWS - len(rows))
    padded = nn.functional.pad(rows, (0, 0, 0, num_missing)) if num_missing else rows
    return cast(Any, torch)._int_mm(padded, weight.T)[: len(rows)]


class Int8Linear(QuantizedLinear):
    """A frozen nn.Linear in int8. `threshold` is LLM.int8()'s for outliers; None multiplies float activations."""

    quantize = staticmethod(quantize_rows)

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, threshold: float | None = None):
        super().__init__(in_features, out_features, bias)
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Int8Product.apply(x, self)


class Int8Embedding(QuantizedWeight):
    """A frozen nn.Embedding in int8."""

    quantize = staticmethod(quantize_rows)

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype):
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        return torch.mul(self.weight[ids], self.float_scales[ids][..., None], out=out)


class Int8Experts(QuantizedExperts):
    """Frozen experts in int8; their activations are never quantized."""

    quantize = staticmethod(quantize_rows)
    multiply = staticmethod(multiply)
    multiply_back = staticmethod(multiply_back)


def make_int8(
    model: PreTrainedModel, *, include: list[str], threshold: float | None, dtype: torch.dtype, skip: set[str]
) -> None:
    """Replace the linear layers of a model on the meta device by int8 layers, as `quantize_layers` does."""
    linear = functools.partial(Int8Linear, threshold=threshold)
    experts = functools.partial(quantize_experts, build=Int8Experts)
    format_ = Format("int8", linear, linear, Int8Embedding, experts)
    quantize_layers(model, format_, include=include, dtype=dtype, skip=skip)
