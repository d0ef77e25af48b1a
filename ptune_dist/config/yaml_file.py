"""A config as it is written: a YAML file and `key.path=value` on the command line, before anything is checked."""

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml

from ptune_dist.errors import UserError

BARE_TEMPLATE = re.compile(r":\s+\{\{")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML silently keeps the last, and a key that is not plain text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError naming file and line."""
    text = ""
    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = yaml.load(text, Loader=UniqueKeyLoader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        hint = '; put a template in quotes: "{{ column }}"' if mark and has_bare_template(text, mark.line) else ""
        raise UserError(f"{path}{line}: not valid YAML: {problem}{hint}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, found {type(raw).__name__}")
    return raw


def has_bare_template(text: str, line: int) -> bool:
    """Whether the line, from 0, has a value that begins with {{ without quotes, which YAML reads as a mapping."""
    lines = text.splitlines()
    return line < len(lines) and BARE_TEMPLATE.search(lines[line]) is not None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in place; the value is YAML, so numbers, lists and null work."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"command line: {override!r} is not key.path=value")
    max_split = 1 if key.startswith("sweep.") else -1  # the keys of a sweep are dotted themselves
    *parents, leaf = key.split(".", max_split)
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"command line: {key}: {parent} is a value, not a section")
        node = child
    node[leaf] = parse_value(value)


def parse_value(text: str) -> Any:
    """YAML, except that 1e-3 is a number (YAML wants 1.0e-3) and what is not YAML, such as `{{ word }} =`, is text."""
    with contextlib.suppress(ValueError):
        if "e" in text.lower() and text[:1] in "0123456789.-+":
            return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
