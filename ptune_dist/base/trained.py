"""The trained parameters of a base: an encoder's head, or those that a method trains; whole, in float32 and apart.

They leave the parameters of their modules, so that nothing that shards, casts or counts the frozen base sees them, and
stay attributes of the same names, which is what the modules' forward reads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.quantized import QuantizedLinear

ATTRIBUTE = "trained_apart"


def set_apart(base: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Take the trainable parameters out of `base`, which computes in `dtype`, and move them to the device."""
    apart: dict[str, nn.Parameter] = {}
    made: dict[int, nn.Parameter] = {}  # modules may share a parameter
    for module_name, module in base.named_modules():
        leaves = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.requires_grad}
        for leaf, parameter in leaves.items():
            whole = made.setdefault(id(parameter), nn.Parameter(parameter.detach().to(device, torch.float32)))
            apart[f"{module_name}.{leaf}" if module_name else leaf] = whole
            take_out(module, leaf, whole, dtype)
    base.__dict__[ATTRIBUTE] = apart


def take_out(module: nn.Module, leaf: str, whole: nn.Parameter, dtype: torch.dtype) -> None:
    """Have a module compute with `whole`, cast to `dtype`, in place of its own parameter; gradients reach `whole`."""
    if isinstance(module, QuantizedLinear) and leaf == "bias":  # its product has no gradient of a bias
        module.bias = None
        forward = type(module).forward
        change_class(module, {"forward": lambda self, x: forward(self, x) + whole.to(dtype)})
        return
    del module._parameters[leaf]
    if dtype == whole.dtype:
        module.__dict__[leaf] = whole
    else:  # cast when it is read: some architectures compute with a weight without calling its module
        change_class(module, {leaf: property(lambda _: whole.to(dtype))})


def change_class(module: nn.Module, members: dict[str, Any]) -> None:
    """Give one module a class of its own, with these members. Unlike hooks, they hold wherever it is called from."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **members})


def trained_parameters(base: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the base, whether they are set apart yet or not."""
    named = {name: p for name, p in base.named_parameters() if p.requires_grad}
    return named | base.__dict__.get(ATTRIBUTE, {})


def is_outside(model: PreTrainedModel, name: str) -> bool:
    """Whether a classifier's parameter stands outside of its encoder: DeBERTa's pooler does, BERT's does not."""
    return not name.startswith(f"{model.base_model_prefix}.")


def choose_parameters(model: PreTrainedModel, is_chosen: Callable[[nn.Module, str], bool]) -> set[str]:
    """All names of the parameters of which `is_chosen(module, leaf)` is true."""
    return {
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False, remove_duplicate=False)
        if is_chosen(module, leaf)
    }


def parameters_of_head(model: PreTrainedModel) -> set[str]:
    """All names of the parameters of the head over the vocabulary; none where a base has no such head."""
    head = model.get_output_embeddings()
    return set() if head is None else choose_parameters(model, lambda module, _: module is head)
