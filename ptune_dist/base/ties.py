"""Tied parameters that a checkpoint stores twice: what differs has weights of its own, as transformers loads it.

T5 v1.1, Flan-T5, mT5 and UMT5 have heads of their own; the classes of transformers tie them unless the files differ.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.checkpoint_formats import StoredWeights
from ptune_dist.base.converted import ConvertedWeights
from ptune_dist.base.names import spellings

NUM_ROWS = 4096  # that are compared at a time


def untie_differing(model: PreTrainedModel, files: StoredWeights | ConvertedWeights) -> list[tuple[str, str]]:
    """Give tied parameters whose stored numbers differ a parameter each; returns pairs (untied, what it was tied to).

    The rule is that of transformers' `tie_weights`, which compares each with the one that it is tied to.
    """

    def stored_of(name: str) -> str | None:
        return next((spelling for spelling in spellings(model, name) if spelling in files.shapes), None)

    sources: dict[str, str] = {}
    untied: list[tuple[str, str]] = []
    for target, source in list(model.all_tied_weights_keys.items()):
        own = stored_of(target)
        tied_to = sources.get(source) or stored_of(source)
        if tied_to is None:  # the first copy that is there stands for the absent one
            tied_to = own
        if tied_to is not None:
            sources[source] = tied_to
        if own is None or own == tied_to or tied_to is None or are_equal(files, own, tied_to):
            continue
        parent, _, leaf = target.rpartition(".")
        parameter = model.get_parameter(target)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(parameter), requires_grad=False))
        del model.all_tied_weights_keys[target]
        untied.append((target, source))
    return untied


def untie_trained(model: PreTrainedModel, trained: set[str]) -> None:
    """Give what is trained a parameter of its own where it is tied to one that is not."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for alike in names.values():
        if trained.issuperset(alike):
            continue
        for name in trained.intersection(alike):
            parent, _, leaf = name.rpartition(".")
            parameter = model.get_parameter(name)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(parameter), requires_grad=False))
            model.all_tied_weights_keys.pop(name, None)


def are_equal(files: StoredWeights | ConvertedWeights, one: str, other: str) -> bool:
    """Whether two stored tensors hold the same numbers; reads both, at most to the first rows that differ."""
    if files.shapes[one] != files.shapes[other]:
        return False
    num_rows = files.shapes[one][0]
    return all(
        torch.equal(files.read_rows(one, first, last), files.read_rows(other, first, last))
        for first in range(0, num_rows, NUM_ROWS)
        for last in [min(first + NUM_ROWS, num_rows)]
    )


def describe_untied(untied: list[tuple[str, str]]) -> str | None:
    if not untied:
        return None
    return "; ".join(
        f"{target} is stored beside {source} and differs: each has its own weights" for target, source in untied
    )
