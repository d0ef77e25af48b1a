"""Placement and the pass: batch + prompt + base -> negative log-likelihood per row.

Floor 3. Shapes: B rows, T tokens, P virtual tokens, D width, V vocabulary, N supervised tokens of the micro-batch.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.data.batches import Batch


class PromptedModel(nn.Module):
    """A frozen base that reads [virtual tokens, input, target], and the prompt that is trained."""

    def __init__(self, base: PreTrainedModel, prompt: nn.Module):
        super().__init__()
        self.base, self.prompt = base, prompt
        self._selected: torch.Tensor | None = None
        base.get_output_embeddings().register_forward_pre_hook(self._select_positions)

    def train(self, mode: bool = True) -> "PromptedModel":
        """The prompt follows `mode`; the base never leaves eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, batch: Batch) -> torch.Tensor:
        """Summed negative log-likelihood of each row's target tokens, [B] in float32."""
        vectors = self.embed(batch.input_ids)
        num_virtual = vectors.shape[1] - batch.input_ids.shape[1]
        mask = nn.functional.pad(batch.attention_mask, (num_virtual, 0), value=1)
        # Token t of the text stands at position P + t, so position P + t - 1 predicts it.
        predicts = nn.functional.pad(batch.target_mask, (num_virtual - 1, 1), value=False)
        logits = self._logits_at(predicts, inputs_embeds=vectors, attention_mask=mask)  # [N, V]
        losses = nn.functional.cross_entropy(logits.float(), batch.input_ids[batch.target_mask], reduction="none")
        rows = batch.target_mask.nonzero()[:, 0]
        return losses.new_zeros(batch.input_ids.shape[0]).index_add(0, rows, losses)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, P + T, D]: the virtual tokens before every row's embeddings."""
        vectors = self.base.get_input_embeddings()(input_ids)
        virtual = self.prompt().to(vectors.dtype)
        return torch.cat([virtual.expand(len(input_ids), -1, -1), vectors], dim=1)

    def _logits_at(self, positions: torch.Tensor, **inputs) -> torch.Tensor:
        """Logits [N, V] at the True places of `positions` [B, P + T] and nowhere else.

        The choice is made at the door of the base's own head, so that whatever a base does after it (scaling, soft
        caps) still happens, and no [B, T, V] tensor exists.
        """
        self._selected = positions
        try:
            return self.base(**inputs, use_cache=False).logits[0]
        finally:
            self._selected = None

    def _select_positions(self, _head: nn.Module, args: tuple) -> tuple | None:
        if self._selected is None:  # generation wants the head as it is
            return None
        hidden, *rest = args
        return (hidden[self._selected].unsqueeze(0), *rest)
