"""One layer of a Llama on a fake GPU, forward and backward, its kernel of attention left out: launches and bytes."""

from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptune_dist.base.fused import fuse
from ptune_dist.base.fused_kernels import Fallback
from ptune_dist.base.merge import merge_projections
from ptune_dist.model.attention import attend
from tests.gpu_offline.counting import fake_tensors, report

SHAPE_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "vocab_size": 128,
}
NAME = "counts_nothing"


class NoAttention(torch.autograd.Function):
    """Tensors [N, H, D] such as flex attention gives, without any work."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.likes = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(ctx.likes)


class NoSegments:
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_how: Any) -> torch.Tensor:
        return cast(torch.Tensor, NoAttention.apply(q, k, v))


def no_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_others: Any
) -> tuple[torch.Tensor, None]:
    """All that `attend` does around the attention itself."""
    return attend(module, query, key, value, mask, segments=NoSegments())


def make_model(is_merged: bool, is_fused: bool, shape: dict[str, Any]) -> PreTrainedModel:
    AttentionInterface.register(NAME, no_attention)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16, attn_implementation=NAME)
    model.eval().requires_grad_(False)
    if is_merged:
        merge_projections(model, {name: name for name, _ in model.named_parameters()}, set())
    if is_fused:
        fuse(model, set(), print)
    return model


def run_layer(
    is_merged: bool, is_fused: bool, lengths: list[int], shape: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Counts of the last length, after a pass of each; `kernels`: of all. `fallback`: why nothing was compiled."""
    model = make_model(is_merged, is_fused, shape or SHAPE_8B)
    Fallback.reason = None
    compiled: list[dict[str, Any]] = []
    with fake_tensors() as mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    made = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                    module._parameters[name] = nn.Parameter(made, requires_grad=False)
        layer = model.model.layers[0]
        for length in [*lengths, lengths[-1]]:
            x = torch.empty(1, length, model.config.hidden_size, dtype=torch.bfloat16, device="cuda").requires_grad_()
            angles = torch.empty(1, length, model.config.head_dim, dtype=torch.bfloat16, device="cuda")
            gradient = torch.empty_like(x)

            def both(x=x, angles=angles, gradient=gradient) -> None:
                out = layer(x, attention_mask=None, position_embeddings=(angles, angles))
                out = out if isinstance(out, torch.Tensor) else out[0]
                torch.autograd.grad(out, [x], gradient)

            found = report(both, mode)
            compiled += found["kernels"]
    return found | {"kernels": compiled, "fallback": Fallback.reason}
