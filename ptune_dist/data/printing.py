"""What the values of a row print as in a template: texts and numbers as they are in the file, all else as JSON.

What Python would print although nobody means it, a method, a generator, bytes or null, is an error. A chat message's
content that is a list of parts prints as the text of its parts.
"""

import datetime
import decimal
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.sandbox

from ptune_dist.data.json_values import dump_json, text_of

# Of the parts of a chat message's content, as OpenAI's and transformers' formats name them.
PART_TYPES = (
    *("text", "input_text", "output_text", "image", "image_url", "input_image", "audio", "audio_url", "input_audio"),
    *("video", "video_url", "file", "input_file"),
)
NUMBERS = (int, float, decimal.Decimal)
TIMES = (datetime.date, datetime.time, datetime.timedelta)


class FormattedBool(int):
    """true or false among the values of a format: `%d` prints a number of it."""

    def __str__(self) -> str:
        return text_of(bool(self))

    __repr__ = __str__


class Formatter(jinja2.sandbox.SandboxedFormatter):
    """`'{}'.format(value)`, which prints a value as `{{ value }}` does."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return super().format_field(formatted(value), format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(formatted(value), conversion)


def printed(value: Any) -> Any:
    """What a value prints as. Raises UndefinedError for what nobody means to print."""
    if isinstance(value, bool):
        return text_of(value)
    if isinstance(value, (str, *NUMBERS, *TIMES, jinja2.Undefined)):
        return value
    if value is None:
        raise jinja2.UndefinedError("a value in {{ ... }} is null")
    if isinstance(value, list) and is_content(value):
        return text_of_parts(value)
    if isinstance(value, (list, tuple, dict)):
        return json_text(value)
    raise jinja2.UndefinedError(f"a value in {{{{ ... }}}} is {describe_odd(value)}")


def formatted(value: Any) -> Any:
    """As `printed`, where `%d` still takes true and false for 1 and 0."""
    return FormattedBool(value) if isinstance(value, bool) else printed(value)


def describe_odd(value: Any) -> str:
    """What a value is that has no text."""
    if isinstance(value, (bytes, bytearray)):
        return "bytes, not text"
    if isinstance(value, Iterator):
        return "a generator: add | list or | join(', ')"
    if callable(value):
        name = getattr(value, "__name__", "a function")
        return f"the method {name!r}: write ['{name}'] for a key"
    return f"of type {type(value).__name__}, which has no text: add | list if it holds several values"


def json_text(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
    """A value as JSON, with the keys in the row's order."""
    return dump_json(value, ensure_ascii=ensure_ascii, default=text_inside, **options)


def text_inside(value: Any) -> str:
    """What stands for a value that JSON does not have, such as a date, inside a list or an object."""
    return str(printed(value))


def join_values(values: Any, separator: str = "", attribute: str | int | None = None) -> str:
    """jinja2's `join`, which would join null as 'None'."""
    if attribute is not None:
        values = [pick(value, attribute) for value in values]
    return str(separator).join(str(printed(value)) for value in values)


def pick(value: Any, attribute: str | int) -> Any:
    """A value inside another one; `author.name` is found under both names in turn."""
    for name in str(attribute).split("."):
        place = int(name) if name.isdecimal() else name
        try:
            value = value[place]
        except (LookupError, TypeError):
            raise jinja2.UndefinedError(f"a value that is joined has no {name!r}") from None
    return value


def is_content(value: list[Any]) -> bool:
    """Whether a list is the content of a chat message: parts that each name their type."""
    return bool(value) and all(isinstance(part, dict) and part.get("type") in PART_TYPES for part in value)


def text_of_parts(parts: list[dict[str, Any]]) -> str:
    """The text of a message's parts. Raises UndefinedError for an image or another part that is no text."""
    for part in parts:
        if not isinstance(part.get("text"), str):
            raise jinja2.UndefinedError(f"a chat message has a part of type {part['type']!r}, which has no text")
    return "".join(part["text"] for part in parts)
