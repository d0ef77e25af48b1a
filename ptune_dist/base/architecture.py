"""What loading a base needs to know of its family; `families/` has the classes that say it."""

import inspect
from collections.abc import Collection
from typing import Any, ClassVar

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ptune_dist.errors import UserError


class Architecture:
    """How bases of one family are made and checked, and which of their parameters are trained."""

    name: ClassVar[str]
    auto_class: ClassVar[Any]  # transformers loads such a base as this
    architectures: ClassVar[Collection[str]]  # model types that transformers can load so

    def knows(self, shape: PretrainedConfig) -> bool:
        """Whether transformers, or a class that the user has registered with it, can load this architecture."""
        registered = getattr(self.auto_class, "_model_mapping", {})
        return shape.model_type in self.architectures or type(shape) in registered

    def prepare_shape(self, shape: PretrainedConfig, labels: list[str] | None) -> None:
        """Change what must be set before the model is made. `labels`: those that a classifier tells apart."""

    def check_model(self, model: PreTrainedModel, path: str) -> None:
        """Raise UserError for a model that cannot be given input vectors in place of tokens."""
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise UserError(self.describe_no_vectors(model, path))

    def describe_no_vectors(self, model: PreTrainedModel, path: str) -> str:
        return f"model.path: {path}: transformers' {model.config.model_type} models cannot continue from input vectors"

    def trained_names(self, model: PreTrainedModel, new: list[str]) -> set[str]:
        """Parameters that are trained with the prompt; `new` are those that no file holds."""
        return set()

    def may_start_anew(self, model: PreTrainedModel, name: str) -> bool:
        """Whether a parameter may be absent from the files."""
        return False

    def may_be_left_out(self, model: PreTrainedModel, stored: str) -> bool:
        """Whether a stored tensor that the model lacks may be ignored."""
        return False

    def generation_config(self, shape: PretrainedConfig) -> GenerationConfig | None:
        """Answers depend on our settings, not on what a base's folder suggests."""
        return GenerationConfig()


def model_types(shape: PretrainedConfig) -> list[str]:
    """The model type of a shape and those of the classes that it derives from: a user's own class has its own type."""
    return [shape.model_type, *(kind.model_type for kind in type(shape).__mro__ if hasattr(kind, "model_type"))]
