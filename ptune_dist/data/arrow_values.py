"""What `datasets` makes of an Arrow file: which columns it can read, and numbers in the precision of their column."""

from typing import Any

import datasets
import numpy as np
import pyarrow

_NARROW = {"float16": np.float16, "float32": np.float32}


def split_columns(schema: pyarrow.Schema) -> tuple[pyarrow.Schema, dict[str, str]]:
    """The schema of the columns that `datasets` can read, and (name -> type) of the others, such as maps."""
    unreadable: dict[str, str] = {}
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pyarrow.schema([field]))
        except (ValueError, TypeError, KeyError):
            unreadable[field.name] = str(field.type)
    for name in unreadable:
        schema = schema.remove(schema.get_field_index(name))
    return schema, unreadable


def has_narrow_floats(feature: Any) -> bool:
    """Whether values of this feature hold numbers of less than 64 bits, at any depth."""
    if isinstance(feature, dict):
        return any(map(has_narrow_floats, feature.values()))
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return has_narrow_floats(feature.feature)
    return isinstance(feature, datasets.Value) and feature.dtype in _NARROW


def shorten_floats(value: Any, feature: Any) -> Any:
    """The value, where a narrow number is the one with the shortest text that is the same number in its column's type.

    A 32-bit 0.1 is 0.1, and not the 0.10000000149011612 that it is in 64 bits.
    """
    if value is None or not has_narrow_floats(feature):
        return value
    if isinstance(feature, dict):
        return {name: shorten_floats(item, feature[name]) for name, item in value.items()}
    if isinstance(feature, datasets.Value):
        return float(str(_NARROW[feature.dtype](value)))
    return [shorten_floats(item, feature.feature) for item in value]
