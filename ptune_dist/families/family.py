"""The interface of a family: how a base reads an example, and what it answers."""

from typing import ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptune_dist.base.architecture import Architecture
from ptune_dist.data.framing import Framing, NumberTargets, Targets, TextTargets
from ptune_dist.model.prompted_model import PromptedModel


class Family(Architecture):
    """Everything that depends on the family. One file each: this class, its PromptedModel, and a line in FAMILIES."""

    model_class: ClassVar[type[PromptedModel]]
    placements: ClassVar[tuple[str, ...]]  # of virtual tokens
    peft_task: ClassVar[str]  # PEFT's task_type
    trains_head: ClassVar[bool] = False  # a classification head, one for the base: no sweeps
    shares_leads: ClassVar[bool] = False  # contexts that begin alike are computed once
    has_contexts: ClassVar[bool] = True

    def is_own(self, shape: PretrainedConfig) -> bool:
        """Whether a base of this shape belongs to this family where `model.family` is auto."""
        raise NotImplementedError

    def frame_text(self) -> Framing:
        """How an input is framed by the tokenizer's special tokens."""
        raise NotImplementedError

    def build_targets(
        self, objective_target: str, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None, append_eos: bool
    ) -> Targets:
        """What is supervised of a row: text, unless the objective wants numbers."""
        if objective_target == "number":
            return NumberTargets()
        return TextTargets(tokenizer, append_eos=append_eos, starts=self.frame_text().starts_target)

    def check_contexts(self, model: PreTrainedModel, placement: str) -> None:
        """Raise UserError where a placement needs contexts that this base cannot keep."""

    def context_bytes_per_token(self, shape: PretrainedConfig, dtype: torch.dtype) -> int:
        """What is kept of one token of a context."""
        raise NotImplementedError
