"""A trained run as an ordinary model of transformers: the base with the tensors in place that a method has trained."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ptune_dist.base.load import fill_whole
from ptune_dist.base.source import load_shape
from ptune_dist.common.files import share_as_folder
from ptune_dist.errors import UserError
from ptune_dist.prompts.export import name_other_export
from ptune_dist.prompts.start import BASE, VALUE_HEAD
from ptune_dist.prompts.trainable_tokens import INDICES, ROWS
from ptune_dist.run.parts import open_base_of
from ptune_dist.run.reading import Reading


def export_model(reading: Reading, tensors: dict[str, torch.Tensor], out: Path) -> None:
    """Write a folder for `from_pretrained`, in the dtype of the run. The whole base is in memory. Raises UserError."""
    if any(name.startswith(VALUE_HEAD) for name in tensors):
        raise UserError("--to model: this run was trained with a head that answers numbers, which no model has")
    trained = {name.removeprefix(BASE): tensor for name, tensor in tensors.items() if name.startswith(BASE)}
    rows = tensors.get(ROWS)
    if len(trained) + 2 * (rows is not None) < len(tensors):
        method = reading.config.prompt.method
        raise UserError(f"--to model: {method} trains more than the base has{name_other_export(tensors)}")
    model = fill_whole(open_base_of(whole_precision(reading)))
    put_in(model, trained, getattr(torch, reading.config.model.dtype))
    if rows is not None:
        embeddings = model.get_input_embeddings().get_parameter("weight")
        embeddings.data[tensors[INDICES].long()] = rows.to(embeddings.dtype)
    shape = load_shape(reading.config.model.path)  # what is set for training is no part of the model
    reading.family.prepare_shape(shape, reading.config.data.labels)
    shape.dtype = getattr(torch, reading.config.model.dtype)
    shape.architectures = [type(model).__name__]
    if not model.all_tied_weights_keys:
        shape.tie_word_embeddings = False
    try:
        model.save_pretrained(out)
        for file in out.glob("*.safetensors"):
            share_as_folder(file)
        shape.save_pretrained(out)
        reading.tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from None


def whole_precision(reading: Reading) -> Reading:
    """The same run over a base that is not quantized, which transformers could not load."""
    model = reading.config.model.model_copy(update={"quantization": "none", "int8_include": []})
    return replace(reading, config=reading.config.model_copy(update={"model": model}))


@torch.no_grad()
def put_in(model: PreTrainedModel, trained: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Set the trained parameters of a base; each is of the dtype that the others have."""
    for name, tensor in trained.items():
        parameter = model.get_parameter(name)
        parameter.data = tensor.to(dtype)
