"""Fill the reference in `docs/configuration.md` from the schema of the config, whose descriptions are its text.

python docs/fill_reference.py            # rewrite what stands between the marks
python docs/fill_reference.py --check    # status 1 where it is not current
"""

import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ptune_dist.config.schema import Config

PAGE = Path(__file__).parent / "configuration.md"
MARK = "<!-- reference: written by docs/fill_reference.py -->"
END = "<!-- end reference -->"
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}
PLURALS = {"text": "texts", "mapping": "mappings"}
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, None for a plain key."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def describe_type(annotation: Any, metadata: list[Any]) -> str:
    """A type in words, with the bounds that its metadata sets."""
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = [*more, *metadata]
    bounds = [BOUNDS[name].format(f"{bound:.10g}") for name, bound in bounds_of(metadata).items()]
    words = describe_plain(annotation)
    return f"{words}, {' and '.join(bounds)}" if bounds else words


def bounds_of(metadata: list[Any]) -> dict[str, float]:
    """The narrowest bounds among constraints, those of a nested Field included."""
    found = {}
    for item in metadata:
        for constraint in (item, *getattr(item, "metadata", ())):
            for name in BOUNDS:
                bound = getattr(constraint, name, None)
                if bound is not None:
                    found[name] = bound
    return found


def describe_plain(annotation: Any) -> str:
    if annotation in WORDS:
        return WORDS[annotation]
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(kind, []) for kind in arguments if kind is not NoneType)
    if origin is list:
        items = describe_type(arguments[0], [])
        return f"list of {PLURALS.get(items, items)}"
    if origin is tuple:
        return f"list of {len(arguments)}: {describe_type(arguments[0], [])}"
    if origin is dict:
        return "mapping"
    raise TypeError(f"no words for the type {annotation}")


def describe_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(default, str):
        return f"`{default}`"
    return f"`{json.dumps(default)}`"


def render_section(name: str, section: type[BaseModel]) -> str:
    """A heading, the section's sentence and a table of its plain keys."""
    lines = [f"### {name or 'Top level'}", "", (section.__doc__ or "").partition("\n\n")[0].strip(), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in section.model_fields.items():
        if section_of(field) is None:
            meaning = " ".join((field.description or "").split())
            dotted = f"{name}.{key}" if name else key
            lines.append(
                f"| `{dotted}` | {describe_type(field.annotation, field.metadata)} | {describe_default(field)} "
                f"| {meaning} |"
            )
    return "\n".join(lines)


def render_reference() -> str:
    """All sections, those of the top level first."""
    parts = [render_section("", Config)]
    for name, field in Config.model_fields.items():
        section = section_of(field)
        if section is not None:
            parts.append(render_section(name, section))
    return "\n\n".join(parts)


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARK)
    _, found, after = rest.partition(END)
    if not found:
        print(f"error: {PAGE}: no block between {MARK} and {END}", file=sys.stderr)
        return 2
    filled = f"{before}{MARK}\n\n{render_reference()}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if filled != text:
            print(f"error: {PAGE} is not current: run python docs/fill_reference.py", file=sys.stderr)
        return int(filled != text)
    PAGE.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
