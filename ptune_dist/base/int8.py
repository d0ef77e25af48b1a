"""Linear layers whose frozen weight is held in 8 bits: one int8 row and one float32 scale for each output.

Row-wise absmax quantization as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), without bitsandbytes' module,
which keeps a full copy of its weight on every rank under ZeRO-3. Weight and scales are ordinary frozen parameters, so
ZeRO partitions, gathers, prefetches and offloads them as any other. O outputs, I inputs of a layer.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptune_dist.errors import UserError

LEVELS = 127.0
CHUNK_ELEMENTS = 4 << 20  # quantized at a time while loading: small enough for a processor's cache and any memory
MOST_LEFT_OUT = 0.25  # of a layer's matrices; more means that int8 would save little, and silently


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [O, I] and float32 scales [O] of a float matrix: bitsandbytes' arithmetic, in float32 on any device.

    (bitsandbytes' CUDA kernel wants float16, which loses bfloat16's small weights.)
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=1)
    factor = torch.where(largest > 0, LEVELS / largest, 0.0)
    return (rows * factor[:, None]).round_().to(torch.int8), largest / LEVELS


class Int8Product(torch.autograd.Function):
    """x [..., I] -> [..., O]. The weight is frozen, so backward needs the weight alone: no activation is kept.

    The layer travels as it is: under ZeRO-3 its parameters are gathered before forward and again before backward.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: "Int8Linear") -> torch.Tensor:
        ctx.layer = layer
        if layer.threshold is not None:
            return multiply_int8(x, layer)
        if x.dtype == torch.float16:  # whole numbers up to 127 times activations leave its range
            return nn.functional.linear(x, layer.float_weight(x.dtype), layer.bias)
        # Whole numbers are exact in bfloat16 too; the scale goes on the outputs, of which there are fewer.
        y = nn.functional.linear(x, layer.weight.to(x.dtype))
        y = y * layer.float_scales if layer.bias is None else torch.addcmul(layer.bias, y, layer.float_scales)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer = ctx.layer
        if grad.dtype == torch.float16:
            return grad @ layer.float_weight(grad.dtype), None
        return (grad * layer.float_scales).to(grad.dtype) @ layer.weight.to(grad.dtype), None


def multiply_int8(x: torch.Tensor, layer: "Int8Linear") -> torch.Tensor:
    """LLM.int8(): activations are quantized too; columns with an entry beyond the threshold are not (0: all are)."""
    # It says at import that it found no 4-bit kernel, which nobody asked for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional as bnb

    rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float16, copy=True)
    quantized, stats, outliers = bnb.int8_vectorwise_quant(rows, threshold=layer.threshold)
    largest = layer.float_scales * LEVELS
    if outliers is not None and outliers.numel():
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            rows, quantized, layer.weight, stats, largest, outliers, None
        )
    else:
        y = torch.ops.bitsandbytes.int8_scaled_mm(quantized, layer.weight, stats, largest, dtype=torch.float16)
    y = y.to(x.dtype) if layer.bias is None else y.to(x.dtype) + layer.bias
    return y.view(*x.shape[:-1], -1)


class Int8Weight(nn.Module):
    """What an int8 linear layer and an int8 embedding share: weight [O, I] and scales [O]."""

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width, dtype=torch.int8, device="meta"), requires_grad=False)
        # float32 bits in whole numbers, which no engine casts to half precision
        self.scales = nn.Parameter(torch.empty(num_rows, dtype=torch.int32, device="meta"), requires_grad=False)
        self.stored_transposed = False

    @property
    def float_scales(self) -> torch.Tensor:
        return self.scales.view(torch.float32)

    def float_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight [O, I]."""
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        return torch.mul(self.weight, self.float_scales[:, None], out=out)


class Int8Linear(Int8Weight):
    """A frozen nn.Linear in int8. `threshold`: None for float activations, else LLM.int8()'s for outliers."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, threshold: float | None):
        super().__init__(out_features, in_features)
        self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Int8Product.apply(x, self)


class Int8Embedding(Int8Weight):
    """A frozen nn.Embedding in int8."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype):
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.weight[ids] * self.float_scales[ids][..., None]).to(self.dtype)


class Int8Rows:
    """An int8 weight and its scales, quantized as the float rows are read; no more than a chunk stands in memory.

    A row's scale is the whole row's, so where a rank's part begins or ends inside a row the whole row is read.
    """

    def __init__(self, read_rows: Callable[[int, int], torch.Tensor], num_rows: int, width: int):
        self._read_rows, self._width = read_rows, width
        self._scales, self._known = torch.empty(num_rows), torch.zeros(num_rows, dtype=torch.bool)

    def fill_weight(self, start: int, out: torch.Tensor) -> None:
        """Elements [start, start + len(out)) of the flattened weight."""
        stop, width = start + len(out), self._width
        first, last, step = start // width, math.ceil(stop / width), max(1, CHUNK_ELEMENTS // width)
        for top in range(first, last, step):
            bottom = min(top + step, last)
            quantized = self._quantize(top, bottom, out.device).view(-1)
            begin, end = max(start, top * width), min(stop, bottom * width)
            out[begin - start : end - start].copy_(quantized[begin - top * width : end - top * width])

    def fill_scales(self, start: int, out: torch.Tensor) -> None:
        """Scales [start, start + len(out)); rows that `fill_weight` has not met are read for it."""
        unknown = (~self._known[start : start + len(out)]).nonzero()
        if len(unknown):
            self._quantize(start + int(unknown[0]), start + int(unknown[-1]) + 1, torch.device("cpu"))
        out.copy_(self._scales[start : start + len(out)].view(torch.int32))

    def _quantize(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        quantized, scales = quantize_rows(self._read_rows(first, last).to(device))
        self._scales[first:last] = scales.cpu()
        self._known[first:last] = True
        return quantized


def make_int8(
    model: PreTrainedModel, *, include: list[str], threshold: float | None, dtype: torch.dtype, skip: set[str]
) -> None:
    """Replace the linear layers of a model without memory by int8 ones, in place. Raises UserError.

    The head and the token embeddings stay unless `include` has "head" or "embeddings"; modules named in `skip` stay
    too: they are trained.
    """
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is tokens.weight
    if tied and len(set(include)) == 1:
        raise UserError(f"model.int8_include: {include[0]} alone cannot be: this base ties its head to its embeddings")
    if "head" in include and head is None:
        raise UserError("model.int8_include: this base has no language-model head")
    chosen = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and name not in skip
    }
    refuse_other_layers(model, chosen)
    if "head" in include and not tied:
        chosen |= {name: module for name, module in model.named_modules() if module is head}
    for name, module in chosen.items():
        replace_module(model, name, build_int8_linear(module, threshold))
    if "embeddings" in include:
        replace_embeddings(model, tokens.weight, threshold, dtype)


def is_linear(module: nn.Module) -> bool:
    """A linear layer that calls itself: torch's attention module reads its own projection's weight."""
    is_plain = isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    return is_plain or isinstance(module, Conv1D)


def refuse_other_layers(model: PreTrainedModel, chosen: dict[str, nn.Module]) -> None:
    """Raise UserError where much of the weight is in layers that have no int8 form (fused experts, say)."""
    others: dict[str, int] = {}
    for module in model.modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if size and not is_linear(module) and not isinstance(module, nn.Embedding):
            others[type(module).__name__] = others.get(type(module).__name__, 0) + size
    left_out = sum(others.values())
    if left_out > MOST_LEFT_OUT * (left_out + sum(module.weight.numel() for module in chosen.values())):
        raise UserError(
            f"model.quantization: int8 is for linear layers; {left_out:,} weights of this base are in "
            f"{', '.join(sorted(others)[:5])}, which has no int8 form: set model.quantization=none"
        )


def build_int8_linear(module: nn.Module, threshold: float | None) -> Int8Linear:
    transposed = isinstance(module, Conv1D)
    num_inputs, num_outputs = module.weight.shape if transposed else reversed(module.weight.shape)
    made = Int8Linear(num_inputs, num_outputs, module.bias, threshold)
    made.stored_transposed = transposed
    return made


def replace_embeddings(
    model: PreTrainedModel, weight: nn.Parameter, threshold: float | None, dtype: torch.dtype
) -> None:
    """The token embeddings, and a head that is tied to them, in int8: still one weight."""
    shared = None
    for name, module in list(model.named_modules()):
        if getattr(module, "weight", None) is not weight:
            continue
        if type(module) is nn.Embedding:
            made = Int8Embedding(module.num_embeddings, module.embedding_dim, dtype)
        elif is_linear(module):
            made = build_int8_linear(module, threshold)
        else:
            raise UserError(f"model.int8_include: embeddings of type {type(module).__name__} have no int8 form")
        shared = shared or made
        made.weight, made.scales = shared.weight, shared.scales
        replace_module(model, name, made)


def replace_module(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, made)
