"""Decode JSON so that a value prints as it stands in the file: 7.50 stays 7.50, 1e3 stays 1e3, -0 stays -0."""

import json
from typing import Any, Self


class Written:
    """A number whose text is the literal that it was read from; it computes and compares as a number."""

    literal: str

    def __new__(cls, literal: str) -> Self:
        number = super().__new__(cls, literal)  # pyright: ignore[reportCallIssue]  # of float or int
        number.literal = literal
        return number

    def __str__(self) -> str:
        return self.literal

    __repr__ = __str__

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.literal,)


class WrittenFloat(Written, float):
    """A float such as 7.50 or 1e3."""


class WrittenInt(Written, int):
    """The integer -0."""


def read_float(literal: str) -> float:
    number = float(literal)
    return number if repr(number) == literal else WrittenFloat(literal)


def read_int(literal: str) -> int:
    return WrittenInt(literal) if literal == "-0" else int(literal)


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with its keys in their order. Raises ValueError for a key that occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


DECODER = json.JSONDecoder(
    parse_float=read_float, parse_int=read_int, parse_constant=WrittenFloat, object_pairs_hook=build_object
)


def has_half_surrogate(value: object, text: str) -> bool:
    """Whether a value decoded from `text` contains half of a surrogate pair, which no tokenizer can read."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    return any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False, default=str))


def dump_json(value: object, **options: Any) -> str:
    """As json.dumps, where numbers print as they were written."""
    literals: list[str] = []
    marked = _mark(value, literals)
    text = json.dumps(marked, **options)
    for number, literal in enumerate(literals):
        text = text.replace(json.dumps(_mark_of(number), ensure_ascii=options.get("ensure_ascii", True)), literal, 1)
    return text


def text_of(value: object) -> str:
    """The text of a single value: true and false as in JSON, numbers as they were written."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _mark_of(number: int) -> str:
    return f"\uf8e1{number}\uf8e2\ue93c"  # private-use characters, which no text has in this order


def _mark(value: object, literals: list[str]) -> object:
    """The value with a mark for each number that has a literal of its own."""
    if isinstance(value, Written):
        literals.append(value.literal)
        return _mark_of(len(literals) - 1)
    if isinstance(value, dict):
        return {key: _mark(item, literals) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(item, literals) for item in value]
    return value


def name_kind(value: object) -> str:
    """The type of a JSON value in words; integers and floats are one type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"
