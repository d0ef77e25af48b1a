"""What is wrong with a config, in one line: where it was given, the key, what is wrong, and the nearest known key."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ptune_dist.config.foreign_names import FOREIGN_NAMES, name_trainer
from ptune_dist.config.foreign_values import name_value
from ptune_dist.config.schema import Config

SECTIONS = tuple(Config.model_fields)
# What pydantic says in terms of Python.
PLAIN_WORDS = {
    "list_type": "a list is needed, such as [a, b]",
    "tuple_type": "a list is needed, such as [a, b]",
    "model_type": "a section with keys of its own is needed",
    "dict_type": "a mapping is needed, such as {key: value}",
    "string_type": "a text is needed; put it in quotes where it looks like something else",
}
# What pydantic puts between the keys of a place: which function, or which type of several, refused.
MARKER = re.compile(r"(function-\w+|dict|list|tuple|literal)\[.*\]|str|bool|int|float", re.DOTALL)
MAX_SHOWN = 100  # characters of a wrong value
MAX_MESSAGE = 1000  # which may hold a value of any length


def describe_validation_error(error: ValidationError, path: str | Path, overrides: Sequence[str]) -> str:
    """The first thing wrong, in one line: file (or command line), key, what, and the nearest known key."""
    key, what = describe_first_error(error)
    unknown = {str(found["loc"][0]) for found in error.errors() if found["type"] == "extra_forbidden"}
    trainer = name_trainer(unknown)
    if trainer:
        return f"{path}: this is a file for {trainer}, not a config of ptune-dist (see README.md): {what}"
    return f"{name_place(key, path, overrides)}: {what}"


def name_place(key: str, path: str | Path, overrides: Sequence[str]) -> str:
    """Where a key was given: the command line, if it, its section or a key below it was, else the file."""
    given = [override.partition("=")[0] for override in overrides]
    from_command_line = key and any(f"{key}.".startswith(f"{g}.") or f"{g}.".startswith(f"{key}.") for g in given)
    return "command line" if from_command_line else str(path)


def find_key(message: str) -> str:
    """The dotted key that a message begins with, also after "unknown key"."""
    found = re.match(r"[\w.]*", message.removeprefix("unknown key "))
    return found[0].rstrip(".") if found else ""


def describe_first_error(
    error: ValidationError, section: type[BaseModel] = Config, prefix: str = ""
) -> tuple[str, str]:
    """The key of the first thing wrong ("" where several keys are involved), and a message that names the key.

    section: what was validated, at `prefix` in the config: "" or, say, "prompt.".
    """
    # An unknown key first: where a key is misspelled, the right one is missing too.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    *before, last = [str(part) for part in first["loc"]] or [""]
    parts = [part for part in before if not MARKER.fullmatch(part)]
    if first["type"] == "extra_forbidden" or not MARKER.fullmatch(last):  # an unknown key may be called `str`
        parts.append(last)
    key = prefix + ".".join(parts)
    if first["type"] == "extra_forbidden":
        return key, describe_unknown_key(key, known_keys(section, prefix))
    if first["type"] == "missing":
        return key, f"{key} is missing"
    message = PLAIN_WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")[:MAX_MESSAGE]
    if first["type"] == "string_type" and first["input"] is None:
        message = "a text is needed, and none is given; put null or ~ in quotes where that is the text"
    if first["type"] == "string_type" and isinstance(first["input"], dict):
        message = "a text is needed, and this is a mapping; a column of a template stands in two braces: {{ column }}"
    if message.startswith(key):  # a check of several keys, or of a sweep's, names them itself
        return key, message
    return key, f"{key}: {message}{show_input(first['input'])}{name_value(key, first['input'])}"


def show_input(value: Any) -> str:
    """What was given, shortened; nothing of a section."""
    if isinstance(value, dict):
        return ""
    shown = "null" if value is None else repr(value)
    return f", got {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '...'}"


def text_keys(section: type[BaseModel] = Config, prefix: str = "") -> set[str]:
    """The dotted keys whose values, or items, are free text, such as paths, templates and labels."""
    keys = set()
    for name, field in section.model_fields.items():
        kinds = {part for part in walk_types(field.annotation) if isinstance(part, type)}
        for kind in kinds:
            if issubclass(kind, BaseModel):
                keys |= text_keys(kind, f"{prefix}{name}.")
        if str in kinds and (list in kinds or not kinds & {int, float, bool}):
            keys.add(prefix + name)
    return keys


def walk_types(annotation: Any) -> Iterator[Any]:
    """A type and those in it, without the keys and values of a mapping: `list[str] | None` has list, str and None."""
    yield get_origin(annotation) or annotation
    if get_origin(annotation) in (dict, Literal):
        return
    for part in get_args(annotation):
        yield from walk_types(part)


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """`unknown key KEY, did you mean OTHER?`, without a guess where no known key is like it.

    A name that another trainer has for something is answered with ours, or with what to do instead.
    """
    known = list(known)
    if key in known:  # a YAML file has it with its dots
        section, _, leaf = key.rpartition(".")
        return f"unknown key {key}: write {leaf} indented below {section}:, or {key}=VALUE on the command line"
    leaf = key.rpartition(".")[2]
    section = key.rpartition(".")[0]
    is_ours = any(name.rpartition(".")[2] == leaf for name in known)  # in another section
    answer = FOREIGN_NAMES.get(key) or ("" if is_ours or not section and key in SECTIONS else FOREIGN_NAMES.get(leaf))
    if answer:
        return f"unknown key {key}: {answer}"
    if re.fullmatch(r"[-+.\d]+", leaf):
        return f"unknown key {key}: a comma begins a new key: write 1.5, and a list in brackets"
    near = nearest_key(key, known)
    hint = f", did you mean {near}?" if near else ""
    return f"unknown key {key}{hint}"


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The known dotted key that is most likely meant by `key`; empty where none is like it.

    First come the keys of the same section, then whole keys, then the last parts of keys of any section.
    """
    known = [name for name in known if not key.startswith(f"{name}.")]  # the section itself is not meant
    section, _, leaf = key.rpartition(".")
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    same_section = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    for word, named in ((leaf, same_section), (key, {name: name for name in known}), (leaf, by_leaf)):
        near = difflib.get_close_matches(word, named, n=1, cutoff=0.6)
        if near:
            return named[near[0]]
    return ""


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the config."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a section or None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys
