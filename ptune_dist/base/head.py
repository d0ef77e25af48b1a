"""The head of a language model at supervised positions alone, a chunk of them at a time.

Floor 2. No [B, T, V] tensor exists: the choice is made at the door of the base's own head, so that whatever a base does
after it (scaling, soft caps) still happens. Shapes: B rows, T tokens, U supervised tokens, D width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

CHUNK_BYTES = 1 << 26  # of float32 logits


class GivenHidden(nn.Module):
    """Stands where a base computes its last hidden state, which is known: the head and what follows run on it."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self._output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    def forward(self, *_args, **_inputs) -> BaseModelOutputWithPastAndCrossAttentions:
        return self._output


class HeadAtTargets:
    """Losses of a base's supervised positions."""

    def __init__(self, base: PreTrainedModel):
        self._base, self._selected, self._hidden = base, None, None
        self._chunk = max(1, CHUNK_BYTES // (4 * base.config.get_text_config(decoder=True).vocab_size))
        # Below this module lie all layers; T5's class has its decoder there.
        inner = base.base_model_prefix
        self._inner = inner if inner in base._modules else "decoder"
        base.get_output_embeddings().register_forward_pre_hook(self._select)

    def losses(self, rows: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, **inputs) -> torch.Tensor:
        """Negative log-likelihood [U] in float32 of `targets` [U] at positions `places` [U] of rows `rows` [U].

        `inputs` are the base's own. With more than a chunk of targets, logits are computed again in backward.
        """
        self._selected = rows, places
        try:
            logits = self._base(**inputs, use_cache=False).logits[0]
            if self._hidden is None:
                return cross_entropy(logits.float(), targets, reduction="none")
            hidden = self._hidden
        finally:
            self._selected = self._hidden = None
        pieces = zip(hidden.split(self._chunk), targets.split(self._chunk), strict=True)
        return torch.cat([checkpoint(self._losses_of, *piece, use_reentrant=False) for piece in pieces])

    def _select(self, _head: nn.Module, args: tuple) -> tuple | None:
        if self._selected is None:  # generation wants the head as it is
            return None
        hidden, *rest = args
        hidden = hidden[self._selected]
        if len(hidden) > self._chunk:
            self._hidden, hidden = hidden, hidden[:1]
        return (hidden[None], *rest)

    def _losses_of(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self._given(hidden[None]) as inputs:
            logits = self._base(**inputs, use_cache=False).logits[0]
        return cross_entropy(logits.float(), targets, reduction="none")

    @contextlib.contextmanager
    def _given(self, hidden: torch.Tensor) -> Iterator[dict]:
        modules, inner = self._base._modules, self._base._modules[self._inner]
        modules[self._inner] = GivenHidden(hidden)
        try:
            if self._inner == "decoder":
                yield {"encoder_outputs": (hidden,), "decoder_inputs_embeds": hidden}
            else:
                yield {"inputs_embeds": hidden}
        finally:
            modules[self._inner] = inner
