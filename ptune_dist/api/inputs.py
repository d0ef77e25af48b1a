"""What callers pass to a trained prompt: checked as the command line is, so that a mistake is one clear line."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ptune_dist.errors import UserError

# The kind of each option, its limits, and how these are put into words. As in `ptune-dist generate`.
LIMITS: dict[str, tuple[type, float, float, str]] = {
    "max_new_tokens": (int, 1, math.inf, "a whole number, at least 1"),
    "temperature": (float, math.ulp(0.0), math.inf, "a number above 0"),
    "top_p": (float, math.ulp(0.0), 1, "a number above 0, at most 1"),
    "top_k": (int, 1, math.inf, "a whole number, at least 1"),
    "seed": (int, 0, 2**32 - 1, "a whole number from 0 to 2**32 - 1"),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for the first option that is out of its limits; None stands for one that is not given."""
    for name, value in options.items():
        kind, low, high, words = LIMITS[name]
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if value is not None and not (is_number and low <= value <= high):
            raise UserError(f"{name}: {value!r} is not {words}")


def list_inputs(inputs: Any) -> list[Any]:
    """One input or several, as a list. Raises UserError for what is neither."""
    if isinstance(inputs, (str, Mapping)):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise UserError(f"inputs: give a row (a dict), a text, or a list of these, not {type(inputs).__name__}")
    return list(inputs)
