"""Which examples make a step, how they are split over ranks and micro-batches, and the tensors of a micro-batch.

All of it is a pure function of the seed, the step and the lengths: every rank computes the same plan without a message,
the order does not depend on the world size, and a step number is all that a resume needs. Shapes: B rows, T tokens.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ptune_dist.data.encode import Examples

# micro step -> rank -> indices of examples; an empty list is a rank that idles along with weight zero
Plan = list[list[list[int]]]


@functools.lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The examples of one epoch in order: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def step_examples(step: int, *, batch_size: int, num_examples: int, seed: int) -> list[int]:
    """Examples of optimizer step `step` (the first is 1): epochs follow one another without a gap, none is dropped."""
    first = (step - 1) * batch_size
    positions = range(first, first + batch_size)
    return [int(epoch_order(num_examples, seed, p // num_examples)[p % num_examples]) for p in positions]


def plan_micro_batches(
    examples: Sequence[int], lengths: np.ndarray, *, world_size: int, micro_batch_tokens: int, extra_tokens: int = 0
) -> Plan:
    """Split examples into micro-batches of at most `micro_batch_tokens` padded positions, as many for every rank.

    Rows of like length go together; `extra_tokens` is what stands before each row (virtual tokens). A single row longer
    than the budget is a micro-batch of its own. ZeRO-3 needs as many forward passes on every rank, so the number of
    micro-batches is a multiple of the world size.
    """
    cost = {i: int(lengths[i]) + extra_tokens for i in examples}
    groups: list[list[int]] = []
    for i in sorted(examples, key=lambda i: -cost[i]):  # longest first: a group's first row is its width
        if groups and (len(groups[-1]) + 1) * cost[groups[-1][0]] <= micro_batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    while len(groups) % world_size:
        split_largest(groups, cost)
    groups.sort(key=lambda group: -len(group) * cost[group[0]] if group else 0)
    return [groups[i : i + world_size] for i in range(0, len(groups), world_size)]


def split_largest(groups: list[list[int]], cost: dict[int, int]) -> None:
    """Halve the costliest group that has two rows or more; where none has, add an empty one."""
    largest = max(groups, key=lambda group: len(group) * cost[group[0]] if len(group) > 1 else 0, default=[])
    if len(largest) < 2:
        groups.append([])
        return
    middle = len(largest) // 2
    groups.append(largest[middle:])
    del largest[middle:]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right."""

    input_ids: torch.Tensor  # [B, T] input, then target tokens
    attention_mask: torch.Tensor  # [B, T] 1 where there is a token
    target_mask: torch.Tensor  # [B, T] True on the tokens to predict

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


def collate(examples: Examples, indices: Sequence[int], pad_id: int) -> Batch:
    """The tensors of a micro-batch; an idling rank (no indices) gets one padding token and nothing to predict."""
    width = max((int(examples.lengths[i]) for i in indices), default=1)
    num_rows = max(1, len(indices))
    ids = np.full((num_rows, width), pad_id, dtype=np.int64)
    attention = np.zeros((num_rows, width), dtype=np.int64)
    target = np.zeros((num_rows, width), dtype=bool)
    for row, i in enumerate(indices):
        before, after = examples.input_ids(i), examples.target_ids(i)
        length = len(before) + len(after)
        ids[row, : len(before)] = before
        ids[row, len(before) : length] = after
        attention[row, :length] = 1
        target[row, len(before) : length] = True
    return Batch(torch.from_numpy(ids), torch.from_numpy(attention), torch.from_numpy(target))
