"""Linear layers whose frozen weight is stored in 8 bits: one int8 row and one float32 scale per output.

Row-wise absmax quantization as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), without bitsandbytes' module,
which keeps a full copy of its weight on every rank under ZeRO-3. Weight and scales are ordinary frozen parameters, so
ZeRO partitions, gathers, prefetches and offloads them like any others.

Shapes: O outputs and I inputs of a layer.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptune_dist.errors import UserError

LEVELS = 127.0
CHUNK_ELEMENTS = 4 << 20  # quantized at a time while loading; fits a processor's cache
MAX_SHARE_LEFT_OUT = 0.25  # of a base's weights; if more cannot be int8, int8 would silently save little


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
            return multiply_int8(x, layer, layer.threshold)
        if x.dtype == torch.float16:  # 127 times an activation may exceed its range
            return nn.functional.linear(x, layer.float_weight(x.dtype), layer.bias)
        # int8 values are exact in bfloat16 too. The scale is applied to the outputs, which are fewer than the weights.
        y = nn.functional.linear(x, layer.weight.to(x.dtype))
        y = y * layer.float_scales if layer.bias is None else torch.addcmul(layer.bias, y, layer.float_scales)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer = ctx.layer
        if grad.dtype == torch.float16:
            return grad @ layer.float_weight(grad.dtype), None
        return (grad * layer.float_scales).to(grad.dtype) @ layer.weight.to(grad.dtype), None


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


class Int8Weight(nn.Module):
    """The common part of an int8 linear layer and an int8 embedding: weight [O, I] and scales [O]."""

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width, dtype=torch.int8, device="meta"), requires_grad=False)
        # float32 bits in an int32 tensor, which engines do not cast to half precision
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
    """A frozen nn.Linear in int8. `threshold` is LLM.int8()'s for outliers; None multiplies float activations."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, threshold: float | None):
        super().__init__(out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.threshold = threshold
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Int8Product.apply(x, self)


class Int8Embedding(Int8Weight):
    """A frozen nn.Embedding in int8."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype):
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.weight[ids] * self.float_scales[ids][..., None]).to(self.dtype)


class Int8Rows:
    """An int8 weight and its scales, quantized while the float rows are read, at most one chunk in memory at a time.

    A scale belongs to a whole row, so if a rank's part begins or ends inside a row, the whole row is read.
    """

    def __init__(self, read_rows: Callable[[int, int], torch.Tensor], num_rows: int, width: int):
        self._read_rows = read_rows
        self._width = width
        self._scales = torch.empty(num_rows)
        self._is_known = torch.zeros(num_rows, dtype=torch.bool)

    def fill_weight(self, start: int, out: torch.Tensor) -> None:
        """Elements [start, start + len(out)) of the flattened weight."""
        width = self._width
        stop = start + len(out)
        last_row = math.ceil(stop / width)
        num_rows = max(1, CHUNK_ELEMENTS // width)
        for first in range(start // width, last_row, num_rows):
            last = min(first + num_rows, last_row)
            quantized = self._quantize(first, last, out.device).view(-1)
            begin = max(start, first * width)
            end = min(stop, last * width)
            out[begin - start : end - start].copy_(quantized[begin - first * width : end - first * width])

    def fill_scales(self, start: int, out: torch.Tensor) -> None:
        """Scales [start, start + len(out)); reads the rows that `fill_weight` has not read."""
        unknown = (~self._is_known[start : start + len(out)]).nonzero()
        if len(unknown):
            self._quantize(start + int(unknown[0]), start + int(unknown[-1]) + 1, torch.device("cpu"))
        out.copy_(self._scales[start : start + len(out)].view(torch.int32))

    def _quantize(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """Read and quantize rows [first, last), and keep their scales."""
        quantized, scales = quantize_rows(self._read_rows(first, last).to(device))
        self._scales[first:last] = scales.cpu()
        self._is_known[first:last] = True
        return quantized


def make_int8(
    model: PreTrainedModel, *, include: list[str], threshold: float | None, dtype: torch.dtype, skip: set[str]
) -> None:
    """Replace the linear layers of a model on the meta device by int8 layers, in place. Raises UserError.

    The head and the token embeddings are kept unless `include` lists "head" or "embeddings". Modules named in `skip`
    are kept because they are trained.
    """
    head = model.get_output_embeddings()
    tokens = model.get_input_embeddings()
    is_tied = head is not None and head.weight is tokens.weight
    if is_tied and len(set(include)) == 1:
        raise UserError(
            f"model.int8_include: {include[0]} alone is not possible, because this base ties its head to its "
            "embeddings: list both or neither"
        )
    if "head" in include and head is None:
        raise UserError("model.int8_include: this base has no language-model head")
    chosen: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and name not in skip
    }
    refuse_other_layers(model, chosen)
    if "head" in include and not is_tied:
        chosen |= {name: module for name, module in model.named_modules() if module is head}
    for name, module in chosen.items():
        replace_module(model, name, build_int8_linear(module, threshold))
    if "embeddings" in include:
        replace_embeddings(model, tokens.get_parameter("weight"), threshold, dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose forward is called: torch's attention reads its projection's weight."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, (nn.Linear, Conv1D))


def refuse_other_layers(model: PreTrainedModel, chosen: dict[str, nn.Module]) -> None:
    """Raise UserError if much of the weight is in layers that have no int8 form (fused experts, for example)."""
    others: dict[str, int] = {}
    for module in model.modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if size and not is_linear(module) and not isinstance(module, nn.Embedding):
            others[type(module).__name__] = others.get(type(module).__name__, 0) + size
    left_out = sum(others.values())
    replaced = sum(module.get_parameter("weight").numel() for module in chosen.values())
    if left_out > MAX_SHARE_LEFT_OUT * (left_out + replaced):
        raise UserError(
            f"model.quantization: int8 is for linear layers; {left_out:,} weights of this base are in "
            f"{', '.join(sorted(others)[:5])}, which has no int8 form: set model.quantization=none"
        )


def build_int8_linear(module: nn.Module, threshold: float | None) -> Int8Linear:
    """The int8 form of a linear layer, with a weight on the meta device and the layer's own bias."""
    is_transposed = isinstance(module, Conv1D)  # its weight is [I, O]
    weight = module.get_parameter("weight")
    num_outputs, num_inputs = weight.T.shape if is_transposed else weight.shape
    made = Int8Linear(num_inputs, num_outputs, cast(nn.Parameter | None, module.bias), threshold)
    made.stored_transposed = is_transposed
    return made


def replace_embeddings(
    model: PreTrainedModel, weight: nn.Parameter, threshold: float | None, dtype: torch.dtype
) -> None:
    """Replace the token embeddings, and a head that is tied to them, by int8 modules that share one weight."""
    shared: Int8Weight | None = None
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
        made.weight = shared.weight
        made.scales = shared.scales
        replace_module(model, name, made)


def replace_module(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, made)
