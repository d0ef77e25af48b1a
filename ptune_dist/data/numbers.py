"""Texts that are numbers: plain decimal notation, such as -3, 7.50 or 1e-3, and nothing else that Python reads.

Python also takes `1_000`, the digits of other scripts, `nan` and `infinity`, which are hardly meant as numbers in data.
"""

import contextlib
import decimal
import math
import re
from typing import Any

import jinja2

NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]+")
MOST_SHOWN = 40
NOT_GIVEN = object()


def read_number(text: str) -> float | None:
    """A finite number, perhaps with spaces around it; None for anything else."""
    if not NUMBER.fullmatch(text.strip()):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def to_integer(value: Any, default: Any = NOT_GIVEN, base: int = 10, *, expression: str = "") -> Any:
    """jinja2's filter `int`, which makes 0 of what is no number: here only where a template asks for a default.

    `expression` is what the filter is applied to, for the message. Raises UndefinedError.
    """
    found = read_integer(value, base)
    return fall_back("int", value, default, expression) if found is None else found


def to_float(value: Any, default: Any = NOT_GIVEN, *, expression: str = "") -> Any:
    """jinja2's filter `float`, as `to_integer`."""
    if isinstance(value, str):
        found = read_number(value)
    else:
        found = float(value) if isinstance(value, (int, float, decimal.Decimal)) else None
    return fall_back("float", value, default, expression) if found is None else found


def read_integer(value: Any, base: int) -> int | None:
    """An integer, or another finite number without its fraction; None for anything else."""
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(value, (int, float, decimal.Decimal)):
            return int(value)
        if isinstance(value, str):
            text = value.strip()
            if base != 10 and text.isascii() and "_" not in text:
                with contextlib.suppress(ValueError):
                    return int(text, base)
            if INTEGER.fullmatch(text):
                return int(text)
            number = read_number(text)
            return None if number is None else int(number)
    return None


def fall_back(name: str, value: Any, default: Any, expression: str) -> Any:
    """The default that a template gives. Raises UndefinedError where it gives none."""
    if default is not NOT_GIVEN:
        return default
    shown = repr(value)
    shown = shown if len(shown) <= MOST_SHOWN else shown[: MOST_SHOWN - 3] + "..."
    raise jinja2.UndefinedError(
        f"{{{{ {expression or '...'} | {name} }}}}: {shown} is not a number; write {name}(0) if it counts as 0"
    )
