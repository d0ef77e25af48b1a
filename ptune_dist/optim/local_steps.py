"""What a worker with steps of its own begins from and ends with: prompts and optimizers' states as one flat tensor.

The rule of an exchange is DiLoCo's (Douillard et al. 2023, arXiv:2311.08105, algorithm 1), with one difference: there
each worker keeps its inner optimizer's state, here the states are averaged as the prompts are. A worker's own state
would have to move to another node whenever the worker does, and would be lost with its node.
"""

import torch

from ptune_dist.optim.prompt_state import Member

OUTER = "outer_momentum"  # kept in the torch optimizer's state of a tensor, with which it is saved and handed on


def begin_state(member: Member) -> None:
    """Have the optimizer's state exist, as it is before the first step: torch makes it in that step, all zeros."""
    optimizer = member.optimizer
    if all(optimizer.state[parameter] for parameter in member.parameters):
        return
    before = [parameter.detach().clone() for parameter in member.parameters]
    for parameter in member.parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # that of a step is set in the step
    optimizer.step()
    member.clear_gradients()
    for parameter, kept in zip(member.parameters, before, strict=True):
        parameter.data.copy_(kept)
    for tensor in state_of(member):
        tensor.zero_()


def state_of(member: Member) -> list[torch.Tensor]:
    """The inner optimizer's tensors, in a fixed order."""
    return [
        tensor
        for parameter in member.parameters
        for key, tensor in sorted(member.optimizer.state[parameter].items())
        if key != OUTER and tensor is not None
    ]


def read_state(member: Member) -> torch.Tensor:
    """The member's tensors, then its optimizer's: float32, on the device of the first."""
    parameters = member.parameters
    tensors = [*parameters, *state_of(member)]
    return torch.cat([tensor.detach().reshape(-1).to(parameters[0].device, torch.float32) for tensor in tensors])


def write_state(member: Member, flat: torch.Tensor) -> None:
    """Set what `read_state` gave."""
    tensors = [*(parameter.data for parameter in member.parameters), *state_of(member)]
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def read_moves(member: Member, start: torch.Tensor) -> torch.Tensor:
    """As `read_state`, with how far the member's tensors have moved from `start`, which is as of `read_state`."""
    found = read_state(member)
    count = count_trained(member)
    found[:count] -= start[:count]
    return found


def move_to_mean(member: Member, start: torch.Tensor, mean: torch.Tensor, rate: float, momentum: float) -> None:
    """The outer step: from `start`, by the mean of what `read_moves` gives of all workers.

    With a rate of 1 and no momentum the tensors end at the workers' mean; the optimizer's state does so in any case.
    """
    write_state(member, mean)
    sizes = [parameter.numel() for parameter in member.parameters]
    count = count_trained(member)
    parts = zip(member.parameters, start[:count].split(sizes), mean[:count].split(sizes), strict=True)
    for parameter, before, moved in parts:
        step = moved.view(parameter.shape)
        if momentum:
            state = member.optimizer.state[parameter]
            state[OUTER] = momentum * state[OUTER] + step if OUTER in state else step.clone()
            step = step + momentum * state[OUTER]  # Nesterov's, as torch.optim.SGD has it
        parameter.data.copy_(before.view(parameter.shape) + rate * step)


def count_trained(member: Member) -> int:
    return sum(parameter.numel() for parameter in member.parameters)


def count_state(member: Member) -> int:
    """How many numbers `read_state` gives."""
    begin_state(member)
    return count_trained(member) + sum(tensor.numel() for tensor in state_of(member))


def spoil(member: Member) -> None:
    """Have whoever reads the member's tensors see that its steps have failed."""
    for parameter in member.parameters:
        parameter.data.fill_(torch.nan)
