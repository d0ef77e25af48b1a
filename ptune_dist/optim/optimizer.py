"""The optimizer of a bank's prompts: whole tensors on every rank, whatever way DeepSpeed has cut them.

Floor 3. DeepSpeed reduces gradients and hands `step` this rank's flat partition of the float32 master weights (ZeRO
1, 2, 3) or the whole tensors (ZeRO 0). A prompt is a few hundred kB, so the gradient is gathered, clipped by its
member's own norm, stepped by an ordinary torch optimizer on whole tensors, and this rank's slice is written back.
What the optimizer does then depends neither on the ZeRO stage nor on the world size: Adafactor's factored moments and
update clipping stay those of the whole tensor, and a checkpoint restores anywhere.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn


def build_torch_optimizer(train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that config section `train` names."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=train.learning_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    return torch.optim.SGD(parameters, lr=train.learning_rate, momentum=train.momentum, weight_decay=train.weight_decay)


class Member:
    """One member's trainable tensors, whole and in float32, with the torch optimizer that moves them."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        max_grad_norm: float,
    ):
        self.names = list(named)
        self.whole = [nn.Parameter(p.detach().float().clone()) for p in named.values()]
        self.torch_optimizer = build(self.whole)
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0
        self.moves = True  # False: a step leaves it and its moments as they are
        self.fault: str | None = None  # what was not finite in the last step

    def step(self, grads: list[torch.Tensor]) -> None:
        """Clip by this member's norm and step; where a number is not finite say so in `fault` and stay finite."""
        self.fault = None
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        self.grad_norm = norm.item()
        if not math.isfinite(self.grad_norm):
            self.fault = f"the gradient's norm is {self.grad_norm}"
            return
        before = [parameter.detach().clone() for parameter in self.whole]
        scale = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6)) if self.max_grad_norm else 1.0
        for parameter, grad in zip(self.whole, grads, strict=True):
            parameter.grad = grad * scale
        self.torch_optimizer.step()
        for parameter in self.whole:
            parameter.grad = None
        if not all(parameter.isfinite().all() for parameter in self.whole):
            self.fault = "the prompt is not finite after the optimizer's step"
            for parameter, kept in zip(self.whole, before, strict=True):
                parameter.data.copy_(kept)

    def state(self) -> dict[str, torch.Tensor]:
        """The torch optimizer's tensors by `TENSOR.KEY`, on the CPU."""
        return {
            f"{name}.{key}": torch.as_tensor(value).detach().cpu().clone()
            for name, p in zip(self.names, self.whole, strict=True)
            for key, value in self.torch_optimizer.state[p].items()
            if value is not None
        }

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `state` gave."""
        content = self.torch_optimizer.state_dict()
        content["state"] = {
            i: {key.removeprefix(f"{name}."): t.clone() for key, t in tensors.items() if key.startswith(f"{name}.")}
            for i, name in enumerate(self.names)
        }
        self.torch_optimizer.load_state_dict(content)


class PromptOptimizer(torch.optim.Optimizer):
    """A client optimizer for DeepSpeed with one parameter group per member."""

    def __init__(self, members: dict[str, Member], parameters: dict[str, Iterable[nn.Parameter]], *, stage: int,
                 world_size: int, device: torch.device):  # fmt: skip
        groups = [{"params": list(parameters[name]), "member": name, "lr": 0.0} for name in members]
        super().__init__(groups, {})
        self.is_ready = False  # some of DeepSpeed's wrappers step once on zero gradients while they are made
        self.members, self.stage, self.world_size, self.device = members, stage, world_size, device

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Called by DeepSpeed, for one group or for all. Collective: every rank must call."""
        for group in self.param_groups if self.is_ready else ():
            if group["params"]:
                member = self.members[group["member"]]
                if not member.moves:
                    continue
                grads = self._gather(member, [p.grad for p in group["params"]])
                member.step(grads)
                self.write_back(member, group["params"])

    def _gather(self, member: Member, local: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole float32 gradients from this rank's."""
        if self.stage == 0:
            return [grad.float() for grad in local]
        (flat,) = local
        sent = flat.to(self.device, torch.float32).contiguous()  # offloaded gradients travel by the device's backend
        received = sent.new_empty(self.world_size, sent.numel())
        dist.all_gather_into_tensor(received.view(-1), sent)
        return join_partitions(received.to(member.whole[0].device), [p.shape for p in member.whole], self.stage)

    @torch.no_grad()
    def write_back(self, member: Member, local: list[torch.Tensor]) -> None:
        """Copy this rank's slice of the whole tensors into DeepSpeed's master weights."""
        if self.stage == 0:
            for mine, whole in zip(local, member.whole, strict=True):
                mine.copy_(whole)
            return
        (flat,) = local
        partitions = cut_partitions(member.whole, self.world_size, flat.numel(), self.stage)
        flat.copy_(partitions[dist.get_rank()])


def join_partitions(received: torch.Tensor, shapes: list[torch.Size], stage: int) -> list[torch.Tensor]:
    """Whole tensors from the flat partitions [N, L] of N ranks.

    ZeRO 1 and 2 lay a group's tensors end to end and cut the result; ZeRO 3 cuts each tensor, then lays the cuts end to
    end. Both pad at the end of what they cut.
    """
    whole, offset = [], 0
    for shape in shapes:
        if stage < 3:
            flat, width = received.view(-1)[offset : offset + shape.numel()], shape.numel()
        else:
            width = math.ceil(shape.numel() / received.shape[0])
            flat = received[:, offset : offset + width].reshape(-1)[: shape.numel()]
        whole.append(flat.view(shape))
        offset += width
    return whole


def cut_partitions(whole: list[torch.Tensor], num_ranks: int, length: int, stage: int) -> torch.Tensor:
    """The flat partitions [N, L] of whole tensors, the inverse of `join_partitions`."""
    partitions, offset = whole[0].new_zeros(num_ranks, length), 0
    for tensor in whole:
        if stage < 3:
            width = tensor.numel()
            partitions.view(-1)[offset : offset + width] = tensor.reshape(-1)
        else:
            width = math.ceil(tensor.numel() / num_ranks)
            padded = torch.nn.functional.pad(tensor.reshape(-1), (0, width * num_ranks - tensor.numel()))
            partitions[:, offset : offset + width] = padded.view(num_ranks, width)
        offset += width
    return partitions


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of optimizer step `step` (the first is 1).

    Linear and cosine reach zero one step after the last; warm-up rises linearly and reaches `peak` at its last step.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / (max_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak
