"""The head of a language model and the objective in one: losses at supervised positions, a chunk of them at a time.

No tensor [B, T, V] exists, and no logits are kept for backward: in training, the gradient of each loss with respect to
its own hidden state is computed along with the loss. The head is frozen, so nothing else is needed of it. All of that
happens within the one call of the head that belongs to a pass, so ZeRO-3 gathers its weights once, in forward, and
every pass calls the same modules, however many targets it has.

Shapes: B rows, T tokens, U supervised positions, E tokens that are scored, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ptune_dist.model.from_head import FromHead

# Of a chunk's float32 logits.
CHUNK_BYTES = 1 << 24  # larger ones are not faster on a CPU
CUDA_CHUNK_BYTES = 1 << 29  # 1,024 targets at a vocabulary of 128k: fewer would leave a GPU idle
FP16_SCALE = 1024.0  # float16's smallest number is 6e-8: a probability that counts may be smaller

LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits [U, V], targets [U]) -> losses [U]


class Supervised(Protocol):
    """Rows and places [U] where outputs are wanted, targets [U], the base's inputs, and within what it runs."""

    @property
    def rows(self) -> torch.Tensor: ...
    @property
    def places(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def inputs(self) -> dict[str, Any]: ...
    @property
    def layers(self) -> Callable[[], AbstractContextManager[Any]]: ...


@dataclass
class Pass:
    """A pass of the base at work: what to compute of the hidden states [U, D] at the head, and what was found there."""

    asked: Supervised
    compute: Callable[[torch.Tensor], torch.Tensor] | None = None
    hidden: torch.Tensor | None = None
    computed: torch.Tensor | None = None


class HeadAtTargets:
    """The outputs of a base at its supervised positions."""

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._from_head = FromHead(base)
        num_bytes = CUDA_CHUNK_BYTES if next(base.parameters()).is_cuda else CHUNK_BYTES
        self._chunk = max(1, num_bytes // (4 * base.config.get_text_config(decoder=True).vocab_size))  # positions
        self._pass: Pass | None = None
        self._from_head.head.register_forward_pre_hook(self._take)
        # First of all: ZeRO-3's hook, which comes later, releases the weights.
        self._from_head.head.register_forward_hook(self._compute, prepend=True)

    def losses(self, asked: Supervised, loss_of: LossOf) -> torch.Tensor:
        """Losses [U] in float32; each may depend on the logits of its own position only."""

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            trained = self._from_head.trained
            chunks = Chunks(self._from_head.logits, loss_of, asked.targets, self._chunk, trained)
            if torch.is_grad_enabled() and (hidden.requires_grad or trained):
                return LossesWithGradient.apply(hidden, chunks, *trained)
            return chunks.losses(hidden)

        return self._run(asked, compute)

    @torch.no_grad()
    def token_losses(self, asked: Supervised, places: np.ndarray, tokens: np.ndarray, loss_of: LossOf) -> torch.Tensor:
        """Losses [E] of tokens [E], each after one of the U supervised positions, whose numbers `places` [E] ascend.

        The logits of a position are computed once, however many tokens are scored there.
        """

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            losses = [hidden.new_zeros(0, dtype=torch.float32)]
            for first in range(0, len(hidden), self._chunk):
                logits = self._from_head.logits(hidden[first : first + self._chunk])
                own = slice(*np.searchsorted(places, [first, first + len(logits)]))
                at = torch.from_numpy(places[own] - first).to(hidden.device)
                losses.append(loss_of(logits[at], torch.from_numpy(tokens[own]).to(hidden.device)))
            return torch.cat(losses)

        return self._run(asked, compute)

    @torch.no_grad()
    def logits(self, asked: Supervised) -> torch.Tensor:
        """Logits [U, V] at the supervised positions, all at once; without gradient."""
        return self._run(asked, self._from_head.logits)

    def hidden(self, asked: Supervised) -> torch.Tensor:
        """What the base's head would read at the supervised positions, [U, D]."""
        return self._run(asked, None)

    def _run(self, asked: Supervised, compute: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        """What `compute` makes of the hidden states in one pass of the base; without it, the hidden states."""
        work = Pass(asked, compute)
        self._pass = work
        try:
            with asked.layers():
                self._base(**asked.inputs, use_cache=False)
        finally:
            self._pass = None
        found = work.hidden if compute is None else work.computed
        assert found is not None, "the base did not call its head"
        return found

    def _take(self, _head: nn.Module, args: tuple) -> tuple | None:
        """Before the head: take its inputs at the supervised positions, and leave it none to compute."""
        work = self._pass
        if work is None:  # generation wants the head as it is
            return None
        every, *rest = args
        hidden = every[work.asked.rows, work.asked.places]
        work.hidden = hidden
        return (hidden[None, :0].detach(), *rest)

    def _compute(self, _head: nn.Module, _args: tuple, _output: torch.Tensor) -> None:
        """After the head, while its weights are there."""
        work = self._pass
        if work is not None and work.hidden is not None and work.compute is not None:
            work.computed = work.compute(work.hidden)


class Chunks:
    """The losses of one pass, or their gradients, a chunk of targets at a time."""

    def __init__(
        self,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        loss_of: LossOf,
        targets: torch.Tensor,
        size: int,
        trained: Sequence[nn.Parameter] = (),
    ):
        """`trained`: the head's own parameters that are."""
        self._logits_of = logits_of
        self._loss_of = loss_of
        self._targets = targets
        self._size = size
        self._trained = trained

    def losses(self, hidden: torch.Tensor) -> torch.Tensor:
        """[U, D] -> [U] in float32."""
        found = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for rows, part in self._split(hidden):
            found[rows] = self._loss_of(self._logits_of(part), self._targets[rows])
        return found

    def losses_and_gradients(
        self, hidden: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Losses [U], and `scale` times the gradient of each with respect to its own hidden state, [U, D].

        Last, `scale` times the gradient of the losses' sum with respect to each trained parameter.
        """
        found = hidden.new_zeros(len(hidden), dtype=torch.float32)
        gradients = torch.empty_like(hidden)
        of_trained = [torch.zeros_like(parameter) for parameter in self._trained]
        for rows, part in self._split(hidden):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                losses = self._loss_of(self._logits_of(part), self._targets[rows])
                gradient, *others = torch.autograd.grad(losses.sum() * scale, [part, *self._trained])
            for total, other in zip(of_trained, others, strict=True):
                total.add_(other)
            gradients[rows] = gradient
            found[rows] = losses.detach()
        return found, gradients, of_trained

    def _split(self, hidden: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        starts = range(0, len(hidden), self._size)
        return [(slice(start, start + self._size), hidden[start : start + self._size]) for start in starts]


class LossesWithGradient(torch.autograd.Function):
    """Losses [U] of hidden states [U, D] whose gradient is made in forward: each depends on its own row alone.

    Those of `trained`, the head's own parameters, are sums over the rows. They are right because a trained head belongs
    to the only member, whose rows all weigh the same in a step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, chunks: Chunks, *trained: nn.Parameter) -> torch.Tensor:
        # The sum over rows would leave float16 with it.
        ctx.scale = FP16_SCALE if hidden.dtype == torch.float16 and not trained else 1.0
        losses, gradients, of_trained = chunks.losses_and_gradients(hidden, ctx.scale)
        ctx.save_for_backward(gradients, *of_trained)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradients, *of_trained = ctx.saved_tensors
        # In float32: under fp16 the loss scale is in `grad_losses`, and an overflow has to be seen in the product.
        scaled = gradients * (grad_losses / ctx.scale)[:, None]
        weight = grad_losses[:1].sum()  # 0 of a rank that idles
        return scaled.to(gradients.dtype), None, *(gradient * (weight / ctx.scale) for gradient in of_trained)
