"""Everything that training changes, in one small object: the prompts' tensors, optimizers, faults and loss scale.

A prompt is a few hundred kB, so its tensors are whole, in float32 and the same on every rank. Each rank computes the
gradient of its own rows; the gradients are summed over the ranks once a step, and every rank then takes the same step.
So nothing here depends on how the base is stored, and a checkpoint restores at any world size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ptune_dist.distributed.world import World
from ptune_dist.optim.gradients import flatten_gradients, set_gradients, sum_gradients
from ptune_dist.optim.loss_scale import LossScale


class Member:
    """One member's trainable tensors with the torch optimizer that moves them."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        fixed: dict[str, torch.Tensor] | None = None,
    ):
        """`named` are float32; `max_grad_norm` 0 clips nothing. `fixed`: what is stored with them and never moves."""
        self.named = named
        self.fixed = fixed or {}
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0  # in its last step, before clipping

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The gradient of every parameter, once `sum_gradients` has set them."""
        found = [parameter.grad for parameter in self.parameters]
        present = [gradient for gradient in found if gradient is not None]
        assert len(present) == len(found), "a parameter has no gradient: sum_gradients comes first"
        return present

    def norm(self) -> torch.Tensor:
        """The norm of the whole gradient, a scalar on the device."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in self.gradients]))

    def step(self, learning_rate: float) -> None:
        """Clip by the norm in `grad_norm` and step."""
        if self.max_grad_norm:
            scale = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))
            for gradient in self.gradients:
                gradient.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def is_finite(self) -> torch.Tensor:
        """Whether all tensors are finite, a scalar on the device."""
        return torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all()

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the trainable tensors, and of the fixed ones, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in (self.named | self.fixed).items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `tensors` gave."""
        for name, tensor in (self.named | self.fixed).items():
            tensor.copy_(tensors[name])

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors by `TENSOR.KEY`, on the CPU."""
        return {
            f"{name}.{key}": torch.as_tensor(value).detach().cpu().clone()
            for name, parameter in self.named.items()
            for key, value in self.optimizer.state[parameter].items()
            if value is not None
        }

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `optimizer_state` gave."""
        by_name: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.named}
        for path, tensor in tensors.items():
            name, _, key = path.rpartition(".")
            by_name[name][key] = tensor.clone()
        content = self.optimizer.state_dict()
        content["state"] = dict(enumerate(by_name.values()))
        self.optimizer.load_state_dict(content)


class Measured(NamedTuple):
    """A step's numbers over all ranks: each member's summed loss, and the norm of each named member's gradient."""

    losses: list[float]
    norms: dict[str, float]


class PromptState:
    """The members' training state."""

    def __init__(self, members: dict[str, Member], world: World, loss_scale: LossScale | None = None):
        self.members = members
        self.loss_scale = loss_scale
        self.skipped_steps = 0  # because of fp16's overflows
        self._world = world

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss if self.loss_scale is None else loss * self.loss_scale.cur_scale

    def measure(self, names: Sequence[str], totals: torch.Tensor) -> Measured:
        """Sum the gradients of the members that are named, and each member's loss [K], over the ranks.

        What the host must know to step is copied to it at once. Collective: every rank must call.
        """
        sum_gradients(self._parameters_of(names), self._world)
        losses = totals.double()
        if self._world.size > 1:
            dist.all_reduce(losses)
        return self._read(names, losses)

    def take_sums(self, names: Sequence[str]) -> torch.Tensor:
        """This rank's gradients since the last call, of the members that are named, in one float32 tensor."""
        found = flatten_gradients(self._parameters_of(names)) if names else torch.zeros(0, device=self._world.device)
        self.clear_gradients()
        return found

    def measure_sums(self, names: Sequence[str], sums: torch.Tensor) -> Measured:
        """`measure`, of sums over the whole step that were made elsewhere.

        `sums`: the gradients of the members that are named, as `take_sums` gives them, then each member's loss [K].
        """
        parameters = self._parameters_of(names)
        count = sum(parameter.numel() for parameter in parameters)
        set_gradients(parameters, sums[:count])
        return self._read(names, sums[count:].double())

    def _parameters_of(self, names: Sequence[str]) -> list[nn.Parameter]:
        return [parameter for name in names for parameter in self.members[name].parameters]

    def _read(self, names: Sequence[str], losses: torch.Tensor) -> Measured:
        """Once gradients are summed: take the loss scale out of them, and read the numbers of the step."""
        measured = {name: self.members[name] for name in names}
        if self.loss_scale is not None:
            for gradient in (gradient for member in measured.values() for gradient in member.gradients):
                gradient.div_(self.loss_scale.cur_scale)
        norms = [member.norm().double() for member in measured.values()]
        numbers = torch.cat([losses, *(norm[None] for norm in norms)]).tolist()
        of_members, of_gradients = numbers[: len(losses)], numbers[len(losses) :]
        return Measured(of_members, dict(zip(names, of_gradients, strict=True)))

    def move(self, learning_rates: dict[str, float], norms: dict[str, float]) -> dict[str, str]:
        """Step the members that are named, each by its own learning rate; returns their faults.

        A member whose gradient, or whose tensors after the step, are not finite keeps the tensors that it had, and the
        others are unaffected. Under a loss scale a gradient that is not finite skips the step of all. Gradients are
        cleared. Every rank must call, with the `norms` of `measure`.
        """
        moving = {name: self.members[name] for name in learning_rates}
        found = [norms[name] for name in moving]
        faults: dict[str, str] = {}
        if not self._skips(found):
            faults = self._move(moving, found, learning_rates)
        self.clear_gradients()
        return faults

    def clear_gradients(self) -> None:
        for member in self.members.values():
            member.clear_gradients()

    def _skips(self, norms: list[float]) -> bool:
        """Whether the loss scale was too large for this step; adjusts it."""
        if self.loss_scale is None:
            return False
        has_overflow = not all(math.isfinite(norm) for norm in norms)
        if has_overflow and self.loss_scale.is_exhausted:
            return False
        self.loss_scale.count_step(has_overflow)
        self.skipped_steps += has_overflow
        return has_overflow

    def _move(self, moving: dict[str, Member], norms: list[float], rates: dict[str, float]) -> dict[str, str]:
        """Step the members whose gradient is finite, and take back what leaves the finite; the faults of the others."""
        faults: dict[str, str] = {}
        before: dict[str, list[torch.Tensor]] = {}
        for (name, member), norm in zip(moving.items(), norms, strict=True):
            member.grad_norm = norm
            if not math.isfinite(norm):
                faults[name] = f"the gradient's norm is {norm}"
                continue
            before[name] = [parameter.detach().clone() for parameter in member.parameters]
            member.step(rates[name])
        finite = torch.stack([moving[name].is_finite() for name in before]).tolist() if before else []
        for name, is_finite in zip(before, finite, strict=True):
            if is_finite:
                continue
            faults[name] = "the prompt is not finite after the optimizer's step"
            for parameter, kept in zip(moving[name].parameters, before[name], strict=True):
                parameter.data.copy_(kept)
        return faults

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizers' tensors by `MEMBER/TENSOR.KEY`, on the CPU."""
        return {
            f"{name}/{path}": tensor
            for name, member in self.members.items()
            for path, tensor in member.optimizer_state().items()
        }

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `optimizer_state` gave, at any world size."""
        for name, member in self.members.items():
            prefix = f"{name}/"
            own = {path.removeprefix(prefix): t for path, t in tensors.items() if path.startswith(prefix)}
            member.load_optimizer_state(own)
