"""Frozen weights that ZeRO-3 need not release: DeepSpeed's persistence thresholds, filled in from the base's tensors.

A gathered weight that is frozen is the same in every step. DeepSpeed lets a rank hold `stage3_max_live_parameters`
gathered elements; as many frozen ones as that allows stay gathered, so that a base, or the part of it that fits, is
received once and not twice a step.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.layers import hidden_size, layers_of, parameter_size

ONE_AT_MOST = "stage3_param_persistence_threshold"  # elements of a tensor that stays gathered
ALL_AT_MOST = "stage3_model_persistence_threshold"  # elements of all that stay gathered
LIVE = "stage3_max_live_parameters"
DEFAULT_LIVE = 1_000_000_000
NUM_AT_WORK = 2  # layers that are gathered beside what stays: the one at work and the next


def settle_residency(content: dict[str, Any], base: PreTrainedModel) -> None:
    """Fill DeepSpeed's persistence thresholds where the JSON leaves both to us; a number that it gives is kept."""
    zero = content["zero_optimization"]
    is_given = {key: zero.get(key, "auto") != "auto" for key in (ONE_AT_MOST, ALL_AT_MOST)}
    is_offloaded = (zero.get("offload_param") or {}).get("device", "none") != "none"
    wants_small_ones = zero.get(ONE_AT_MOST) == "auto"
    for key, given in is_given.items():
        if not given:
            zero.pop(key, None)
    if zero.get("stage") != 3:
        return
    if not any(is_given.values()) and not is_offloaded:
        elements = count_resident(base, int(zero.get(LIVE, DEFAULT_LIVE)))
        zero[ONE_AT_MOST] = zero[ALL_AT_MOST] = elements
    elif wants_small_ones:
        zero[ONE_AT_MOST] = 10 * hidden_size(base)  # as Hugging Face fills it


def gathered_bytes(content: dict[str, Any], base: PreTrainedModel) -> int:
    """Bytes of gathered weights that a rank holds beside its part of the base, at most. `content` is settled."""
    zero = content["zero_optimization"]
    if zero.get("stage") != 3:
        return 0
    one_at_most = int(zero.get(ONE_AT_MOST, 100_000))  # DeepSpeed's default
    left = int(zero.get(ALL_AT_MOST, 1 << 62))
    resident: set[int] = set()
    num_bytes = 0
    for parameter in base.parameters():
        elements = parameter_size(parameter)
        if elements <= min(one_at_most, left):
            left -= elements
            num_bytes += elements * parameter.element_size()
            resident.add(id(parameter))
    sizes = {id(p): parameter_size(p) * p.element_size() for p in base.parameters() if id(p) not in resident}
    of_layers = [sum(sizes.get(id(p), 0) for p in layer.parameters()) for layer in layers_of(base)]
    # Embeddings and head are gathered alone.
    return num_bytes + max(NUM_AT_WORK * max(of_layers, default=0), max(sizes.values(), default=0))


def keep_resident(base: PreTrainedModel) -> None:
    """Have the persistent parameters of a base that DeepSpeed has taken stay gathered in every kind of pass.

    DeepSpeed itself keeps them only in passes that repeat the one before: generation or an evaluation would receive the
    base anew for each token or batch. A module does not release parameters that are external to it.
    """
    # DeepSpeed adds attributes to parameters.
    for parameter in cast(Iterator[Any], base.parameters()):
        if parameter.ds_persist:
            assert hasattr(parameter, "is_external_param"), "DeepSpeed knows no external parameters any more"
            parameter.is_external_param = True


def count_resident(base: PreTrainedModel, max_live: int) -> int:
    """Elements that may stay gathered where `max_live` may be at once."""
    if count_elements(base) <= max_live:
        return max_live
    at_work = NUM_AT_WORK * max((count_elements(layer) for layer in layers_of(base)), default=0)
    return max(0, max_live - at_work)


def count_elements(module: nn.Module) -> int:
    """Elements of a module's parameters, each once."""
    return sum(parameter_size(parameter) for parameter in module.parameters())
