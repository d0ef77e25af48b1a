"""Frozen weights that ZeRO-3 need not give back.

DeepSpeed lets a rank hold `stage3_max_live_parameters` gathered parameters, and gives all of them back after each pass
and step because a step may have changed them. A frozen weight is the same for ever: as many as the JSON allows to be
live stay gathered, so that a base (or the part of it) that fits is received once and not twice a step.
"""

from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

LIVE = "stage3_max_live_parameters"
DEFAULT_LIVE = 1_000_000_000
# Beside what stays, the layer at work and the next one are live.
NUM_AT_WORK = 2


def choose_resident(parameters: list[torch.Tensor], layers: list[torch.nn.Module], most: int) -> list[torch.Tensor]:
    """The frozen parameters, in the model's order, that may stay gathered where `most` elements may be live."""
    sizes = [sum(p.ds_numel for p in layer.parameters()) for layer in layers]
    total = sum(p.ds_numel for p in parameters)
    room = most if total <= most else most - NUM_AT_WORK * max(sizes, default=0)
    chosen = []
    for parameter in parameters:
        if not parameter.requires_grad and parameter.ds_numel <= room:
            chosen.append(parameter)
            room -= parameter.ds_numel
    return chosen


def keep_resident(zero: Any, module: torch.nn.Module, layers: list[torch.nn.Module], content: dict[str, Any]) -> None:
    """Have a DeepSpeed ZeRO-3 optimizer leave such parameters gathered. Not where parameters are offloaded.

    DeepSpeed gathers what is under its persistence threshold anew after every step, tensor by tensor: not what is
    frozen. What is set here are private names of DeepSpeed 0.19.
    """
    kept = zero.persistent_parameters
    kept[:] = [parameter for parameter in kept if parameter.requires_grad]
    section = content["zero_optimization"]
    coordinator = zero.parameter_offload.get_param_coordinator()
    if section.get("offload_param", {}).get("device", "none") != "none" or coordinator.fast_sharding_for_leaf_module:
        return
    most = section.get(LIVE, DEFAULT_LIVE)
    chosen = choose_resident(list(module.parameters()), layers, DEFAULT_LIVE if most == "auto" else int(most))
    resident = {id(parameter) for parameter in chosen}
    release = coordinator._PartitionedParameterCoordinator__release_param
    inflight = coordinator._PartitionedParameterCoordinator__inflight_param_registry

    def release_param(parameter: torch.Tensor, free_data: bool = True) -> None:
        if id(parameter) not in resident:
            release(parameter, free_data)

    def partition_all_parameters() -> None:
        for parameter in module.parameters():
            if parameter in inflight:
                inflight.pop(parameter).wait()
            parameter.ds_active_sub_modules.clear()
            release_param(parameter)
            assert id(parameter) in resident or parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE

    coordinator._PartitionedParameterCoordinator__release_param = release_param
    zero.parameter_offload.partition_all_parameters = partition_all_parameters
