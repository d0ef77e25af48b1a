"""Fused experts of a mixture in 8 bits: transformers' own gates and activations around products with quantized weights.

transformers keeps the weights of all experts of a layer in one tensor and computes them in one function for all
architectures (`transformers.integrations.moe`). The function here is the same, with one product for each expert that
has tokens; the weight of that expert alone is dequantized, once in forward and once in backward.

Shapes: N tokens, K experts of each token, S = N K rows, E experts, D width.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from ptune_dist.base.quantized import QuantizedExperts, QuantizedWeight

GATED = ("gate_up_proj", "down_proj")
PLAIN = ("up_proj", "down_proj")


class ExpertsProduct(torch.autograd.Function):
    """Rows sorted by expert, times each expert's own weight. No activation and no float weight is saved."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: QuantizedExperts, counts: list[int]) -> torch.Tensor:
        ctx.layer = layer
        ctx.counts = counts
        return multiply_groups(rows, layer, counts, is_back=layer.is_transposed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return multiply_groups(grad, ctx.layer, ctx.counts, is_back=not ctx.layer.is_transposed), None, None


def multiply_groups(rows: torch.Tensor, layer: QuantizedExperts, counts: list[int], *, is_back: bool) -> torch.Tensor:
    """Each expert's rows times its weight [R, C]: to [S, C] if `is_back`, else to [S, R]."""
    product = layer.multiply_back if is_back else layer.multiply
    width = layer.weight.shape[1] if is_back else len(layer.scales) // layer.num_experts
    out = rows.new_empty(len(rows), width)
    parts = zip(rows.split(counts), out.split(counts), strict=True)
    for number, (part, made) in enumerate(parts):
        if len(part):
            made.copy_(product(part, layer.expert(number)))
    return out


def run_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What an experts module of transformers computes: hidden states [N, D] to [N, D]."""
    num_tokens, width = hidden_states.shape
    num_chosen = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    # An index beyond the last expert means none: transformers masks experts so. The host waits for a GPU here.
    counts = torch.bincount(experts, minlength=module.num_experts).tolist()[: module.num_experts]
    experts = experts[: sum(counts)]
    order = order[: sum(counts)]
    up, down = GATED if module.has_gate else PLAIN
    rows = multiply(module, up, hidden_states[order // num_chosen], experts, counts)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = multiply(module, down, rows, experts, counts)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order, None]
    placed = rows.new_zeros(num_tokens * num_chosen, width).index_copy(0, order, rows)
    return placed.view(num_tokens, num_chosen, width).sum(dim=1).to(hidden_states.dtype)


def multiply(module: Any, name: str, rows: torch.Tensor, experts: torch.Tensor, counts: list[int]) -> torch.Tensor:
    made = ExpertsProduct.apply(rows, getattr(module, name), counts)
    return made + module.get_parameter("_".join([name, "bias"]))[experts] if module.has_bias else made


def run_llama4(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Llama 4's: every expert has as many rows, already sorted [E * M, D]."""
    counts = [len(hidden_states) // module.num_experts] * module.num_experts
    gate, up = ExpertsProduct.apply(hidden_states, module.gate_up_proj, counts).chunk(2, dim=-1)
    return ExpertsProduct.apply(up * module.act_fn(gate), module.down_proj, counts)


def quantize_experts(model: nn.Module, build: Any) -> None:
    """Replace the weights of the experts of a model on the meta device by quantized ones, in place.

    `build` makes a `QuantizedExperts` of numbers of experts and rows, a width and whether it is stored transposed.
    Experts of other kinds than transformers' common one and Llama 4's are left.
    """
    for module in list(model.modules()):
        is_llama4 = type(module).__name__ == "Llama4TextExperts"
        if not is_llama4 and not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
            continue
        names = GATED if is_llama4 or module.has_gate else PLAIN
        if isinstance(module, QuantizedWeight) or not all(is_fused(module, name) for name in names):
            continue
        for name in names:
            shape = module.get_parameter(name).shape
            del module._parameters[name]
            module.add_module(name, build(*shape, is_llama4 or bool(module.is_transposed)))
        module.forward = partial(run_llama4, module) if is_llama4 else MethodType(run_experts, module)


def is_fused(module: nn.Module, name: str) -> bool:
    """Whether all experts have one tensor there."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.dim() == 3
