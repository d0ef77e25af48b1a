"""Passes over the base and back: plain where every rank holds it whole, through DeepSpeed's hooks where ZeRO-3 cuts it.

DeepSpeed gets the frozen base alone and no optimizer. Its hooks gather a module's weights before the module computes,
forward or backward, and release them afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.errors import UserError
from ptune_dist.zero.gathers import Gathers, watch_gathers
from ptune_dist.zero.residency import keep_resident
from ptune_dist.zero.setup import join_deepspeed

T = TypeVar("T")


class WholePasses:
    """ZeRO 0; and 1 and 2, which cut the state of optimizers, of which a frozen base has none."""

    is_sharded = False

    def __init__(self) -> None:
        self.gathers = Gathers()

    def run(self, work: Callable[[], T]) -> T:
        """What `work` computes of the base."""
        return work()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class ShardedPasses:
    """ZeRO 3. Each call is collective: every rank must call, and use the same modules of the base in the same order."""

    is_sharded = True

    def __init__(self, base: PreTrainedModel, layers: Sequence[nn.Module], content: dict[str, Any]):
        """`base` is sharded already; `content` is DeepSpeed's filled JSON. Raises UserError."""
        join_deepspeed()
        self.gathers = watch_gathers()
        traced = Traced(base)
        # One gather for each layer instead of one for each linear.
        deepspeed.utils.set_z3_leaf_modules(traced, list({type(layer) for layer in layers}))
        self._engine: Any  # DeepSpeed's own types name the optimizers of all of its modes
        try:
            self._engine, *_ = deepspeed.initialize(model=traced, config=content)
        except NotImplementedError as error:  # combinations of precisions that DeepSpeed does not know
            raise UserError(f"deepspeed: DeepSpeed cannot do this: {error}") from None
        keep_resident(base)
        self._is_running = False

    def run(self, work: Callable[[], T]) -> T:
        """What `work` computes of the base. A run within a run belongs to it: DeepSpeed sees one pass."""
        if self._is_running:
            return work()
        self._is_running = True
        try:
            # Not the engine's own forward, which prepares a backward pass for the optimizer that it lacks.
            return self._engine.module(work)
        finally:
            self._is_running = False

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        # Modules whose inputs need no gradient are gathered in backward, but no hook of theirs runs after it.
        self._engine.optimizer.release_backward_leftovers()


class Traced(nn.Module):
    """The module that DeepSpeed sees: one call is one pass, whichever parts of the base it uses and in which order.

    DeepSpeed begins a new trace, by which it gathers ahead, with each call of its outermost module.
    """

    def __init__(self, base: PreTrainedModel):
        super().__init__()
        self.base = base

    def forward(self, work: Callable[[], T]) -> T:
        return work()


Passes = WholePasses | ShardedPasses
