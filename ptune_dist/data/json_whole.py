"""Find the rows in a JSON file that is one value: an array of objects, or an object that holds one."""

import re
from collections.abc import Iterator
from typing import Any

from ptune_dist.data.json_values import DECODER
from ptune_dist.errors import UserError

# Names of splits, which must not be taken for one another.
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval", "evaluation")
_BLANKS = re.compile(r"[ \t\r\n]*")


def find_rows(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Yield (position, row) of each item, decoded one at a time so that each has its place. Raises UserError."""
    start = skip_blanks(text, 0)
    is_inside = text.startswith("{", start)
    if is_inside:
        start = find_list(text, start, name)
    position = skip_blanks(text, start + 1)
    is_closed = text.startswith("]", position)
    while not is_closed:
        row, end = decode_at(text, position, name)
        yield position, row
        position = skip_blanks(text, end)
        is_closed = text.startswith("]", position)
        if not is_closed:
            if not text.startswith(",", position):
                raise misplaced(name, text, position, "where ',' or ']' should follow a row")
            position = skip_blanks(text, position + 1)
    position = skip_blanks(text, position + 1)
    if not is_inside and position < len(text):
        raise misplaced(name, text, position, "after the end of the array")


def find_list(text: str, start: int, name: str) -> int:
    """Where the rows begin in the one object that is the file: its only list of objects, or `data` beside empty lists.

    Raises UserError if there is none or several.
    """
    whole, end = decode_at(text, start, name)
    if skip_blanks(text, end) < len(text):
        raise misplaced(name, text, skip_blanks(text, end), "after the end of the object")
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    of_objects = [key for key in lists if all(isinstance(item, dict) for item in whole[key])]
    splits = [key for key, value in whole.items() if key in SPLITS and isinstance(value, (list, dict))]
    if splits and (len(splits) > 1 or len(of_objects) > 1):
        found = ", ".join(dict.fromkeys([*of_objects, *splits]))
        raise UserError(
            f"{name}: the file is one object with the splits {found}: save the rows of each as a file of its own, and "
            "name the files in data.train and data.validation"
        )
    if len(whole) == 1 and is_chat(next(iter(whole.values()))):
        raise UserError(
            f"{name}: the file is one chat, whose messages are no rows: write an array of such objects, or one on each "
            "line of a .jsonl file"
        )
    filled = [key for key in of_objects if whole[key]]
    if "data" in of_objects and not set(filled) - {"data"}:
        chosen = "data"
    else:
        chosen = of_objects[0] if len(of_objects) == 1 else None
    if chosen is None:
        found = f"several lists ({', '.join(of_objects)})" if of_objects else "no list of objects"
        raise UserError(f"{name}: the file is one object with {found}; it must contain one array of objects")
    position = skip_blanks(text, start + 1)
    while True:
        key, end = decode_at(text, position, name)
        position = skip_blanks(text, skip_blanks(text, end) + 1)  # after the colon
        if key == chosen:
            return position
        _, end = decode_at(text, position, name)
        position = skip_blanks(text, skip_blanks(text, end) + 1)  # after the comma


def decode_at(text: str, position: int, name: str) -> tuple[Any, int]:
    """The value at a position and where it ends. Raises UserError with the line of what is not JSON."""
    try:
        return DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1 + text.count("\n", 0, position))
        raise not_json(name, line, text[getattr(error, "pos", position) :], error) from None


def misplaced(name: str, text: str, position: int, place: str) -> UserError:
    line = 1 + text.count("\n", 0, position)
    return UserError(f"{name} line {line}: not JSON: found {excerpt(text[position:])} {place}")


def skip_blanks(text: str, position: int) -> int:
    blanks = _BLANKS.match(text, position)
    assert blanks is not None  # the pattern matches the empty string too
    return blanks.end()


def is_json_lines(name: str) -> bool:
    return any(suffix in name.lower() for suffix in (".jsonl", ".ndjson"))


def is_chat(value: Any) -> bool:
    """Whether a value is the messages of a chat, as OpenAI's or ShareGPT's format has them."""
    if not isinstance(value, list) or not value:
        return False
    kinds = ({"role", "content"}, {"from", "value"})
    return all(isinstance(item, dict) and any(kind <= item.keys() for kind in kinds) for item in value)


def excerpt(text: str) -> str:
    if not text.strip():
        return "the end of the file"
    line = text.strip().split("\n", 1)[0]
    return repr(line if len(line) <= 40 else line[:37] + "...")


def not_json(name: str, line: int, text: str, error: Exception) -> UserError:
    reason = getattr(error, "msg", None) or str(error)
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif "integer string conversion" in reason:
        reason = "a number has more than 4300 digits"
    shape = "one object on each line" if is_json_lines(name) else "an array of objects"
    return UserError(f"{name} line {line}: not JSON ({reason}), found {excerpt(text)}; the file must contain {shape}")
