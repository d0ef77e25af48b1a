"""Which examples make a step, how they are split over ranks and micro-batches, and the tensors of a micro-batch.

All of it is a pure function of the seed, the step and the lengths: every rank computes the same plan without a message,
the order does not depend on the world size, and a step number is all that a resume needs. Shapes: B rows, T and U
tokens.
"""

import functools
from collections.abc import Callable, Sequence
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
    examples: Sequence[int], widths: np.ndarray, *, world_size: int, micro_batch_tokens: int, extra_tokens: int = 0
) -> Plan:
    """Split examples into micro-batches of at most `micro_batch_tokens` padded positions, as many for every rank.

    `widths` is [N] where a row is one text, [N, 2] where its input and its target are padded apart. Rows of like length
    go together; `extra_tokens` is what stands before each row (virtual tokens). A single row longer than the budget is
    a micro-batch of its own. ZeRO-3 needs as many forward passes on every rank, so the number of micro-batches is a
    multiple of the world size.
    """
    parts = widths[:, None] if widths.ndim == 1 else widths

    def cost(group: list[int]) -> int:
        """Padded positions."""
        return len(group) * (int(parts[group].max(axis=0).sum()) + extra_tokens) if group else 0

    groups: list[list[int]] = []
    widest: list[int] = []  # of the last group, in each part
    for i in sorted(examples, key=lambda i: -parts[i].sum()):
        wider = [max(pair) for pair in zip(widest or parts[i], parts[i].tolist(), strict=True)]
        if groups and (len(groups[-1]) + 1) * (sum(wider) + extra_tokens) <= micro_batch_tokens:
            groups[-1].append(i)
            widest = wider
        else:
            groups.append([i])
            widest = parts[i].tolist()
    while len(groups) % world_size:
        split_largest(groups, cost)
    groups.sort(key=lambda group: -cost(group))
    return [groups[i : i + world_size] for i in range(0, len(groups), world_size)]


def split_largest(groups: list[list[int]], cost: Callable[[list[int]], int]) -> None:
    """Halve the costliest group that has two rows or more; where none has, add an empty one."""
    largest = max(groups, key=lambda group: cost(group) if len(group) > 1 else 0, default=[])
    if len(largest) < 2:
        groups.append([])
        return
    middle = len(largest) // 2
    groups.append(largest[middle:])
    del largest[middle:]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right. For a causal base input and target are one text, and U is T."""

    input_ids: torch.Tensor  # [B, T] input, then target tokens where they are one text
    attention_mask: torch.Tensor  # [B, T] 1 where there is a token
    target_ids: torch.Tensor  # [B, U] the tokens (an encoder's: the one label) to predict, and others
    target_mask: torch.Tensor  # [B, U] True on those to predict

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


def collate(examples: Examples, indices: Sequence[int], pad_id: int, *, apart: bool = False) -> Batch:
    """The tensors of a micro-batch; an idling rank (no indices) gets one padding token and nothing to predict.

    `apart`: the target is not read on from the input (seq2seq and encoder bases).
    """
    inputs = [examples.input_ids(i) for i in indices] or [np.zeros(0, np.int32)]
    targets = [examples.target_ids(i) for i in indices] or [np.zeros(0, np.int32)]
    if apart:
        ids, attention = pad_rows(inputs, pad_id)
        target_ids, target_mask = pad_rows(targets, pad_id)
    else:
        ids, attention = pad_rows([np.concatenate(pair) for pair in zip(inputs, targets, strict=True)], pad_id)
        target_ids, target_mask = ids, attention.copy()
        for row, before in enumerate(inputs):
            target_mask[row, : len(before)] = False
    tensors = [torch.from_numpy(array) for array in (ids, attention.astype(np.int64), target_ids, target_mask)]
    return Batch(*tensors)


def pad_rows(rows: list[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T], padded on the right to at least one position, and where there is a token [B, T]."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(1, int(lengths.max()))), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids, np.arange(ids.shape[1]) < lengths[:, None]
