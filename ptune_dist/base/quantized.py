"""Frozen weights in 8 bits, whatever their format: one byte for each weight and one float32 scale for each output.

Weight and scales are ordinary frozen parameters, so ZeRO partitions, gathers, prefetches and offloads them like any
others; bitsandbytes' module, in contrast, keeps a full copy of its weight on every rank under ZeRO-3. The bytes are
int8 in every format, because not every collective moves 8-bit floats.

Shapes: O outputs and I inputs of a layer.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptune_dist.errors import UserError

CHUNK_ELEMENTS = 4 << 20  # quantized at a time while loading; fits a processor's cache
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest entry of a row becomes
SMALLEST = 1e-30  # activations without a larger entry become zeros: their factor would overflow
MAX_SHARE_LEFT_OUT = 0.25  # of a base's weights; if more cannot be quantized, quantization would silently save little

Quantize = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # float rows [O, I] -> bytes, float32 scales [O]


class QuantizedWeight(nn.Module):
    """The common part of a quantized linear layer and a quantized embedding: weight [O, I] and scales [O]."""

    quantize: Quantize  # of the format

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width, dtype=torch.int8, device="meta"), requires_grad=False)
        # float32 bits in an int32 tensor, which engines do not cast to half precision
        self.scales = nn.Parameter(torch.empty(num_rows, dtype=torch.int32, device="meta"), requires_grad=False)
        self.stored_transposed = False

    @property
    def float_scales(self) -> torch.Tensor:
        return self.scales.view(torch.float32)

    @property
    def codes(self) -> torch.Tensor:
        """The weight as numbers of its format, which the scales multiply."""
        return self.weight

    def float_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight [O, I]."""
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        return torch.mul(self.codes, self.float_scales[:, None], out=out)


class QuantizedLinear(QuantizedWeight):
    """A frozen nn.Linear in 8 bits."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None):
        super().__init__(out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias


class QuantizedExperts(QuantizedWeight):
    """The weights [E, R, C] of all experts of a layer in 8 bits, with a scale for each of their E * R stored rows.

    `multiply` and `multiply_back` of a format are the products of backward and forward, so an expert that is stored
    transposed, inputs by outputs, needs no other kernels: it has a scale for each input.
    """

    multiply: Callable[..., torch.Tensor]  # (x [M, C], ExpertWeight) -> [M, R], of the format
    multiply_back: Callable[..., torch.Tensor]  # (x [M, R], ExpertWeight) -> [M, C]

    def __init__(self, num_experts: int, num_rows: int, width: int, is_transposed: bool):
        super().__init__(num_experts * num_rows, width)
        self.num_experts = num_experts
        self.is_transposed = is_transposed

    def expert(self, number: int) -> "ExpertWeight":
        num_rows = len(self.scales) // self.num_experts
        rows = slice(number * num_rows, (number + 1) * num_rows)
        return ExpertWeight(self.weight[rows], self.float_scales[rows], self.codes_of)

    @staticmethod
    def codes_of(weight: torch.Tensor) -> torch.Tensor:
        """A weight as numbers of its format."""
        return weight


@dataclass(frozen=True)
class ExpertWeight:
    """One expert's weight [R, C], with what products read of a linear layer."""

    weight: torch.Tensor
    float_scales: torch.Tensor
    codes_of: Callable[[torch.Tensor], torch.Tensor]
    bias: None = None

    @property
    def codes(self) -> torch.Tensor:
        return self.codes_of(self.weight)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def float_weight(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        return torch.mul(self.codes, self.float_scales[:, None], out=out)


class QuantizedRows:
    """A weight's bytes and scales, quantized while the float rows are read, at most one chunk in memory at a time.

    A scale belongs to a whole row, so if a rank's part begins or ends inside a row, the whole row is read.
    """

    def __init__(self, read_rows: Callable[[int, int], torch.Tensor], quantize: Quantize, num_rows: int, width: int):
        self._read_rows = read_rows
        self._quantize_rows = quantize
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
        """Read and quantize rows [first, last), on the device or where they are on a GPU, and keep their scales."""
        rows = self._read_rows(first, last)
        quantized, scales = self._quantize_rows(rows if rows.is_cuda else rows.to(device))
        self._scales[first:last] = scales.cpu()
        self._is_known[first:last] = True
        return quantized


@dataclass(frozen=True)
class Format:
    """The modules that take the place of a base's own."""

    name: str  # a value of model.quantization
    linear: Callable[[int, int, nn.Parameter | None], QuantizedLinear]  # inputs, outputs, bias
    head: Callable[[int, int, nn.Parameter | None], QuantizedLinear]
    embedding: Callable[[int, int, torch.dtype], QuantizedWeight]  # rows, width, dtype of the vectors
    quantize_experts: Callable[[nn.Module], None]  # in place


def quantize_layers(
    model: PreTrainedModel, format_: Format, *, include: list[str], dtype: torch.dtype, skip: set[str]
) -> None:
    """Replace the linear layers of a model on the meta device by quantized ones, in place. Raises UserError.

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
    if "head" in include and any(module is head for name, module in model.named_modules() if name in skip):
        raise UserError(f"model.int8_include: {model.config.model_type} models compute with the head's own weight")
    chosen: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and name not in skip
    }
    format_.quantize_experts(model)
    refuse_other_layers(model, chosen, format_.name)
    for name, module in chosen.items():
        replace_module(model, name, build_linear(module, format_.linear))
    if "head" in include and not is_tied:
        for name, module in list(model.named_modules()):
            if module is head:
                replace_module(model, name, build_linear(module, format_.head))
    if "embeddings" in include:
        replace_embeddings(model, tokens.get_parameter("weight"), format_, dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose forward is called: torch's attention reads its projection's weight.

    A class that derives from one and computes something else, such as DeepSeek-V4's products by groups, is none.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and computes_linear(type(module))


@functools.cache
def computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class with a forward of its own and no settings of its own gives what `nn.Linear` gives (Falcon's)."""
    if kind.__init__ is not nn.Linear.__init__:
        return False
    with torch.random.fork_rng(devices=[]):
        layer = kind(3, 2)
        inputs = torch.randn(4, 3)
    try:
        with torch.no_grad():
            return torch.allclose(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))
    except Exception:  # it wants other inputs
        return False


def refuse_other_layers(model: PreTrainedModel, chosen: dict[str, nn.Module], name: str) -> None:
    """Raise UserError if much of the weight is in layers that have no 8-bit form (fused experts, for example)."""
    others: dict[str, int] = {}
    for module in model.modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if size and not is_linear(module) and not isinstance(module, (nn.Embedding, QuantizedExperts)):
            others[type(module).__name__] = others.get(type(module).__name__, 0) + size
    left_out = sum(others.values())
    quantized = [*chosen.values(), *(module for module in model.modules() if isinstance(module, QuantizedExperts))]
    replaced = sum(module.get_parameter("weight").numel() for module in quantized)
    if left_out > MAX_SHARE_LEFT_OUT * (left_out + replaced):
        raise UserError(
            f"model.quantization: {name} is for linear layers; {left_out:,} weights of this base are in "
            f"{', '.join(sorted(others)[:5])}, which has no {name} form: set model.quantization=none"
        )


def build_linear(
    module: nn.Module, build: Callable[[int, int, nn.Parameter | None], QuantizedLinear]
) -> QuantizedLinear:
    """The quantized form of a linear layer, with a weight on the meta device and the layer's own bias."""
    is_transposed = isinstance(module, Conv1D)  # its weight is [I, O]
    weight = module.get_parameter("weight")
    num_outputs, num_inputs = weight.T.shape if is_transposed else weight.shape
    made = build(num_inputs, num_outputs, cast(nn.Parameter | None, module.bias))
    made.stored_transposed = is_transposed
    return made


def replace_embeddings(model: PreTrainedModel, weight: nn.Parameter, format_: Format, dtype: torch.dtype) -> None:
    """Replace the token embeddings, and a head that is tied to them, by modules that share one quantized weight."""
    shared: QuantizedWeight | None = None
    for name, module in list(model.named_modules()):
        if getattr(module, "weight", None) is not weight:
            continue
        if type(module) is nn.Embedding:
            made = format_.embedding(module.num_embeddings, module.embedding_dim, dtype)
        elif is_linear(module):
            made = build_linear(module, format_.head)
        else:
            raise UserError(f"model.int8_include: embeddings of type {type(module).__name__} have no int8 form")
        shared = shared or made
        made.weight = shared.weight
        made.scales = shared.scales
        replace_module(model, name, made)


def replace_module(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, made)
