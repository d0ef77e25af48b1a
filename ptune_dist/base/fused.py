"""Give the layers of a frozen base fused functions in place of those that torch runs one operation at a time.

A module is changed only where its own numbers, on a small input, are those of a function here, or where its forward is
the very one that is known. All others stay as they are. The changes belong to the modules of one model: nothing of
transformers is replaced.

nn.LayerNorm, and activations that torch computes in one kernel, are left alone: they save nothing but their input
already. Shapes: B rows, N positions, H heads, D width.
"""

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from ptune_dist.base.fused_functions import (
    ACTIVATIONS,
    ALONE,
    MERGED,
    Activation,
    GatedActivation,
    RMSNorm,
    Rotary,
    norm_forward,
    rotate_both,
)
from ptune_dist.base.fused_kernels import Fallback, is_worth_it
from ptune_dist.base.merge import GROUPS, MergedPart

ROTARY = "apply_rotary_pos_emb"  # what the attention of most architectures calls
IN_ONE_KERNEL = (nn.SiLU, nn.GELU, nn.ReLU)  # of torch's activations, and those that wrap them
# The modules of a gated MLP: activation, gate, up, down.
MLPS = {LlamaMLP: ("act_fn", "gate_proj", "up_proj", "down_proj"), T5DenseGatedActDense: ("act", "wi_0", "wi_1", "wo")}


def fuse(model: PreTrainedModel, trained: set[str], report: Callable[[str], None]) -> None:
    """Change the modules of a base, which may be on the meta device. `report` gets the line of a fallback.

    `trained`: names of parameters that are trained; their modules stay as they are.
    """
    Fallback.report = staticmethod(report)
    skip = {name.rpartition(".")[0] for name in trained}
    for name, module in model.named_modules():
        if name not in skip:
            fuse_module(module)


def fuse_module(module: nn.Module) -> None:
    if "forward" in vars(module):  # somebody else's
        return
    norm = norm_of(module)
    if norm is not None:
        module.forward = functools.partial(run_norm, module, type(module).forward, *norm)
        return
    names = gated_names(type(module))
    activation = activation_of(getattr(module, names[0])) if names else None
    if names and activation:
        module.forward = functools.partial(run_gated, module, type(module).forward, activation, names)
        return
    activation = None if isinstance(module, IN_ONE_KERNEL) else activation_of(module)
    if activation and num_operations(module) > 1:
        cast(Any, module).forward = functools.partial(run_activation, module, type(module).forward, activation)
        return
    rotating = rotating_forward(type(module))
    if rotating is not None:
        module.forward = MethodType(rotating, module)


# Norms


def norm_of(module: nn.Module) -> tuple[float, float] | None:
    """eps and what is added to the weight, of a module that computes an RMSNorm."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters()]
    if names != ["weight"] or not isinstance(eps, float) or "Norm" not in type(module).__name__:
        return None
    weight = module.get_parameter("weight")
    if weight.dim() != 1:
        return None
    probe: Any = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(len(weight), generator=generator) + 0.5
    probe._parameters = {"weight": nn.Parameter(numbers, requires_grad=False)}
    # Rows of several sizes, down to those where eps counts.
    x = torch.randn(4, len(weight), generator=generator) * torch.tensor([[1.0], [30.0], [1e-2], [eps**0.5]])
    for offset in (0.0, 1.0):
        wanted = norm_forward(x, numbers, eps, offset)[0]
        if agree(lambda: type(module).forward(probe, x), [wanted]):
            return eps, offset
    return None


def agree(found: Callable[[], Any], wanted: list[torch.Tensor]) -> bool:
    """Whether a function gives these tensors; one that cannot be called so does not."""
    try:
        with torch.no_grad():
            results = found()
    except Exception:  # a module of another kind
        return False
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    return len(results) == len(wanted) and all(
        isinstance(result, torch.Tensor) and result.shape == right.shape and torch.allclose(result, right, 1e-5, 1e-6)
        for result, right in zip(results, wanted, strict=True)
    )


def run_norm(
    module: nn.Module, plain: Callable, eps: float, offset: float, x: torch.Tensor, *more: Any, **options: Any
) -> torch.Tensor:
    """`more` and `options`: what some norms are given too, such as a gate (Mamba 2); they compute it as ever."""
    if more or options:
        return plain(module, x, *more, **options)
    if x.dtype != module.weight.dtype or not is_worth_it(x):
        return plain(module, x)
    if has_heads_first(x):
        return run_norm(module, plain, eps, offset, x.transpose(1, 2)).transpose(1, 2)
    # Of q or k by heads, which may be a part of a larger product, the positions alone are one dimension.
    rows = x.flatten(0, 1) if x.dim() == 4 else x.flatten(0, -2)
    return RMSNorm.apply(rows, module, eps, offset).view(x.shape)


def has_heads_first(x: torch.Tensor) -> bool:
    """Whether q or k is [B, H, N, D], transposed from [B, N, H, D]: kernels are compiled for any N, but for one H."""
    if x.dim() != 4:
        return False
    return x.stride(1) < x.stride(2) or (x.shape[1] == 1 and x.stride(1) == x.stride(2))


# Activations


def activation_of(module: nn.Module) -> str | None:
    """The activation that a module without parameters computes."""
    if not isinstance(module, nn.Module) or list(module.parameters()) or list(module.children()):
        return None
    if not type(module).__module__.endswith(".activations") and not isinstance(module, IN_ONE_KERNEL):
        return None
    x = torch.linspace(-8, 8, 161)
    names = [name for name, function in ACTIVATIONS.items() if agree(lambda: module(x), [function(x)])]
    return names[0] if names else None


def num_operations(module: nn.Module) -> int:
    """Of torch, in one call."""
    x = torch.zeros(2)
    with CountOperations() as counted:
        module(x)
    return counted.number


class CountOperations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def run_activation(module: nn.Module, plain: Callable, activation: str, x: torch.Tensor) -> torch.Tensor:
    if not is_worth_it(x):
        return plain(module, x)
    return Activation.apply(x.flatten(0, -2), ALONE, activation).view(x.shape)


# Gated MLPs


@functools.cache
def gated_names(kind: type[nn.Module]) -> tuple[str, ...] | None:
    """The modules of an MLP whose forward is a known one."""
    return next((names for known, names in MLPS.items() if body_of(kind) == body_of(known)), None)


def body_of(kind: type[nn.Module]) -> str | None:
    """A class's forward without its annotations, as text to compare."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, SyntaxError, TypeError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    names = [argument.arg for argument in function.args.args]
    body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return f"{names}: {[ast.dump(statement) for statement in body]}"


def run_gated(module: nn.Module, plain: Callable, activation: str, names: tuple[str, ...], x: torch.Tensor) -> Any:
    _, gate_name, up_name, down_name = names
    down = getattr(module, down_name)
    if not is_worth_it(x):
        return plain(module, x)
    if isinstance(getattr(module, gate_name), MergedPart):
        both = getattr(module, GROUPS[gate_name, up_name])(x)
        gated = Activation.apply(both.flatten(0, -2), MERGED, activation)
        return down(gated.unflatten(0, both.shape[:-1]))
    gate = getattr(module, gate_name)(x)
    up = getattr(module, up_name)(x)
    gated = GatedActivation.apply(gate.flatten(0, -2), up.flatten(0, -2), activation).view(gate.shape)
    return down(gated)


# Rotary embeddings


@functools.cache
def rotating_forward(kind: type[nn.Module]) -> FunctionType | None:
    """A class's forward in which the rotary embedding is the fused one; None if it has none, or another."""
    forward = kind.forward
    plain = getattr(forward, "__globals__", {}).get(ROTARY)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names or plain is None:
        return None
    if not is_known_rotary(plain):
        return None
    names = forward.__globals__ | {ROTARY: functools.partial(run_rotary, plain)}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@functools.cache
def is_known_rotary(plain: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 8, generator=generator)
    k = torch.randn(2, 1, 5, 8, generator=generator)
    cos = torch.randn(2, 5, 8, generator=generator)
    sin = torch.randn(2, 5, 8, generator=generator)
    return agree(lambda: plain(q, k, cos, sin), list(rotate_rows(rotate_both, q, k, cos, sin, 1.0)))


def rotate_rows(
    function: Callable, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call a function of tensors [N, H, D] and [N, R] with q and k [B, H, N, D], cos and sin [B or 1, N, R]."""
    batch, _, length, _ = q.shape
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k)]
    angles = [tensor.expand(batch, -1, -1).flatten(0, 1) for tensor in (cos, sin)]
    turned = function(*rows, *angles, *options)
    return tuple(tensor.unflatten(0, (batch, length)).transpose(1, 2) for tensor in turned)


def run_rotary(plain: Callable, *tensors: torch.Tensor, **options: Any) -> Any:
    """As `plain`, which some architectures also call for queries alone or with other axes."""
    if options or len(tensors) != 4:
        return plain(*tensors, **options)
    q, k, cos, sin = tensors
    same = q.dtype == k.dtype == cos.dtype == sin.dtype
    if not same or not is_worth_it(q) or q.dim() != 4 or cos.dim() != 3 or cos.requires_grad:
        return plain(q, k, cos, sin)
    return rotate_rows(Rotary.apply, q, k, cos, sin)
