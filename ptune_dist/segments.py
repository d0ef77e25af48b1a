"""Placement and the pass: batch + prompt + base -> negative log-likelihood per row.

Floor 3. Shapes: B rows, T tokens, U target tokens, P virtual tokens, D width, V vocabulary, C labels, N supervised
tokens of the micro-batch.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.data.batches import Batch


class PromptedModel(nn.Module):
    """A frozen base that reads [virtual tokens, input], and the prompt that is trained.

    A causal base reads the target after them, a seq2seq base's decoder writes it, an encoder's head (trained too) names
    the label.
    """

    def __init__(self, base: PreTrainedModel, prompt: nn.Module, family: str):
        super().__init__()
        self.base, self.prompt, self.family = base, prompt, family
        self._selected: torch.Tensor | None = None
        if family != "encoder":
            base.get_output_embeddings().register_forward_pre_hook(self._select_positions)

    def train(self, mode: bool = True) -> "PromptedModel":
        """The prompt follows `mode`; the base never leaves eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained and stored, by name: the prompt's parameters and those of an encoder's head."""
        head = {f"head.{name}": p for name, p in self.base.named_parameters() if p.requires_grad}
        return dict(self.prompt.named_parameters()) | head

    def forward(self, batch: Batch) -> torch.Tensor:
        """Summed negative log-likelihood of each row's target, [B] in float32."""
        logits = self._target_logits(batch)
        losses = nn.functional.cross_entropy(logits.float(), batch.target_ids[batch.target_mask], reduction="none")
        rows = batch.target_mask.nonzero()[:, 0]
        return losses.new_zeros(batch.input_ids.shape[0]).index_add(0, rows, losses)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, P + T, D]: the virtual tokens before every row's embeddings."""
        vectors = self.base.get_input_embeddings()(input_ids)
        virtual = self.prompt().to(vectors.dtype)
        return torch.cat([virtual.expand(len(input_ids), -1, -1), vectors], dim=1)

    def label_logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """An encoder's logits [B, C]."""
        vectors, mask = self._read(input_ids, attention_mask)
        return self.base(inputs_embeds=vectors, attention_mask=mask).logits

    def _target_logits(self, batch: Batch) -> torch.Tensor:
        """Logits [N, V or C] of the supervised positions alone."""
        if self.family == "encoder":
            return self.label_logits(batch.input_ids, batch.attention_mask)[batch.target_mask[:, 0]]
        vectors, mask = self._read(batch.input_ids, batch.attention_mask)
        if self.family == "seq2seq":
            before = nn.functional.pad(batch.target_ids[:, :-1], (1, 0), value=self.base.config.decoder_start_token_id)
            return self._logits_at(
                batch.target_mask, inputs_embeds=vectors, attention_mask=mask, decoder_input_ids=before
            )
        # Token t of the text stands at position P + t, so position P + t - 1 predicts it.
        num_virtual = vectors.shape[1] - batch.input_ids.shape[1]
        predicts = nn.functional.pad(batch.target_mask, (num_virtual - 1, 1), value=False)
        return self._logits_at(predicts, inputs_embeds=vectors, attention_mask=mask)

    def _read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [B, P + T, D] and their mask [B, P + T]."""
        vectors = self.embed(input_ids)
        num_virtual = vectors.shape[1] - input_ids.shape[1]
        return vectors, nn.functional.pad(attention_mask, (num_virtual, 0), value=1)

    def _logits_at(self, positions: torch.Tensor, **inputs) -> torch.Tensor:
        """Logits [N, V] at the True places of `positions` [B, positions of the head's input] and nowhere else.

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
