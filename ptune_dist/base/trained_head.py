"""The trained parameters of a base, an encoder's head: whole, in float32 and apart from what is frozen.

They leave the parameters of their modules, so that nothing that shards, casts or counts the frozen base sees them, and
stay attributes of the same names, which is what the modules' forward reads.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

ATTRIBUTE = "trained_head"


def set_apart(base: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Take the trainable parameters out of `base`, which computes in `dtype`, and move them to the device."""
    apart: dict[str, nn.Parameter] = {}
    made: dict[int, nn.Parameter] = {}  # modules may share a parameter
    for module_name, module in base.named_modules():
        leaves = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.requires_grad}
        for leaf, parameter in leaves.items():
            del module._parameters[leaf]
            whole = made.setdefault(id(parameter), nn.Parameter(parameter.detach().to(device, torch.float32)))
            apart[f"{module_name}.{leaf}" if module_name else leaf] = whole
            module.__dict__[leaf] = whole
        if leaves and dtype != torch.float32:
            module.register_forward_pre_hook(Cast({leaf: module.__dict__[leaf] for leaf in leaves}, dtype))
    base.__dict__[ATTRIBUTE] = apart


class Cast:
    """A hook that gives a module its parameters in the dtype of its inputs; gradients reach the float32 ones."""

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype):
        self._parameters = parameters
        self._dtype = dtype

    def __call__(self, module: nn.Module, _inputs: tuple) -> None:
        for leaf, parameter in self._parameters.items():
            module.__dict__[leaf] = parameter.to(self._dtype)


def trained_parameters(base: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the base, whether they are set apart yet or not."""
    named = {name: p for name, p in base.named_parameters() if p.requires_grad}
    return named | base.__dict__.get(ATTRIBUTE, {})
