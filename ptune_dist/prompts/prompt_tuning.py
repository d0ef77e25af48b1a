"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): the virtual tokens' vectors are the parameters themselves."""

import torch
from torch import nn


class PromptTuning(nn.Module):
    """P trainable vectors of width D."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        # A number apart: under ZeRO-3 a look at the parameter gathers it, which every rank would have to do at once.
        self.num_virtual_tokens = len(vectors)
        self.virtual_tokens = nn.Parameter(vectors.detach().float().clone())

    def forward(self) -> torch.Tensor:
        """The input vectors [P, D]. A copy: ZeRO-3 takes the parameter's own storage back when this returns."""
        return self.virtual_tokens.clone()
