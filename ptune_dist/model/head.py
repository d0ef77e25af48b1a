"""The head of a language model at supervised positions only, a chunk of them at a time.

No tensor [B, T, V] exists: positions are selected at the input of the base's own head, so that what a base does after
it (scaling, soft caps) still happens. Shapes: B rows, T tokens, U supervised positions, E tokens that are scored,
D width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_BYTES = 1 << 26  # of float32 logits


LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits [U, V], targets [U]) -> losses [U]


class Supervised(Protocol):
    """Rows and places [U] where outputs are wanted, targets [U], and the base's inputs."""

    @property
    def rows(self) -> torch.Tensor: ...
    @property
    def places(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def inputs(self) -> dict[str, Any]: ...


class Bypass(nn.Module):
    """Stands where a base computes its last hidden state, when that is known already."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self._hidden = hidden

    def forward(self, *_args: Any, **_inputs: Any) -> "Bypassed":
        return Bypassed(self._hidden)

    @property
    def decoder(self) -> "Bypass":  # OPT calls its model's decoder
        return self


class Bypassed:
    """An output of transformers in which nothing but the last hidden state is there."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, _name: str) -> None:
        return None


class HeadAtTargets:
    """The outputs of a base at its supervised positions."""

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._selected: tuple[torch.Tensor, torch.Tensor] | None = None  # rows and places whose outputs are wanted
        self._is_held = False  # keep their hidden states and compute logits later, or never
        self._hidden: torch.Tensor | None = None  # those hidden states
        self._known: torch.Tensor | None = None  # of the chunk at work
        self._chunk = max(1, CHUNK_BYTES // (4 * base.config.get_text_config(decoder=True).vocab_size))
        # Below this module are all layers; T5's class has its decoder there.
        inner = base.base_model_prefix
        self._inner = inner if inner in base._modules else "decoder"
        head = base.get_output_embeddings()
        assert head is not None, "a base that writes text has a head over its vocabulary"
        head.register_forward_pre_hook(self._select)

    def losses(self, asked: Supervised, loss_of: LossOf, *, most_targets: int) -> torch.Tensor:
        """Losses [U] in float32.

        With more than a chunk of targets, logits are computed again in backward. `most_targets` is the largest U of any
        rank: where the base is sharded, all ranks run the head equally often.
        """
        num_chunks = math.ceil(max(most_targets, len(asked.targets)) / self._chunk)
        if num_chunks <= 1:
            return loss_of(self._run(asked, is_held=False), asked.targets)
        hidden = self.hidden(asked)
        pieces = zip(hidden.tensor_split(num_chunks), asked.targets.tensor_split(num_chunks), strict=True)
        return torch.cat(
            [checkpoint(self._losses_of, *piece, loss_of, use_reentrant=False) for piece in pieces]  # type: ignore
        )

    @torch.no_grad()
    def token_losses(
        self, asked: Supervised, places: np.ndarray, tokens: np.ndarray, loss_of: LossOf, *, most_targets: int
    ) -> torch.Tensor:
        """Losses [E] of tokens [E], each after one of the U supervised positions, whose numbers `places` [E] ascend.

        The logits of a position are computed once, however many tokens are scored there. `most_targets` as in `losses`.
        """
        hidden = self.hidden(asked)
        num_chunks = max(1, math.ceil(max(most_targets, len(hidden)) / self._chunk))
        losses: list[torch.Tensor] = []
        first = 0
        for chunk in hidden.tensor_split(num_chunks):
            own = slice(*np.searchsorted(places, [first, first + len(chunk)]))
            at = torch.from_numpy(places[own] - first).to(hidden.device)
            wanted = torch.from_numpy(tokens[own]).to(hidden.device)
            losses.append(self._losses_of(chunk, wanted, lambda logits, targets, at=at: loss_of(logits[at], targets)))
            first += len(chunk)
        return torch.cat(losses)

    @torch.no_grad()
    def logits(self, asked: Supervised) -> torch.Tensor:
        """Logits [U, V] at the supervised positions, all at once; without gradient."""
        return self._run(asked, is_held=False)

    def hidden(self, asked: Supervised) -> torch.Tensor:
        """What the base's head would read at the supervised positions, [U, D]."""
        self._run(asked, is_held=True)
        hidden = self._hidden
        self._hidden = None
        assert hidden is not None, "the base did not call its head"
        return hidden

    def _run(self, asked: Supervised, *, is_held: bool) -> torch.Tensor:
        """Logits [U, V]; where they are held, of the first position only."""
        self._selected = (asked.rows, asked.places)
        self._is_held = is_held
        self._hidden = None
        try:
            return self._base(**asked.inputs, use_cache=False).logits[0]
        finally:
            self._selected = None

    def _select(self, _head: nn.Module, args: tuple) -> tuple | None:
        """Before the base's head: the hidden states that it reads instead of all of them."""
        if self._known is not None:
            return (self._known[None], *args[1:])
        if self._selected is None:  # generation wants the head as it is
            return None
        hidden, *rest = args
        hidden = hidden[self._selected]
        if self._is_held:
            self._hidden = hidden
            hidden = hidden[:1]
        return (hidden[None], *rest)

    def _losses_of(self, hidden: torch.Tensor, targets: torch.Tensor, loss_of: LossOf) -> torch.Tensor:
        """The base once more, without its layers: what it does to its logits is its own business."""
        modules = self._base._modules
        inner = modules[self._inner]
        given = hidden.detach()[None]
        inputs: dict[str, Any] = {"inputs_embeds": given}
        if self._base.config.is_encoder_decoder:
            inputs = {"encoder_outputs": (given,), "decoder_inputs_embeds": given}
        modules[self._inner] = Bypass(given)
        self._known = hidden
        try:
            logits = self._base(**inputs, use_cache=False).logits[0]
        finally:
            modules[self._inner] = inner
            self._known = None
        return loss_of(logits, targets)
