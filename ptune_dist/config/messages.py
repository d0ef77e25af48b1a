"""What is wrong with a config, in one line: where it was given, the key, what is wrong, and the nearest known key."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError

from ptune_dist.config.schema import Config


def describe_validation_error(error: ValidationError, path: str | Path, overrides: Sequence[str]) -> str:
    """The first thing wrong, in one line: file (or command line), key, what, and the nearest known key."""
    key, what = describe_first_error(error)
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
    parts = [str(part) for part in first["loc"] if not str(part).startswith(("function", "dict", "str"))]
    key = prefix + ".".join(parts)
    if first["type"] == "extra_forbidden":
        return key, describe_unknown_key(key, known_keys(section, prefix))
    if first["type"] == "missing":
        return key, f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith(key):  # a check of several keys, or of a sweep's, names them itself
        return key, message
    shown = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return key, f"{key}: {message}{shown}"


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """`unknown key KEY, did you mean OTHER?`, without a guess where no known key is like it."""
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
