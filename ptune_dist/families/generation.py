"""Whether and how transformers' own `generate` continues from input vectors."""

import inspect
from typing import Any, cast

import torch
from transformers import PreTrainedModel

VECTORS = "inputs_embeds"
PREPARE = "prepare_inputs_for_generation"


def generates_from_vectors(kind: type[PreTrainedModel]) -> bool:
    """Whether `generate` can take input vectors; Falcon-H1 and others hand all inputs on to the class above."""
    for owner in kind.__mro__:
        prepare = vars(owner).get(PREPARE)
        if prepare is None:
            continue
        parameters = inspect.signature(prepare).parameters
        if VECTORS in parameters:
            return True
        hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if not hands_on or "super()." not in inspect.getsource(prepare):
            return False
    return False


def name_vectors(model: PreTrainedModel) -> None:
    """Have a model that hands all inputs on name input vectors, which is where `generate` looks for them."""
    prepare = getattr(model, PREPARE, None)
    if prepare is None or VECTORS in inspect.signature(prepare).parameters or not generates_from_vectors(type(model)):
        return

    # `generate` knows by the name `kwargs` that what the model's forward takes may be given.
    def prepare_with_vectors(input_ids: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    cast(Any, model).prepare_inputs_for_generation = prepare_with_vectors
