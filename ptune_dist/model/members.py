"""The prompts of all members over one base, and what each of them contributes to passes.

A member has one contribution, or one for each of its tasks. Contributions are numbered across all members.

Shapes: T tokens, P virtual tokens, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.data.batches import Batch, Unit
from ptune_dist.data.examples import Examples
from ptune_dist.model.attention import KeysValues
from ptune_dist.prompts.method import Contribution, Method


class MemberPrompts(nn.Module):
    """A frozen base and the prompts of all members, attached to it."""

    base: PreTrainedModel
    prompts: nn.ModuleList  # of Method, one for each member

    def __init__(self, base: PreTrainedModel, prompts: list[Method]):
        super().__init__()
        self.base = base
        self._device = torch.device("cpu")  # of what has no prompt; see `PromptedModel.place`
        self.prompts = nn.ModuleList(prompts)
        for prompt in prompts:
            prompt.attach(base)
        contributions = contributions_in_eval(prompts)
        self.num_vectors = [contribution.num_vectors for contribution in contributions]
        self.num_prefix = [contribution.num_prefix for contribution in contributions]
        self.start_layers = [contribution.start_layer for contribution in contributions]

    @property
    def device(self) -> torch.device:
        own = next(self.prompts.parameters(), None)
        return self._device if own is None else own.device

    def prompt(self, member: int) -> Method:
        """The prompt of a member."""
        return cast(Method, self.prompts[member])  # torch's ModuleList has no type for its items

    def members(self) -> Iterator[Method]:
        """The prompts of all members, in order."""
        return map(self.prompt, range(len(self.prompts)))

    def number_of(self, member: int, task: int = 0) -> int:
        """The number of what a member contributes to rows of a task, among the contributions of all members.

        Raises IndexError for a task that it does not have; a prompt without tasks contributes the same to all rows.
        """
        num_tasks = [prompt.num_tasks for prompt in self.members()]
        own = task if num_tasks[member] > 1 else 0
        if not 0 <= own < num_tasks[member]:
            raise IndexError(f"task {task} of {num_tasks[member]}")
        return sum(num_tasks[:member]) + own

    def member_of(self, number: int) -> int:
        """The member whose prompt makes a contribution."""
        return [member for member, prompt in enumerate(self.members()) for _ in range(prompt.num_tasks)][number]

    def prompt_of(self, number: int) -> Method:
        """The prompt that makes a contribution."""
        return self.prompt(self.member_of(number))

    def num_virtual(self, number: int) -> int:
        """The positions of a contribution."""
        return self.prompt_of(number).num_virtual_tokens

    def by_contribution(self, batch: Batch) -> Batch:
        """The batch with numbers of contributions in place of its readers' members."""
        num_tasks = [prompt.num_tasks for prompt in self.members()]
        if max(num_tasks) == 1:
            return batch
        assert batch.tasks is not None, "rows have tasks where a prompt does"
        pairs = {(member, batch.tasks[row]) for row, member in batch.readers}
        numbers = {pair: self.number_of(*pair) for pair in pairs}
        readers = [(row, numbers[member, batch.tasks[row]]) for row, member in batch.readers]
        return replace(batch, readers=readers, tasks=None)

    def count_tasks(self, units: list[Unit], examples: Examples) -> dict[int, int]:
        """Of each member with tasks, how many of them are those of its examples."""
        with_tasks = {member for member, prompt in enumerate(self.members()) if prompt.num_tasks > 1}
        if not with_tasks:
            return {}
        assert examples.tasks is not None, "rows have tasks where a prompt does"
        read = {(member, int(examples.tasks[example])) for example, some in units for member in some}
        return {member: sum(1 for reader, _ in read if reader == member) for member in with_tasks}

    def begin_step(self, step: int) -> None:
        """Called before the passes of optimizer step `step`."""
        for prompt in self.members():
            prompt.begin_step(step)

    def contributions(self, start: int | None = None) -> list[Contribution]:
        """What the members add to a pass: for each member and each of its tasks, in this order.

        With `start`, nothing of members whose prompts enter at another layer.
        """
        found: list[Contribution] = []
        for member, prompt in enumerate(self.members()):
            is_in = start is None or self.start_layers[self.number_of(member)] == start
            found += prompt.contributions() if is_in else [Contribution()] * prompt.num_tasks
        return found


def contributions_in_eval(prompts: Sequence[Method]) -> list[Contribution]:
    """What the prompts contribute, without gradient and without their random numbers."""
    found: list[Contribution] = []
    for prompt in prompts:
        was_training = prompt.training
        with torch.no_grad():
            found += prompt.eval().contributions()
        prompt.train(was_training)
    return found


def vectors_of(contribution: Contribution, like: torch.Tensor) -> torch.Tensor:
    """A contribution's virtual tokens [P, D] in the dtype of the tokens `like` [T, D]; none are [0, D]."""
    return like[:0] if contribution.vectors is None else contribution.vectors.to(like.dtype)


def keys_values_of(contribution: Contribution) -> KeysValues | None:
    """A contribution's keys and values of every layer."""
    if contribution.keys is None or contribution.values is None:
        return None
    return KeysValues(contribution.keys, contribution.values)
