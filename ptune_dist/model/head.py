"""The head of a language model at supervised positions alone, a chunk of them at a time.

Floor 2. No [B, T, V] tensor exists: the choice is made at the door of the base's own head, so that whatever a base does
after it (scaling, soft caps) still happens. Shapes: B rows, T tokens, U supervised tokens, D width, V vocabulary.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_BYTES = 1 << 26  # of float32 logits


class Bypass(nn.Module):
    """Stands where a base computes its last hidden state, when that is known already."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self._hidden = hidden

    def forward(self, *_args, **_inputs) -> "Bypassed":
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
    """Losses of a base's supervised positions."""

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._selected, self._is_chunked = None, False  # places whose losses are wanted
        self._hidden = None  # of all of them, where they are more than a chunk
        self._known = None  # of the chunk at work
        self._chunk = max(1, CHUNK_BYTES // (4 * base.config.get_text_config(decoder=True).vocab_size))
        # Below this module lie all layers; T5's class has its decoder there.
        inner = base.base_model_prefix
        self._inner = inner if inner in base._modules else "decoder"
        base.get_output_embeddings().register_forward_pre_hook(self._select)

    def losses(
        self, rows: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, *, most_targets: int, **inputs
    ) -> torch.Tensor:
        """Negative log-likelihood [U] in float32 of `targets` [U] at positions `places` [U] of rows `rows` [U].

        `inputs` are the base's own. With more than a chunk of targets, logits are computed again in backward.
        `most_targets` is the largest U of any rank: where the base is sharded, all run the head as many times.
        """
        num_chunks = math.ceil(max(most_targets, len(targets)) / self._chunk)
        self._selected, self._is_chunked = (rows, places), num_chunks > 1
        try:
            logits = self._base(**inputs, use_cache=False).logits[0]
            if self._hidden is None:
                return cross_entropy(logits.float(), targets, reduction="none")
            hidden = self._hidden
        finally:
            self._selected = self._hidden = None
        pieces = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        return torch.cat([checkpoint(self._losses_of, *piece, use_reentrant=False) for piece in pieces])

    def _select(self, _head: nn.Module, args: tuple) -> tuple | None:
        if self._known is not None:
            return (self._known[None], *args[1:])
        if self._selected is None:  # generation wants the head as it is
            return None
        hidden, *rest = args
        hidden = hidden[self._selected]
        if self._is_chunked:
            self._hidden, hidden = hidden, hidden[:1]
        return (hidden[None], *rest)

    def _losses_of(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The base once more, without its layers: what it does to its logits is its own business."""
        modules, inner = self._base._modules, self._base._modules[self._inner]
        given = hidden.detach()[None]
        inputs = {"inputs_embeds": given}
        if self._base.config.is_encoder_decoder:
            inputs = {"encoder_outputs": (given,), "decoder_inputs_embeds": given}
        modules[self._inner], self._known = Bypass(given), hidden
        try:
            logits = self._base(**inputs, use_cache=False).logits[0]
        finally:
            modules[self._inner], self._known = inner, None
        return cross_entropy(logits.float(), targets, reduction="none")
