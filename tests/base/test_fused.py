"""Fused functions give the numbers of transformers' own modules, forward and backward, and save little."""

import contextlib
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ptune_dist.base import fused_functions, fused_kernels
from ptune_dist.base.fused import fuse
from ptune_dist.base.fused_functions import norm_forward
from ptune_dist.base.fused_kernels import Fallback, Kernel
from ptune_dist.base.merge import merge_projections
from ptune_dist.base.recompute import DEFAULTS, Recomputer

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
# The shape of a base, and which of its modules are changed.
BASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": (GROUPED, {"LlamaRMSNorm": 5, "LlamaAttention": 2, "LlamaMLP": 2}),
    "mistral": (GROUPED, {"MistralRMSNorm": 5, "MistralAttention": 2, "MistralMLP": 2}),
    "qwen2": (GROUPED, {"Qwen2RMSNorm": 5, "Qwen2Attention": 2, "Qwen2MLP": 2}),
    "qwen3": (GROUPED | {"head_dim": 16}, {"Qwen3RMSNorm": 9, "Qwen3Attention": 2, "Qwen3MLP": 2}),
    "gemma2": (GROUPED | {"head_dim": 8}, {"Gemma2RMSNorm": 9, "Gemma2Attention": 2, "Gemma2MLP": 2}),
    "gemma3_text": (GROUPED | {"head_dim": 8}, {"Gemma3RMSNorm": 13, "Gemma3Attention": 2, "Gemma3MLP": 2}),
    "gpt_neox": (WIDE, {"GPTNeoXAttention": 2}),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, {"NewGELUActivation": 2}),
    "opt": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
        {},
    ),
    "bert": (WIDE, {}),
    "t5": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
        {"T5LayerNorm": 7, "T5DenseGatedActDense": 2},
    ),
    "cohere": (WIDE, {"CohereMLP": 2}),  # its rotary embedding takes pairs of neighbors
}
CLASSES = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}


def make_base(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **BASES[kind][0])
    config.decoder_start_token_id = 0
    model = CLASSES.get(kind, AutoModelForCausalLM).from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.3, 0.4)
    return model


@contextlib.contextmanager
def everything_fused(stance: str = "default"):
    """Small work on a CPU too; by functions as they are written with stance `force_eager`."""
    least = fused_kernels.MIN_CPU_ELEMENTS
    fused_kernels.MIN_CPU_ELEMENTS = 0
    try:
        with torch.compiler.set_stance(stance):
            yield
    finally:
        fused_kernels.MIN_CPU_ELEMENTS = least
        Fallback.reason = None


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the gradient of the input vectors."""
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    more = {"decoder_inputs_embeds": x} if model.config.is_encoder_decoder else {}
    logits = model(inputs_embeds=x, **more).logits
    logits.square().mean().backward()
    assert x.grad is not None
    return logits.detach(), x.grad


def assert_same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def changed_modules(model: nn.Module) -> dict[str, int]:
    return dict(Counter(type(module).__name__ for module in model.modules() if "forward" in vars(module)))


@pytest.mark.parametrize("kind", BASES)
def test_a_fused_base_computes_what_transformers_does(kind):
    model = make_base(kind)
    wanted = run(model)
    fuse(model, set(), pytest.fail)
    changed = changed_modules(model)
    if kind == "t5":
        changed.pop("NewGELUActivation")  # also inside of the gated one
    assert changed == BASES[kind][1]
    assert all(torch.equal(one, other) for one, other in zip(run(model), wanted, strict=True))  # too small for a CPU
    with everything_fused("force_eager"):
        assert_same(run(model), wanted)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "t5"])
def test_a_compiled_base_computes_what_transformers_does(kind):
    model = make_base(kind)
    wanted = run(model)
    fuse(model, set(), pytest.fail)
    with everything_fused():
        assert_same(run(model), wanted)
        assert Fallback.reason is None


def test_merged_projections_stay_merged_in_a_fused_base():
    model = make_base("llama")
    wanted = run(model)
    stored = dict(model.named_parameters())
    parts = merge_projections(model, {name: name for name in stored}, set())
    for name, names in parts.items():
        module = model.get_submodule(name.rpartition(".")[0])
        module.weight = nn.Parameter(torch.cat([stored[part] for part in names]), requires_grad=False)
    fuse(model, set(), pytest.fail)
    with everything_fused("force_eager"):
        assert_same(run(model), wanted)


def test_other_models_of_the_process_stay_as_they_are():
    rotary = modeling_llama.apply_rotary_pos_emb
    model = make_base("llama")
    other = make_base("llama")
    wanted = run(other)
    fuse(model, set(), pytest.fail)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert not changed_modules(other)
    assert all(torch.equal(one, two) for one, two in zip(run(other), wanted, strict=True))


def test_a_trained_module_stays_as_it_is():
    model = make_base("llama")
    fuse(model, {"model.norm.weight"}, pytest.fail)
    assert changed_modules(model)["LlamaRMSNorm"] == 4
    assert "forward" not in vars(model.model.norm)


def test_a_norm_that_computes_something_else_stays_as_it_is():
    class OtherNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.001

    model: Any = nn.Sequential(OtherNorm(32), LlamaRMSNorm(32)).requires_grad_(False)
    fuse(model, set(), pytest.fail)
    assert ["forward" in vars(module) for module in model] == [False, True]


def saved_sizes(model: Any) -> dict[torch.dtype, int]:
    """Elements of the largest tensor of each dtype that the layers of a base in bfloat16 save for backward."""
    sizes: dict[torch.dtype, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.dtype] = max(tensor.numel(), sizes.get(tensor.dtype, 0))
        return tensor

    x = torch.randn(2, 7, 32, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(inputs_embeds=x, use_cache=False)
    return sizes


def test_a_fused_base_saves_no_float32_copies():
    model = make_base("llama").to(torch.bfloat16)
    one_copy = 2 * 7 * 32
    assert saved_sizes(model)[torch.float32] >= one_copy
    fuse(model, set(), pytest.fail)
    with everything_fused("force_eager"):
        assert saved_sizes(model)[torch.float32] < one_copy


def test_recomputed_layers_have_the_same_gradient():
    model = make_base("llama")
    wanted = run(model)
    fuse(model, set(), pytest.fail)
    Recomputer(DEFAULTS, list(model.model.layers))
    with everything_fused("force_eager"):
        assert_same(run(model), wanted)


def test_a_weight_that_is_gathered_anew_is_read_anew():
    """ZeRO-3 replaces the data of a parameter between forward and backward."""
    norm = LlamaRMSNorm(32).requires_grad_(False)
    fuse(norm, set(), pytest.fail)  # pyright: ignore[reportArgumentType]
    x = torch.randn(5, 32, requires_grad=True)
    with everything_fused("force_eager"):
        out = norm(x)
        whole = norm.weight.data
        norm.weight.data = torch.empty(0)
        norm.weight.data = whole.clone()
        whole.fill_(torch.nan)
        out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.extended
@pytest.mark.long
def test_a_kernel_is_compiled_once_for_all_lengths():
    kernel = Kernel(norm_forward)
    weight = torch.rand(40)
    before = counters["stats"]["unique_graphs"]
    with everything_fused():
        for length in (7, 1, 64, 2, 33):
            x = torch.randn(length, 40)
            assert_same(kernel([x], [weight], 1e-6, 0.0), norm_forward(x, weight, 1e-6, 0.0))
        assert Fallback.reason is None
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_base_is_compiled_once_for_all_lengths(monkeypatch, kind, num_groups):
    """Qwen 3 norms q and k by heads before it transposes them, Gemma 3 after that."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for kernel in vars(fused_functions).values():
        if isinstance(kernel, Kernel):
            monkeypatch.setattr(kernel, "_compiled", None)
    monkeypatch.setitem(BASES[kind][0], "num_key_value_heads", num_groups)
    model = make_base(kind)
    fuse(model, set(), pytest.fail)
    numbers = []
    with everything_fused():
        for length in range(5, 17):
            x = torch.randn(1, length, 32, requires_grad=True)
            model(inputs_embeds=x).logits.sum().backward()
            numbers.append(counters["stats"]["unique_graphs"])
    assert numbers[-1] == numbers[0]


def test_what_cannot_be_compiled_runs_as_written_after_one_line(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(Fallback, "report", lines.append)

    def refused(x: torch.Tensor) -> tuple[torch.Tensor]:
        torch._dynamo.graph_break()
        return (x + 1,)

    with everything_fused():
        for length in (3, 4):
            (found,) = Kernel(refused)([torch.ones(length)], [])
            assert found.tolist() == [2.0] * length
    assert len(lines) == 1 and "\n" not in lines[0]
    assert lines[0].startswith("model.compile: norms, activations and rotations run one operation at a time: refused ")


def test_a_compiled_function_that_is_wrong_is_not_used(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(Fallback, "report", lines.append)

    def differs(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + 1.001,) if torch.compiler.is_compiling() else (x + 1,)

    with everything_fused():
        (found,) = Kernel(differs)([torch.ones(3)], [])
    assert found.tolist() == [2.0] * 3
    assert "differs" in lines[0]
