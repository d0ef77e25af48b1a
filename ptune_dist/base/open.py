"""Open a base: make the model without memory, find its weights, and say whatever is wrong. Only headers are read."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from ptune_dist.base.architecture import Architecture
from ptune_dist.base.checkpoint_formats import StoredWeights, dequantize, quantization_of
from ptune_dist.base.converted import ConvertedWeights, convert_names
from ptune_dist.base.fp8 import make_fp8
from ptune_dist.base.int8 import Int8Embedding, make_int8
from ptune_dist.base.loaded_weights import LoadedWeights, load_with_transformers
from ptune_dist.base.memory_check import check_room_for_copies
from ptune_dist.base.merge import MergedWeights, merge_projections, read_directly
from ptune_dist.base.multimodal import text_files
from ptune_dist.base.names import match_names, needs_converting, wanted_tensors
from ptune_dist.base.random_weights import RandomWeights
from ptune_dist.base.source import describe_load_error, is_local_only, load_shape, load_whole_shape
from ptune_dist.base.ties import describe_untied, untie_differing, untie_trained
from ptune_dist.base.weight_files import open_weight_files
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.errors import UserError


class WithoutMemory(TorchFunctionMode):
    """`torch.empty`, which large parameters are made of, takes no memory: one may be larger than this host's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@dataclass
class OpenedBase:
    """A model whose parameters have shapes and no memory, and where their numbers come from."""

    model: PreTrainedModel
    family: Architecture
    dtype: torch.dtype
    weights: StoredWeights | RandomWeights | LoadedWeights | MergedWeights
    names: dict[str, str]  # of a parameter or buffer in the model -> in the weights
    new: list[str]  # parameters that no file holds: a new classification head's
    seed: int
    trained: set[str] = field(default_factory=set)  # parameters of an encoder's head, or those of partial tuning
    note: str | None = None  # how it is loaded, where that is not the ordinary way

    @property
    def embeddings_name(self) -> str:
        """The name of the module that embeds tokens."""
        tokens = self.model.get_input_embeddings()
        return next(name for name, module in self.model.named_modules() if module is tokens)

    def read_rows(self, ids: list[int]) -> torch.Tensor:
        """The stored embeddings [len(ids), D] of some tokens."""
        stored = self.names[f"{self.embeddings_name}.weight"]
        return torch.cat([self.weights.read_rows(stored, i, i + 1) for i in ids])

    def embed(self, ids: list[int]) -> torch.Tensor:
        """The input vectors [len(ids), D] in float32 of some tokens, read without the rest of the base."""
        tokens = self.model.get_input_embeddings()
        name = self.embeddings_name
        rows = self.read_rows(ids)
        if isinstance(tokens, Int8Embedding):  # a prompt starts from what the base itself will look up
            codes, scales = tokens.quantize(rows)
            return (codes * scales[:, None]).to(self.dtype).float()
        rows = rows.to(self.dtype)
        few = cast(Any, copy.copy(tokens))  # its forward may do more than look up: Gemma scales, Inkling normalizes
        few.num_embeddings = len(ids)
        few.padding_idx = None
        others = [leaf for leaf, _ in tokens.named_parameters() if leaf != "weight"]
        values = {leaf: self._read_whole(f"{name}.{leaf}") for leaf in others} | {"weight": rows}
        with torch.no_grad():
            return functional_call(few, values, (torch.arange(len(ids)),)).float()

    def _read_whole(self, name: str) -> torch.Tensor:
        """A small parameter beside the embeddings: T5Gemma 2 has one for the end of an image."""
        whole = torch.empty(self.model.get_parameter(name).shape, dtype=self.dtype)
        self.weights.read_flat(self.names[name], 0, whole.view(-1))
        return whole


def open_base(
    path: str,
    family: Architecture,
    *,
    dtype: torch.dtype,
    random_init: bool = False,
    seed: int = 0,
    int8: dict[str, Any] | None = None,
    fp8: dict[str, Any] | None = None,
    labels: list[str] | None = None,
    choose_trained: Callable[[PreTrainedModel], set[str]] = lambda _: set(),
) -> OpenedBase:
    """Make the model without memory and find its weights; no weight is read. Raises UserError.

    `int8` holds `include` and `threshold` of `int8.make_int8`, `fp8` the `include` of `fp8.make_fp8`; without either
    the weights are in `dtype`. `labels` are those that a classifier's head tells apart. `choose_trained` names the
    parameters that are trained beside an encoder's head.
    """
    shape = load_shape(path)
    quantization = quantization_of(shape, path)
    family.prepare_shape(shape, labels)
    model = make_without_memory(shape, path, family, dtype)
    family.check_model(model, path)
    opened = find_weights(model, path, family, quantization, dtype=dtype, random_init=random_init, seed=seed)
    unknown = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in opened.names]
    if unknown:
        raise UserError(f"model.path: {path}: its buffer {unknown[0]} is neither stored nor computed when it is made")
    opened.trained = family.trained_names(model, opened.new) | choose_trained(model)
    untie_trained(model, opened.trained)
    merged = merge_projections(model, opened.names, {name.rpartition(".")[0] for name in opened.trained})
    opened.weights = MergedWeights(opened.weights, merged)
    trained = modules_with_trained_weights(model, opened.trained)
    for make, options in ((make_int8, int8), (make_fp8, fp8)):
        if options is not None:
            refuse_trained_head(model, trained, options["include"])
            make(model, dtype=dtype, skip=trained | read_directly(model), **options)
    check_trained(model, opened.trained)
    for module in model.modules():  # T5's stacks have configs of their own
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
    generation_config = family.generation_config(model.config)
    if generation_config is not None:
        model.generation_config = generation_config
    model.eval().requires_grad_(False)
    for name in opened.trained:
        model.get_parameter(name).requires_grad_()
    return opened


def modules_with_trained_weights(model: PreTrainedModel, trained: set[str]) -> set[str]:
    """Modules that are not quantized; one of which only the bias is trained is."""
    return {name.rpartition(".")[0] for name in trained if model.get_parameter(name).dim() > 1}


def refuse_trained_head(model: PreTrainedModel, trained: set[str], include: list[str]) -> None:
    """Raise UserError where a head is to be in 8 bits that is trained."""
    head = model.get_output_embeddings()
    if "head" in include and any(module is head for name, module in model.named_modules() if name in trained):
        raise UserError("model.int8_include: the head is trained, so it is not quantized: leave out head")


def check_trained(model: PreTrainedModel, trained: set[str]) -> None:
    """Raise UserError where a parameter that is to be trained has been quantized: experts are, all of a base's."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lost = sorted(trained - names)
    if lost:
        raise UserError(f"model.quantization: {lost[0]} is to be trained and would be in 8 bits: set it to none")


def make_without_memory(
    shape: PretrainedConfig, path: str, family: Architecture, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a shape, with parameters that take no memory. Raises UserError."""
    try:
        with WithoutMemory(), init_empty_weights(include_buffers=False):
            model = family.auto_class.from_config(shape, dtype=dtype)
    except Exception as error:  # each architecture checks its own numbers
        raise UserError(describe_load_error(path, "config.json", error)) from None
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise UserError(f"model.path: {path}: {shape.model_type} models embed tokens in a way of their own")
    model.tie_weights()
    return model


def find_weights(
    model: PreTrainedModel,
    path: str,
    family: Architecture,
    quantization: dict[str, Any],
    *,
    dtype: torch.dtype,
    random_init: bool,
    seed: int,
) -> OpenedBase:
    """The weights for an empty model: its files', random ones, or transformers' own loader's. Raises UserError."""
    if random_init:
        wanted, aliases = wanted_tensors(model)
        shapes = {name: wanted[name] for name, _ in model.named_parameters()}
        std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
        names = {alias: name for name in shapes for alias in aliases[name]}
        return OpenedBase(model, family, dtype, RandomWeights(shapes, std=std, seed=seed), names, [], seed)
    stored = open_weight_files(path, local_only=is_local_only(path))
    whole = load_whole_shape(path).model_type
    is_part = whole != model.config.model_type
    part = f"its language model is used, without the other parts of {whole}" if is_part else None
    if is_part:
        stored = text_files(stored, model)
    files = dequantize(stored, quantization, path)
    why = "its tensor names need converting"
    if needs_converting(model, files.shapes):
        files = convert_names(model, files)
    if files is not None:
        untied = untie_differing(model, files)
        names, new = match_names(model, files.shapes, family, path)
        check_floats(model, files, names, path)
        if all(name in names or name in new for name, _ in model.named_parameters()):
            return OpenedBase(
                model, family, dtype, files, names, new, seed, note=join_notes(part, describe_untied(untied))
            )
        why = "some of its parameters are computed, not stored"  # Marian's positions
    if quantization:
        raise UserError(f"model.path: {path} is stored quantized and {why}: give the float base")
    check_room_for_copies(sum(p.numel() * p.element_size() for p in model.parameters()), path)
    with BusyLine(f"loading {path} with transformers, because {why}"):
        tensors = load_with_transformers(path, family, dtype, part_of=model if is_part else None)
    matched = match_names(model, {name: tuple(t.shape) for name, t in tensors.items()}, family, path)
    note = join_notes(part, f"{why}: transformers loads it whole on every rank")
    return OpenedBase(model, family, dtype, LoadedWeights(tensors), *matched, seed, note=note)


def join_notes(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def check_floats(
    model: PreTrainedModel, files: StoredWeights | ConvertedWeights, names: dict[str, str], path: str
) -> None:
    """Raise UserError for weights that are stored as whole numbers: quantized by somebody, with scales unknown here."""
    for name, parameter in model.named_parameters():
        if name in names and parameter.is_floating_point() and not files.holds_floats(names[name]):
            raise UserError(f"model.path: {path} stores {names[name]} as whole numbers: give the float base")
