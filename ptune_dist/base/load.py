"""Fill an opened base from its weights: every tensor whole here, a rank's own part of it in `zero.shard`.

Memory for all tensors is allocated before anything is read, so that temporary buffers do not fragment it.
"""

import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.open import OpenedBase
from ptune_dist.base.quantized import QuantizedExperts, QuantizedRows, QuantizedWeight
from ptune_dist.base.random_weights import RandomWeights
from ptune_dist.common.progress_line import ProgressLine

CPU = torch.device("cpu")

Fill = Callable[[int, torch.Tensor], None]  # (first element, 1-D tensor to fill)


def fill_whole(opened: OpenedBase, device: torch.device = CPU) -> PreTrainedModel:
    """Every tensor whole on the device: ZeRO 0, 1, 2. Raises UserError."""
    unfilled: list[tuple[torch.Tensor, Fill]] = []

    def place(parameter: nn.Parameter, fill: Fill) -> nn.Parameter:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        unfilled.append((whole, fill))
        return nn.Parameter(whole, requires_grad=False)

    model = place_parameters(opened, place, device)
    line = loading_line(whole for whole, _ in unfilled)
    for whole, fill in unfilled:
        fill(0, whole.view(-1))
        line.count(whole.nbytes)
    return model


def loading_line(parts: Iterable[torch.Tensor]) -> ProgressLine:
    """Progress of rank 0 in filling its parts of the base; counts bytes."""
    is_shown = os.environ.get("RANK", "0") == "0"
    return ProgressLine("loading weights", sum(part.nbytes for part in parts), is_shown, unit="GiB")


def place_parameters(
    opened: OpenedBase, place: Callable[[nn.Parameter, Fill], nn.Parameter], device: torch.device
) -> PreTrainedModel:
    """Replace every parameter, which is on the meta device, by the one that `place` makes; sharing is preserved.

    Trained parameters (an encoder's head) and the buffers are filled here.
    """
    model = opened.model
    placed: dict[int, nn.Parameter] = {}
    fills = list(parameter_fills(opened))
    line = ProgressLine("loading tensors", len(fills), is_shown=os.environ.get("RANK", "0") == "0")
    for name, parameter, fill in fills:
        line.count()
        if name in opened.trained:
            whole = torch.empty(parameter.shape)  # float32, and whole: DeepSpeed partitions what is trained
            fill(0, whole.view(-1))
            placed[id(parameter)] = nn.Parameter(whole)
        else:
            placed[id(parameter)] = place(parameter, fill)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = placed[id(parameter)]
    place_buffers(opened, device)
    return model


def place_buffers(opened: OpenedBase, device: torch.device) -> None:
    """Put whole buffers on the device; those in the files are read, the others are already computed."""
    for module_name, module in opened.model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{module_name}.{leaf}" if module_name else leaf
            if buffer is not None and name in opened.names:
                buffer = torch.empty(buffer.shape, dtype=buffer.dtype)
                opened.weights.read_flat(opened.names[name], 0, buffer.view(-1))
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def parameter_fills(opened: OpenedBase) -> Iterator[tuple[str, nn.Parameter, Fill]]:
    """Name, parameter and its fill, once for each parameter; a quantized weight comes before its scales."""
    seen: set[int] = set()
    for module_name, module in opened.model.named_modules():
        rows = None
        if isinstance(module, QuantizedWeight):
            rows = quantized_rows(opened, f"{module_name}.weight", module)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if rows is not None and leaf in ("weight", "scales"):
                yield name, parameter, rows.fill_weight if leaf == "weight" else rows.fill_scales
            else:
                yield name, parameter, plain_fill(opened, name)


def plain_fill(opened: OpenedBase, name: str) -> Fill:
    if name in opened.new:
        return new_head_fill(opened, name)
    return lambda start, out: opened.weights.read_flat(opened.names[name], start, out)


def new_head_fill(opened: OpenedBase, name: str) -> Fill:
    """A new head is initialized as in transformers, with normal weights and zero biases; it is filled whole."""
    std = getattr(opened.model.config, "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(opened.seed + zlib.crc32(name.encode()))

    def fill(_start: int, out: torch.Tensor) -> None:
        if opened.model.get_parameter(name).dim() < 2:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            out.copy_(torch.randn(len(out), generator=generator) * std)

    return fill


def quantized_rows(opened: OpenedBase, name: str, module: QuantizedWeight) -> QuantizedRows:
    weights = opened.weights
    if isinstance(module, QuantizedExperts):
        return QuantizedRows(rows_of_experts(opened, name, module), module.quantize, *module.weight.shape)
    read: Callable[..., torch.Tensor] = weights.read_columns if module.stored_transposed else weights.read_rows
    if isinstance(weights, RandomWeights) and torch.cuda.is_available():
        # A CPU would take minutes to make and to quantize the rows of a 70B base.
        read = functools.partial(read, device=torch.device("cuda"))
    stored = opened.names[name]
    return QuantizedRows(lambda first, last: read(stored, first, last), module.quantize, *module.weight.shape)


def rows_of_experts(opened: OpenedBase, name: str, module: QuantizedExperts) -> Callable[[int, int], torch.Tensor]:
    """Reads rows of all experts, one below the other, in float32; random ones on a GPU if there is one."""
    stored = opened.names[name.removesuffix(".weight")]
    width = module.weight.shape[1]
    on_gpu = isinstance(opened.weights, RandomWeights) and torch.cuda.is_available()

    def read(first: int, last: int) -> torch.Tensor:
        out = torch.empty((last - first) * width, device="cuda" if on_gpu else "cpu")
        opened.weights.read_flat(stored, first * width, out)
        return out.view(last - first, width)

    return read
