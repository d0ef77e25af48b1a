"""Late prompt tuning (Liu et al. 2022, arXiv:2210.11292): virtual tokens that enter in the middle of the base's layers.

The layers below read a row without them, so they need no gradient, and what they leave of a row is computed once.
Shapes: P virtual tokens, H hidden size.
"""

import torch
from pydantic import Field
from torch import nn

from ptune_dist.prompts.method import (
    BaseFacts,
    Contribution,
    Method,
    Options,
    PeftAdapter,
    TrainingDefaults,
    check_start_layer,
)
from ptune_dist.prompts.start import NOTHING, Start, random_vectors


class LatePromptOptions(Options):
    """Where the virtual tokens enter."""

    start_layer: int | None = Field(default=None, ge=1)
    """The layer, counted from 0, whose input the virtual tokens stand in. Left out: the middle one, such as layer 12 of
    24, the paper's choice for RoBERTa-large. Of an encoder-decoder, a layer of its encoder."""


class LatePrompt(Method):
    """P trainable vectors of the width of hidden states."""

    options_type = LatePromptOptions
    placements = ("prefix", "infix", "template", "encoder")
    starts = ("text", "rows", "random", "file")
    default_start = "rows"
    default_training = TrainingDefaults(0.01)

    def __init__(self, vectors: torch.Tensor, start_layer: int):
        super().__init__()
        self.num_virtual_tokens = len(vectors)
        self.start_layer = start_layer
        self.reads_layer = start_layer
        self.late_tokens = nn.Parameter(vectors.detach().float().clone())

    @classmethod
    def build(cls, options: LatePromptOptions, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "LatePrompt":
        middle = max(1, (base.num_first_layers or 0) // 2)
        layer = check_start_layer(options.start_layer or middle, base, "prompt.start_layer")
        assert base.hidden_size is not None, "a base with layers has a hidden size"
        shape = (num_virtual_tokens, base.hidden_size)
        if start.kind == "file":
            return cls(start.tensors({"late_tokens": shape})["late_tokens"], layer)
        if start.kind == "random":
            return cls(random_vectors(*shape, start.generator), layer)
        prompt = cls(torch.zeros(shape), layer)
        if start.kind != NOTHING:
            prompt.start_tokens = start.tokens(num_virtual_tokens)
        return prompt

    @torch.no_grad()
    def begin_from(self, *computed: torch.Tensor) -> None:
        (hidden,) = computed
        self.late_tokens.copy_(hidden)

    @classmethod
    def enters_late(cls, options: LatePromptOptions) -> bool:
        return True

    def forward(self) -> Contribution:
        return Contribution(vectors=self.late_tokens, start_layer=self.start_layer)

    def plain(self) -> dict[str, torch.Tensor]:
        return {"late_tokens": self.late_tokens.detach()}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        raise NotImplementedError("PEFT has no method whose virtual tokens enter at a later layer")
