"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): the virtual tokens' vectors are the parameters themselves.

Shapes: P virtual tokens, D width.
"""

import torch
from torch import nn

from ptune_dist.prompts.method import BaseFacts, Contribution, Method, Options, PeftAdapter
from ptune_dist.prompts.start import Start


class PromptTuning(Method):
    """P trainable vectors of width D."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.num_virtual_tokens = len(vectors)
        self.virtual_tokens = nn.Parameter(vectors.detach().float().clone())

    @classmethod
    def build(cls, options: Options, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "PromptTuning":
        return cls(start.vectors(num_virtual_tokens, base.width))

    def forward(self) -> Contribution:
        return Contribution(vectors=self.virtual_tokens)

    def plain(self) -> dict[str, torch.Tensor]:
        return {"virtual_tokens": self.virtual_tokens.detach()}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        settings = {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
        }
        return PeftAdapter(plain["virtual_tokens"], settings)
