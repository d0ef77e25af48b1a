"""Projections that read the same input as one product: q, k and v; gate and up.

The merged weight is the stored ones, one below the other. It is read from the files as they are, sharded and quantized
as one tensor. transformers' own forward remains: in place of each projection stands a part, which takes its share of
the one product. Backward is one product too, where three would add up their gradients of the input.

Shapes: N tokens, O outputs of all parts together, I inputs.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any, cast

import torch
from torch import nn

# Names that architectures give to projections, and the name of the merged one.
GROUPS = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("query", "key", "value"): "query_key_value",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("wi_0", "wi_1"): "wi",
}


class MergedPart(nn.Module):
    """Stands in place of one projection; the first of a group to be called computes the product of all."""

    def __init__(self, parent: nn.Module, merged: str, number: int, sizes: list[int], held: dict[int, torch.Tensor]):
        """`held` is shared by the parts of a group: what the others have yet to take, and the input at key -1."""
        super().__init__()
        self._parent = (parent,)  # in a tuple, so that it is no child
        self._merged = merged
        self._number = number
        self._sizes = sizes
        self._held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self._held
        if held.get(-1) is not x or self._number not in held:
            # One split: its backward joins the parts' gradients in one tensor.
            parts = getattr(self._parent[0], self._merged)(x).split(self._sizes, dim=-1)
            held.clear()
            held[-1] = x
            held.update(enumerate(parts))
        part = held.pop(self._number)
        if len(held) == 1:
            held.clear()
        return part


class MergedWeights:
    """Stored weights in which some tensors are several stored ones, one below the other."""

    def __init__(self, weights: Any, parts: dict[str, list[str]]):
        self._weights = weights
        self._parts = parts

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._weights.shapes

    @property
    def bytes_read(self) -> int:
        return self._weights.bytes_read

    def read_flat(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements [start, start + len(out)) of the flattened tensor."""
        if name not in self._parts:
            self._weights.read_flat(name, start, out)
            return
        begin = 0
        for part in self._parts[name]:
            end = begin + torch.Size(self._weights.shapes[part]).numel()
            first = max(start, begin)
            last = min(start + len(out), end)
            if first < last:
                self._weights.read_flat(part, first - begin, out[first - start : last - start])
            begin = end

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last)."""
        if name not in self._parts:
            return self._weights.read_rows(name, first, last)
        found = []
        begin = 0
        for part in self._parts[name]:
            end = begin + self._weights.shapes[part][0]
            if first < end and last > begin:
                found.append(self._weights.read_rows(part, max(first, begin) - begin, min(last, end) - begin))
            begin = end
        return torch.cat(found)

    def read_columns(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._weights.read_columns(name, first, last)


def merge_projections(model: nn.Module, names: dict[str, str], skip: set[str]) -> dict[str, list[str]]:
    """Merge what can be merged, in place, of a model without memory; returns the stored parts of each merged tensor.

    `names` maps the model's names to stored ones and is changed along. `skip` names modules that are trained.
    """
    parts: dict[str, list[str]] = {}
    for path, module in list(model.named_modules()):
        for leaves, merged in GROUPS.items():
            prefix = f"{path}." if path else ""
            if any(f"{prefix}{leaf}" in skip for leaf in leaves) or not can_merge(module, leaves, merged):
                continue
            linears = [cast(nn.Linear, getattr(module, leaf)) for leaf in leaves]
            for tensor in dict(linears[0].named_parameters()):
                key = f"{prefix}{merged}.{tensor}"
                parts[key] = [names.pop(f"{prefix}{leaf}.{tensor}") for leaf in leaves]
                names[key] = key
            put_merged(module, linears, leaves, merged)
    return parts


def can_merge(module: nn.Module, leaves: tuple[str, ...], merged: str) -> bool:
    """Whether a module's projections are plain, alike but for their outputs, and called on one and the same input."""
    linears = [getattr(module, leaf, None) for leaf in leaves]
    if hasattr(module, merged) or not all(type(linear) is nn.Linear for linear in linears):
        return False
    alike = {(x.in_features, x.bias is None, x.weight.dtype) for x in cast(list[nn.Linear], linears)}
    distinct = {id(parameter) for linear in linears for parameter in cast(nn.Linear, linear).parameters()}
    num_parameters = sum(len(list(cast(nn.Linear, linear).parameters())) for linear in linears)
    is_tied = len(distinct) < num_parameters
    return len(alike) == 1 and not is_tied and reads_one_input(type(module), leaves)


@functools.cache
def reads_one_input(kind: type[nn.Module], leaves: tuple[str, ...]) -> bool:
    """Whether a class calls each of these projections once, in its forward, and all on the same expression.

    A class that also reads a projection's weight, say, keeps its projections.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, SyntaxError):
        return False
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in leaves and is_self(n.value)]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.func in uses]
    inputs = {ast.dump(argument) for call in calls for argument in call.args}
    called = sorted(cast(ast.Attribute, call.func).attr for call in calls)
    if changes_output(tree, calls):
        return False
    return len(uses) == len(calls) and called == sorted(leaves) and len(inputs) == 1 and is_name(calls[0])


def changes_output(tree: ast.AST, calls: list[ast.Call]) -> bool:
    """Whether what a call returns is changed in place, as in Longformer: the parts of one product cannot be."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and node.value in calls]
    names = {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    in_place = [node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)]
    changed = {target.id for target in in_place if isinstance(target, ast.Name)}
    return bool(names & changed)


def read_directly(model: nn.Module) -> set[str]:
    """Modules whose weight the module above them reads, instead of calling them (Mamba): these stay as they are."""
    return {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in weights_read_by(type(module))
    }


@functools.cache
def weights_read_by(kind: type[nn.Module]) -> set[str]:
    """Names of children whose `weight` the code of a class computes with: `self.dt_proj.weight @ x`.

    Casting an input to its type counts too, where the class does not ask first whether that is int8 (T5 does). Taking
    slices of it where BLOOM imitates parallel training is no such use.
    """
    if not kind.__module__.startswith("transformers.models."):
        return set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, SyntaxError):
        return set()
    nodes = list(ast.walk(tree))
    asked = {id(node.value) for node in nodes if isinstance(node, (ast.Attribute, ast.Subscript))}
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"]
    asked |= {id(call.args[0]) for call in calls}
    asked -= {id(kind_of.value) for kind_of in casts_in(nodes)}
    weights = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == "weight" and id(n) not in asked]
    children = [weight.value for weight in weights]
    return {child.attr for child in children if isinstance(child, ast.Attribute) and is_self(child.value)}


def casts_in(nodes: list[ast.AST]) -> list[ast.Attribute]:
    """Each `a.dtype` that something is cast to, in a class that knows nothing of int8."""
    if any(isinstance(node, ast.Attribute) and node.attr == "int8" for node in nodes):
        return []
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "to"]
    given = [value for call in calls for value in (*call.args, *(keyword.value for keyword in call.keywords))]
    return [value for value in given if isinstance(value, ast.Attribute) and value.attr == "dtype"]


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def is_name(call: ast.Call) -> bool:
    """Whether a call's only argument is a variable: the same object each time, if nothing assigns it in between."""
    return len(call.args) == 1 and not call.keywords and isinstance(call.args[0], ast.Name)


def put_merged(module: nn.Module, linears: list[nn.Linear], leaves: tuple[str, ...], merged: str) -> None:
    sizes = [linear.out_features for linear in linears]
    first = linears[0]
    made = nn.Linear(
        first.in_features, sum(sizes), bias=first.bias is not None, device="meta", dtype=first.weight.dtype
    )
    setattr(module, merged, made.requires_grad_(False))
    module.register_state_dict_post_hook(functools.partial(separate, merged=merged, leaves=leaves, sizes=sizes))
    held: dict[int, torch.Tensor] = {}
    for number, leaf in enumerate(leaves):
        setattr(module, leaf, MergedPart(module, merged, number, sizes, held))


def separate(
    _module: nn.Module,
    state: dict[str, torch.Tensor],
    prefix: str,
    _metadata: Any,
    *,
    merged: str,
    leaves: tuple[str, ...],
    sizes: list[int],
) -> None:
    """A hook of `state_dict`: it has the projections under their own names, so that others can load what is saved."""
    for name in [name for name in state if name.startswith(f"{prefix}{merged}.")]:
        if len(state[name]) == sum(sizes):  # not where ZeRO-3 has partitioned it
            tensor = name.removeprefix(f"{prefix}{merged}.")
            parts = state.pop(name).split(sizes)
            state.update({f"{prefix}{leaf}.{tensor}": part for leaf, part in zip(leaves, parts, strict=True)})
