"""Calls of a model that begin with a cache: what its `forward` and `generate` become while a prompt is attached.

Shapes: B rows, T tokens, P positions of the prompt.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ptune_dist.errors import UserError
from ptune_dist.evaluation.answer_plan import ANSWER_ALONE, COUNTS_PADDING, SCALED_BY_LENGTH, WINDOWS, rope_types
from ptune_dist.model.attention import windows_of
from ptune_dist.model.given_cache import keeps_more


class CachedCalls:
    """A model's calls, each of which begins with a copy of `cache`, of one row and P positions."""

    def __init__(self, model: PreTrainedModel, cache: Any):
        self._model = model
        self._cache = cache
        self._num_positions: int = cache.get_seq_length()
        self._forward = model.forward
        self._generate: Any = getattr(model, "generate", None)
        self._is_generating = False

    def attach(self) -> list[Callable[[], None]]:
        """Replace the model's methods; returns what restores them."""
        forward = functools.wraps(self._forward)(lambda *args, **inputs: self.forward(*args, **inputs))
        undo = [replace_method(self._model, "forward", forward)]
        if self._generate is not None:
            generate = functools.wraps(self._generate)(lambda inputs=None, **options: self.generate(inputs, **options))
            undo.append(replace_method(self._model, "generate", generate))
        return undo

    def _copies(self, count: int) -> Any:
        """The cache of so many rows."""
        own = copy.deepcopy(self._cache)
        own.batch_repeat_interleave(count)
        return own

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward after the prompt; `generate` has put it there already."""
        inputs = name_arguments(self._forward, args, inputs)
        if self._is_generating:
            return self._forward(**inputs)
        rows = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs)
        past = inputs.get("past_key_values")
        mask = inputs.get("attention_mask")
        check_rows(self._model, mask, self._num_positions + (rows if mask is None else mask).shape[1])
        if mask is not None:
            inputs["attention_mask"] = put_before(mask, self._num_positions)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + self._num_positions
        if past is None or past.get_seq_length() == 0:
            inputs["past_key_values"] = self._copies(len(rows))
        return self._forward(**inputs)

    def generate(self, inputs: torch.Tensor | None = None, **options: Any) -> Any:
        """The model's generate after the prompt, of ids [B, T]. Raises UserError for other inputs."""
        ids = inputs if inputs is not None else options.pop("input_ids", None)
        if ids is None or options.get("inputs_embeds") is not None or options.get("past_key_values") is not None:
            raise UserError("generate: with an attached prompt, give input_ids and no inputs_embeds or past_key_values")
        mask = options.pop("attention_mask", None)
        mask = find_padding(self._model, ids, options) if mask is None else mask
        options = without_total_length(self._model, options, self._num_positions)
        num_new = setting_of_generation(self._model, options, "max_new_tokens")
        longest = self._num_positions + ids.shape[1] + num_new if num_new else options.get("max_length") or 0
        check_rows(self._model, mask, longest)
        # transformers leaves out as many first ids as the cache has positions. A row's own ids mean nothing new to
        # penalties on repetition.
        first = ids[:, -1:].expand(-1, self._num_positions)
        options["attention_mask"] = put_before(mask, self._num_positions)
        options["past_key_values"] = self._copies(len(ids) * count_copies(self._model, options))
        self._is_generating = True
        try:
            found = self._generate(torch.cat([first, ids], dim=1), **options)
        finally:
            self._is_generating = False
        if isinstance(found, torch.Tensor):
            return found[:, self._num_positions :]
        found.sequences = found.sequences[:, self._num_positions :]
        return found


def replace_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Set a method of one object; returns what restores it."""
    before = vars(module).get(name)  # one of the object's own, as accelerate's hooks set it
    setattr(module, name, method)

    def restore() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    return restore


def name_arguments(function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; those that are None are left out."""
    names = list(inspect.signature(function).parameters)
    given = dict(zip(names, args, strict=False)) | options
    return {name: value for name, value in given.items() if value is not None}


def put_before(mask: torch.Tensor, num_positions: int) -> torch.Tensor:
    """A mask [B, T] with positions before all rows that are read, [B, P + T]."""
    return torch.cat([mask.new_ones(len(mask), num_positions), mask], dim=1)


def find_padding(model: PreTrainedModel, ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The mask [B, T] of ids that came without one: tokens for padding that end no text, as transformers has it."""
    pad = setting_of_generation(model, options, "pad_token_id")
    ends = setting_of_generation(model, options, "eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return torch.ones_like(ids) if pad is None or pad in ends else ids.ne(pad).long()


def check_rows(model: PreTrainedModel, mask: torch.Tensor | None, num_positions: int) -> None:
    """Raise UserError for rows [B, T] whose outputs would not be those that each has alone.

    Padding on the left stands between the prompt and a row. num_positions: of the longest row, with the prompt's.
    """
    text = model.config.get_text_config(decoder=True)
    known = getattr(text, "rope_parameters", None) or {}
    first = known.get("original_max_position_embeddings") if rope_types(model) & set(SCALED_BY_LENGTH) else None
    if first and num_positions > first:
        raise UserError(f"attach: beyond {first} positions this model rotates what the prompt has left in another way")
    if mask is None or bool(mask[:, 0].all()):
        return
    windows = [window for window in windows_of(model) if window is not None]
    windows += [getattr(text, name) for name in WINDOWS if isinstance(getattr(text, name, None), int)]
    counts_padding = text.model_type in (*COUNTS_PADDING, *ANSWER_ALONE, "mpt") or keeps_more(model)
    if counts_padding or (windows and num_positions > min(windows)):
        raise UserError(
            "attach: this model counts padding on the left between prompt and row: give rows of one length, or one row "
            "at a time"
        )


def setting_of_generation(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """What a call of `generate` has for a setting: given, or in its or the model's GenerationConfig."""
    if options.get(name) is not None:
        return options[name]
    config: GenerationConfig | None = options.get("generation_config") or model.generation_config
    return getattr(config, name, None)


def count_copies(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """Rows that `generate` makes of each one: beams, or samples."""
    counts = [setting_of_generation(model, options, name) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(counts)


def without_total_length(model: PreTrainedModel, options: dict[str, Any], num_positions: int) -> dict[str, Any]:
    """The options with lengths that count the input made to count the prompt's positions too."""
    longer = {
        name: options[name] + num_positions for name in ("max_length", "min_length") if options.get(name) is not None
    }
    if "max_length" in longer or setting_of_generation(model, options, "max_new_tokens") is not None:
        return options | longer
    stated = setting_of_generation(model, options, "max_length")
    return options | longer | ({"max_length": stated + num_positions} if stated else {})
