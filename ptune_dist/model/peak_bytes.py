"""The memory that a pass takes, found with tensors that have shapes and no memory.

The pass and its backward are the real ones, so this holds for every architecture, family, placement and recomputation.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import Recomputer
from ptune_dist.data.batches import Batch
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.below import BelowReader
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active and still live, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._storages: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(found):
            if torch.is_tensor(tensor):
                self._count(tensor.untyped_storage(), given)
        return found

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)  # the same as long as the storage lives
        if key in self._storages or key in given:  # views
            return
        num_bytes = storage.nbytes()
        self._live += num_bytes
        self.peak = max(self.peak, self._live)
        self._storages[key] = weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._live -= num_bytes
        del self._storages[key]


def measure_pass(
    build_model: Callable[[PreTrainedModel], PromptedModel],
    base: PreTrainedModel,
    batch: Batch,
    recompute: dict[str, Any] | None,
) -> int:
    """The most bytes of a pass over a batch and its backward, beside those of the base and the prompts.

    `base` has no memory, and `build_model` puts the prompts over a copy of it. `recompute` are the settings of
    `base.recompute`, where layers are recomputed.
    """
    own = copy.deepcopy(base)
    with FakeTensorMode(allow_non_fake_inputs=True):
        own.to_empty(device="cpu")
        model = build_model(own)
        if recompute is not None:
            Recomputer(recompute, layers_of(own))
        with LiveBytes() as counted:
            held = hold_contexts(model, batch)
            model.losses(held).sum().backward()
        model.zero_grad()
    return counted.peak


def hold_contexts(model: PromptedModel, batch: Batch) -> Batch:
    """The batch with its contexts, of which those that are equal are computed once, and with what late prompts read."""
    if model.late_starts:
        with unset_fake_temporarily():  # the prompts' own numbers are there, and looked at
            assert model.lowers
        batch = BelowReader(model.read_contexts, list, model, None).hold(batch)
    if 0 not in model.start_layers:
        return batch
    distinct = {tokens.tobytes(): tokens for tokens in batch.contexts if len(tokens)}
    if not distinct:
        return batch
    passed = model.read_contexts(Contexts(list(distinct.values()), batch.pad_id))
    wrapped = [KeysValues.of(tensors) if len(tensors) > 1 else tensors[0] for tensors in passed]
    held = {key: (value,) for key, value in zip(distinct, wrapped, strict=True)}
    return batch.with_held([held.get(tokens.tobytes(), ()) for tokens in batch.contexts])
