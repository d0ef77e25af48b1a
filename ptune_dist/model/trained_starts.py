"""What the trained tensors of a base and a trained head start from, where a prompt starts from a file."""

import torch

from ptune_dist.base.trained import is_outside
from ptune_dist.errors import UserError
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.head_start import HEAD
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.start import BASE, VALUE_HEAD


@torch.no_grad()
def start_trained(model: PromptedModel) -> None:
    """Set what is trained beside the prompts to what `prompt.init_file` held. Raises UserError."""
    for member, prompt in enumerate(model.members()):
        if prompt.base_start is not None:
            start_base(model, member, prompt.base_start)
        if prompt.head_start is not None:
            start_head(model, member)


def start_base(model: PromptedModel, member: int, start: dict[str, torch.Tensor]) -> None:
    """An encoder's head, which is among these tensors, starts anew where it was trained for other labels.

    Raises UserError where other tensors were trained.
    """
    own = {name: p for name, p in model.trainable(member).items() if name.startswith(BASE)}
    differing = sorted(own.keys() ^ start.keys())
    if differing:
        name = differing[0].removeprefix(BASE)
        where = "in this run and not there" if differing[0] in own else "there and not in this run"
        raise UserError(
            f"prompt.init_file: {name} is trained {where}: give the prompt the method and options of that run"
        )
    own = without_other_head(model, member, own)
    for name, parameter in own.items():
        shapes = [tuple(found.shape) for found in (parameter, start[name])]
        if shapes[0] != shapes[1]:
            raise UserError(f"prompt.init_file: {name} has shape {shapes[0]} in this run and {shapes[1]} there")
    for name, parameter in own.items():
        parameter.copy_(start[name])


def without_other_head(
    model: PromptedModel, member: int, own: dict[str, torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """What starts from the file; whether an encoder's head does is noted."""
    prompt = model.prompt(member)
    stored = prompt.head_start
    if stored is None or stored.has_labels is None:
        return own
    note_head(prompt, is_anew=not stored.has_labels)
    if stored.has_labels:
        return own
    return {name: p for name, p in own.items() if not is_outside(model.base, name.removeprefix(BASE))}


def note_head(prompt: Method, *, is_anew: bool) -> None:
    assert prompt.head_start is not None, "a prompt that starts from a file knows what that file has of a head"
    file = prompt.head_start.file
    how = f"anew: {file} has none for the same labels" if is_anew else f"as that of {file}"
    prompt.head_note = f"prompt.init_file: the head starts {how}"


def start_head(model: PromptedModel, member: int) -> None:
    """Have a trained head start as the one that is stored beside the prompt, where that is one for the same labels."""
    prompt = model.prompt(member)
    own = {name: p for name, p in model.trainable(member).items() if name.startswith((HEAD, VALUE_HEAD))}
    if not own:
        return
    assert prompt.head_start is not None
    scale = model.target_scales[member]
    found = prompt.head_start.tensors_for(scale.mean, scale.std)
    is_anew = any(name not in found or found[name].shape != p.shape for name, p in own.items())
    note_head(prompt, is_anew=is_anew)
    if is_anew:
        return
    for name, parameter in own.items():
        parameter.copy_(found[name])
