"""Partial tuning: some of the base's own tensors are trained, and there is no prompt.

These are baselines: they show what a prompt gives up. What is trained are float32 copies that stand in the base's place
in every pass; checkpoints hold them alone, and the base's files stay as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.layers import layer_stacks
from ptune_dist.base.trained import choose_parameters, parameters_of_head
from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, BaseTuning, Options, PeftAdapter, TrainingDefaults
from ptune_dist.prompts.start import Start

DEFAULT_SHARE = 0.25  # of the layers: Lee, Tang and Lin 2019 (arXiv:1911.03090) reach 90% of full quality with it


class PartialTuning(BaseTuning):
    """What the methods of this file share: the tensors are in the base, so there is nothing here."""

    trains_base = True
    default_training = TrainingDefaults(1e-4, "tried on tiny bases", 0.1)

    @classmethod
    def build(cls, options: Any, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "PartialTuning":
        prompt = cls()
        if start.kind == "file":
            prompt.base_start = start.base_tensors()
        return prompt

    def plain(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        raise UserError("--to peft: PEFT has no such method: use --to model")


class LastLayersOptions(Options):
    """The option of `last_layers`."""

    num_layers: int | None = Field(default=None, gt=0)
    """How many layers are trained, counted from the last; of a seq2seq base, its decoder's. Where left out, a quarter
    of them."""


class LastLayers(PartialTuning):
    """The last layers, whole."""

    default_training = TrainingDefaults(1e-4, "tried on tiny bases", 0.1)
    default_training_of = {"encoder": TrainingDefaults(5e-5, "Devlin et al. 2019", 0.1)}
    options_type = LastLayersOptions

    @classmethod
    def choose_trained(cls, options: LastLayersOptions, base: PreTrainedModel) -> set[str]:
        layers = list(layer_stacks(base)[-1])
        number = options.num_layers or max(1, round(DEFAULT_SHARE * len(layers)))
        if number > len(layers):
            raise ValueError(f"prompt.num_layers: {number} is more than the base has, {len(layers)}")
        inside = {id(module) for layer in layers[-number:] for module in layer.modules()}
        return choose_parameters(base, lambda module, _: id(module) in inside)


class BiasOnly(PartialTuning):
    """All biases, of norms too: BitFit (Ben Zaken et al. 2022, arXiv:2106.10199), which trains at 1e-4 to 1e-2."""

    default_training = TrainingDefaults(1e-3, "Ben Zaken et al. 2022: 1e-4 to 1e-2", 0.1)

    @classmethod
    def choose_trained(cls, options: Options, base: PreTrainedModel) -> set[str]:
        return choose_some(base, "bias_only", "biases", lambda _, leaf: leaf == "bias" or leaf.endswith("_bias"))


class NormsOnly(PartialTuning):
    """Weights and biases of all norms (Qi et al. 2022; Zhao et al. 2023, arXiv:2312.11420)."""

    default_training = TrainingDefaults(1e-3, "tried on tiny bases", 0.1)

    @classmethod
    def choose_trained(cls, options: Options, base: PreTrainedModel) -> set[str]:
        return choose_some(base, "norms_only", "norms with weights", lambda module, _: is_norm(module))


class HeadOnly(PartialTuning):
    """The output head; of a base that ties it to its embeddings, these stay and the head has weights of its own.

    An encoder's classification head is trained with every method, so here it is what remains.
    """

    @classmethod
    def choose_trained(cls, options: Options, base: PreTrainedModel) -> set[str]:
        return parameters_of_head(base)


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def choose_some(base: PreTrainedModel, method: str, what: str, is_chosen: Callable[[nn.Module, str], bool]) -> set[str]:
    """Raises ValueError where a base has none."""
    found = choose_parameters(base, is_chosen)
    if not found:
        raise ValueError(f"prompt.method: {method} trains {what}, and {base.config.model_type} models have none")
    return found
