"""Stored tensors under the names that transformers converts them to, where it only renames and joins them.

Mixtures of experts are stored as one matrix for each expert and computed with one tensor for all of them. The stored
matrices, one below the other, are that tensor, so a rank reads its own part of it as of any other. Where transformers
does more (it transposes or splits, say), there is no such plan and `loaded_weights` takes the detour through it.
"""

from collections import defaultdict

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ptune_dist.base.checkpoint_formats import StoredWeights
from ptune_dist.base.merge import MergedWeights
from ptune_dist.base.names import Shapes


class ConvertedWeights(MergedWeights):
    """Stored weights by the names that transformers gives them."""

    def __init__(self, weights: StoredWeights, parts: dict[str, list[str]], shapes: Shapes):
        super().__init__(weights, parts)
        self._shapes = shapes

    @property
    def shapes(self) -> Shapes:
        return self._shapes

    def holds_floats(self, name: str) -> bool:
        return all(self._weights.holds_floats(part) for part in self._parts[name])

    def read_columns(self, name: str, first: int, last: int) -> torch.Tensor:
        return torch.cat([self._weights.read_columns(part, first, last) for part in self._parts[name]], dim=1)


def convert_names(model: PreTrainedModel, weights: StoredWeights) -> ConvertedWeights | None:
    """The weights by their names in the model; None where transformers does more than rename and join."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    wanted = model.state_dict(keep_vars=True)
    found: defaultdict[str, defaultdict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(weights.shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:  # as transformers' loader has it
            target, pattern = name, None
        found[target][pattern].append(name)
    parts: dict[str, list[str]] = {}
    shapes: Shapes = {}
    for target, by_pattern in found.items():
        if target not in wanted:
            extra = [name for names in by_pattern.values() for name in names]
            parts |= {name: [name] for name in extra}
            shapes |= {name: weights.shapes[name] for name in extra}
            continue
        converter = next((c for c in converters if any(pattern in c.source_patterns for pattern in by_pattern)), None)
        joined = join_parts(converter, by_pattern, weights.shapes)
        if joined is None:
            return None
        parts[target], shapes[target] = joined
    return ConvertedWeights(weights, parts, shapes)


def join_parts(
    converter: WeightConverter | None, by_pattern: dict[str | None, list[str]], shapes: Shapes
) -> tuple[list[str], tuple[int, ...]] | None:
    """The stored tensors that are one, in order, and its shape; None where they are not joined row by row."""
    if converter is None:
        names = by_pattern.get(None, [])
        return (names, shapes[names[0]]) if len(names) == 1 and len(by_pattern) == 1 else None
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    columns = [by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern]
    numbers = {len(names) for names in columns}
    if len(columns) != len(converter.source_patterns) or len(numbers) != 1 or len(converter.target_patterns) != 1:
        return None
    rows = [name for names in zip(*columns, strict=True) for name in names]
    widths = {shapes[name][1:] for name in rows}
    if len(widths) != 1 or not all(shapes[name] for name in rows):
        return None
    num_rows = sum(shapes[names[0]][0] for names in columns)
    if kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return rows, (len(columns[0]), num_rows, *widths.pop())
    if kinds == [(Concatenate, 0)] and numbers == {1}:
        return rows, (num_rows, *widths.pop())
    return None
