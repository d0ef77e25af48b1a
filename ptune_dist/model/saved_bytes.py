"""What a pass keeps for backward, measured on tensors that have shapes and no memory.

The pass is the real one, so this holds for every architecture, family and placement.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.data.batches import Batch
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.prompted_model import Contexts, PromptedModel


@dataclass
class SavedBytes:
    """Bytes that autograd keeps of one pass.

    of_layers: within each layer, its input included. inputs: the inputs of all layers, which are all that recomputation
    keeps of them. outside: of embeddings and head, without the logits. contexts: keys/values of the contexts. largest:
    the largest tensor of a layer.
    """

    of_layers: list[int]
    inputs: int = 0
    outside: int = 0
    contexts: int = 0
    largest: int = 0


@dataclass
class Recorder:
    """Counts each storage once, in the layer that first saves it; parameters and logits are not counted."""

    counted: SavedBytes
    ignored: set[int]
    vocabulary: int
    layer: int | None = None
    kept: dict[int, Any] = field(default_factory=dict)  # by storage; they live on so that no address is used twice

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        is_of_logits = self.layer is None and tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary
        if key in self.kept or key in self.ignored or is_of_logits:
            return tensor
        self.kept[key] = storage
        if self.layer is None:
            self.counted.outside += storage.nbytes()
        else:
            self.counted.of_layers[self.layer] += storage.nbytes()
            self.counted.largest = max(self.counted.largest, storage.nbytes())
        return tensor


def measure_pass(
    build_model: Callable[[PreTrainedModel], PromptedModel], base: PreTrainedModel, batch: Batch
) -> SavedBytes:
    """What a pass of a batch keeps. `base` has no memory, and `build_model` puts the prompts over a copy of it."""
    own = copy.deepcopy(base)
    with FakeTensorMode(allow_non_fake_inputs=True):
        own.to_empty(device="cpu")
        model = build_model(own)
        layers = layers_of(own)
        parameters = {parameter.untyped_storage()._cdata for parameter in own.parameters()}
        vocabulary = getattr(own.config.get_text_config(decoder=True), "vocab_size", 0)
        recorder = Recorder(SavedBytes([0] * len(layers)), parameters, vocabulary)
        batch = hold_contexts(model, batch, recorder.counted)
        for number, layer in enumerate(layers):
            watch_layer(layer, number, recorder)
        with saved_tensors_hooks(recorder.save, lambda tensor: tensor):
            losses = model.losses(batch)
        del losses
    return recorder.counted


def hold_contexts(model: PromptedModel, batch: Batch, counted: SavedBytes) -> Batch:
    """The batch with its contexts, of which those that are equal are computed once."""
    distinct = {tokens.tobytes(): tokens for tokens in batch.contexts if len(tokens)}
    if not distinct:
        return batch
    passed = model.read_contexts(Contexts(list(distinct.values()), batch.pad_id))
    counted.contexts = sum(tensor.nbytes for tensors in passed for tensor in tensors)
    wrapped = [KeysValues(*tensors) if len(tensors) == 2 else tensors[0] for tensors in passed]
    held = {key: (value,) for key, value in zip(distinct, wrapped, strict=True)}
    return batch.with_held([held.get(tokens.tobytes(), ()) for tokens in batch.contexts])


def watch_layer(layer: nn.Module, number: int, recorder: Recorder) -> None:
    """Have the recorder know while this layer computes."""

    def begin(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        recorder.layer = number
        given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.requires_grad]
        recorder.counted.inputs += sum(value.nbytes for value in given)

    def end(*_: Any) -> None:
        recorder.layer = None

    layer.register_forward_pre_hook(begin, with_kwargs=True)
    layer.register_forward_hook(end)
