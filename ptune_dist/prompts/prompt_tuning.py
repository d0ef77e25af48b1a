"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): the virtual tokens' vectors are the parameters themselves.

With the residual reparameterization of `residual.py`, a network adds to them, which is folded away for serving.
Shapes: P virtual tokens, D width.
"""

import torch
from torch import nn

from ptune_dist.prompts.method import BaseFacts, Contribution, Method, PeftAdapter, TrainingDefaults
from ptune_dist.prompts.residual import PREFIX, ResidualMlp, ResidualOptions, build_residual
from ptune_dist.prompts.start import Start


class PromptTuning(Method):
    """P trainable vectors of width D."""

    options_type = ResidualOptions
    default_training = TrainingDefaults(0.3, "Lester et al. 2021, on T5")
    default_training_of = {
        "encoder": TrainingDefaults(0.01, "on encoders, which train a head too, Liu et al. 2022 (arXiv:2110.07602)")
    }

    virtual_tokens: nn.Parameter
    embedding: nn.Parameter  # in its place where a network adds to it; a stored prompt's virtual_tokens are the sum

    def __init__(self, vectors: torch.Tensor, residual: ResidualMlp | None = None):
        super().__init__()
        self.num_virtual_tokens = len(vectors)
        trained = nn.Parameter(vectors.detach().float().clone())
        self.register_parameter("virtual_tokens" if residual is None else "embedding", trained)
        self.residual = residual

    @classmethod
    def build(cls, options: ResidualOptions, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "PromptTuning":
        residual = build_residual(num_virtual_tokens, base.width, options, start.seed)
        if residual is None or not start.holds(PREFIX):
            return cls(start.vectors(num_virtual_tokens, base.width), residual)
        prompt = cls(torch.zeros(num_virtual_tokens, base.width), residual)
        prompt.load_state_dict(start.tensors({name: tuple(p.shape) for name, p in prompt.named_parameters()}))
        return prompt

    def forward(self) -> Contribution:
        return Contribution(vectors=self._fold())

    def _fold(self) -> torch.Tensor:
        """[P, D]."""
        return self.virtual_tokens if self.residual is None else self.residual(self.embedding)

    @torch.no_grad()
    def plain(self) -> dict[str, torch.Tensor]:
        return {"virtual_tokens": self._fold().detach()}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        settings = {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
        }
        return PeftAdapter(plain["virtual_tokens"], settings)
