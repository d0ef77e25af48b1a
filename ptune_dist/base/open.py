"""Open a base: make the model without memory, find its weights, and say whatever is wrong. Only headers are read."""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PreTrainedModel

from ptune_dist.base.int8 import Int8Embedding, make_int8
from ptune_dist.base.loaded_weights import LoadedWeights, load_with_transformers
from ptune_dist.base.memory_check import check_room_for_copies
from ptune_dist.base.names import match_names, needs_converting, spellings, wanted_tensors
from ptune_dist.base.random_weights import RandomWeights
from ptune_dist.base.source import describe_load_error, is_local_only, load_shape
from ptune_dist.base.weight_files import WeightFiles, open_weight_files
from ptune_dist.errors import UserError
from ptune_dist.families.find import (
    AUTO_CLASS,
    POOLER,
    check_decoder_start,
    check_takes_vectors,
    find_family,
    is_outside,
    may_start_anew,
)

NUM_COMPARED = 16  # rows of tensors that should be one


class WithoutMemory(TorchFunctionMode):
    """`torch.empty`, which large parameters are made of, takes no memory: one may be larger than this host's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@dataclass
class OpenedBase:
    """A model whose parameters have shapes and no memory, and where their numbers come from."""

    model: PreTrainedModel
    family: str
    dtype: torch.dtype
    weights: WeightFiles | RandomWeights | LoadedWeights
    names: dict[str, str]  # of a parameter or buffer in the model -> in the weights
    new: list[str]  # parameters that no file holds: a new classification head's
    seed: int
    trained: set[str] = field(default_factory=set)  # parameters of an encoder's head
    note: str | None = None  # how it is loaded, where that is not the ordinary way

    def embed(self, ids: list[int]) -> torch.Tensor:
        """The input vectors [len(ids), D] in float32 of some tokens, read without the rest of the base."""
        tokens = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is tokens)
        stored = self.names[f"{name}.weight"]
        rows = torch.cat([self.weights.read_rows(stored, i, i + 1) for i in ids]).to(self.dtype)
        if isinstance(tokens, Int8Embedding):
            return rows.float()
        few = copy.copy(tokens)  # its forward may do more than look up: Gemma scales
        few._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
        few.num_embeddings, few.padding_idx = len(ids), None
        return few(torch.arange(len(ids))).float()


def open_base(
    path: str, *, family: str = "auto", dtype: torch.dtype, random_init: bool = False, seed: int = 0,
    int8: dict[str, Any] | None = None, labels: list[str] | None = None,
) -> OpenedBase:  # fmt: skip
    """Make the model without memory and find its weights; no weight is read. Raises UserError.

    `int8` holds `include` and `threshold` of `int8.make_int8`; None leaves the weights in `dtype`. `labels` are those
    that an encoder's head tells apart.
    """
    shape = load_shape(path)
    family = find_family(shape, family, path)
    if getattr(shape, "quantization_config", None):
        raise UserError(f"model.path: {path} is stored quantized: give the float base and set model.quantization=int8")
    if family == "encoder" and labels:
        shape.id2label, shape.problem_type = dict(enumerate(labels)), "single_label_classification"
    try:
        with WithoutMemory(), init_empty_weights(include_buffers=False):
            model = AUTO_CLASS[family].from_config(shape, dtype=dtype)
    except Exception as error:  # each architecture checks its own numbers
        raise UserError(describe_load_error(path, "config.json", error)) from None
    model.tie_weights()
    check_takes_vectors(model, family, path)
    check_decoder_start(model, family, path)
    opened = find_weights(model, path, family, dtype=dtype, random_init=random_init, seed=seed)
    unknown = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in opened.names]
    if unknown:
        raise UserError(f"model.path: {path}: its buffer {unknown[0]} is neither stored nor computed when it is made")
    if family == "encoder":
        opened.trained = {n for n, _ in model.named_parameters() if is_outside(model, n) or n in opened.new}
    if int8 is not None:
        make_int8(model, dtype=dtype, skip={name.rpartition(".")[0] for name in opened.trained}, **int8)
    for module in model.modules():  # T5's stacks have configs of their own
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
    if family != "encoder":
        model.generation_config = build_generation_config(model.config)
    model.eval().requires_grad_(False)
    return opened


def build_generation_config(shape: transformers.PretrainedConfig) -> GenerationConfig:
    """Answers depend on our settings, not on what a base's folder suggests; where a decoder starts is the base's."""
    start = getattr(shape, "decoder_start_token_id", None)
    return GenerationConfig(decoder_start_token_id=start) if shape.is_encoder_decoder else GenerationConfig()


def find_weights(
    model: PreTrainedModel, path: str, family: str, *, dtype: torch.dtype, random_init: bool, seed: int
) -> OpenedBase:
    """The weights for an empty model: its files', random ones, or transformers' own loader's. Raises UserError."""
    if random_init:
        wanted, aliases = wanted_tensors(model)
        shapes = {name: wanted[name] for name, _ in model.named_parameters()}
        std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
        names = {alias: name for name in shapes for alias in aliases[name]}
        return OpenedBase(model, family, dtype, RandomWeights(shapes, std=std, seed=seed), names, [], seed)
    files = open_weight_files(path, local_only=is_local_only(path))
    why = "its tensor names need converting"
    may_differ = {
        "may_start_anew": functools.partial(may_start_anew, model, family=family),
        "may_be_unused": functools.partial(may_be_unused, model, family=family),
    }
    if not needs_converting(model, files.shapes):
        names, new = match_names(model, files.shapes, path, **may_differ)
        check_ties(model, files, path)
        check_floats(model, files, names, path)
        if all(name in names or name in new for name, _ in model.named_parameters()):
            return OpenedBase(model, family, dtype, files, names, new, seed)
        why = "some of its parameters are computed, not stored"  # Marian's positions
    check_room_for_copies(sum(p.numel() * p.element_size() for p in model.parameters()), path)
    tensors = load_with_transformers(
        path, AUTO_CLASS[family].from_pretrained, dtype, may_be_unused=may_differ["may_be_unused"]
    )
    matched = match_names(model, {name: tuple(t.shape) for name, t in tensors.items()}, path, **may_differ)
    note = f"{why}: transformers loads it whole on every rank"
    return OpenedBase(model, family, dtype, LoadedWeights(tensors), *matched, seed, note=note)


def may_be_unused(model: PreTrainedModel, stored: str, family: str) -> bool:
    """Whether a stored tensor may have no place in the model: it belongs to an encoder's other head, or pooler."""
    parts = dict(model.base_model.named_children())
    is_other_head = is_outside(model, stored) and stored.partition(".")[0] not in parts
    return family == "encoder" and (is_other_head or POOLER in f".{stored}")


def check_floats(model: PreTrainedModel, files: WeightFiles, names: dict[str, str], path: str) -> None:
    """Raise UserError for weights that are stored as whole numbers: quantized by somebody, with scales unknown here."""
    for name, parameter in model.named_parameters():
        if name in names and parameter.is_floating_point() and not files.holds_floats(names[name]):
            raise UserError(f"model.path: {path} stores {names[name]} as whole numbers: give the float base")


def check_ties(model: PreTrainedModel, files: WeightFiles, path: str) -> None:
    """Raise UserError where tied parameters are stored twice and differ; some of their rows are compared."""
    _, aliases = wanted_tensors(model)
    for names in aliases.values():
        stored = list(dict.fromkeys(s for name in names for s in spellings(model, name) if s in files.shapes))
        if len(stored) < 2:
            continue
        num_rows = files.shapes[stored[0]][0]
        rows = [*range(0, num_rows, max(1, num_rows // NUM_COMPARED)), num_rows - 1]
        some = [torch.cat([files.read_rows(name, i, i + 1) for i in rows]) for name in stored]
        if any(not torch.equal(part, some[0]) for part in some):
            raise UserError(
                f"model.path: {path} ties {' and '.join(stored[:2])} but stores two that differ: set "
                "tie_word_embeddings to false in its config.json"
            )
