"""Fill the tables of the docs that follow from the code: every key of the config, the options of methods, the metrics.

    python docs/fill_reference.py            # rewrite what stands between the marks of each page
    python docs/fill_reference.py --check    # status 1 where a page is not current

A block begins with `<!-- filled: NAME -->` and ends with `<!-- end filled -->`. Descriptions are those of the code: the
strings under the keys of the schema and of a method's options, and the docstrings of metrics.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from render_bases import render_bases
from render_methods import render_methods

from ptune_dist.config.schema import Config
from ptune_dist.families import FAMILIES
from ptune_dist.metrics import METRICS
from ptune_dist.objectives import OBJECTIVES
from ptune_dist.prompts import METHODS

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- filled: (?P<name>[a-z ]+) -->\n).*?(<!-- end filled -->)", re.DOTALL)
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}
PLURALS = {"text": "texts", "mapping": "mappings"}
NAMES = {"prompt.method": METHODS, "train.objective": OBJECTIVES}  # keys whose values are the names of a seam
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


def render_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render_keys(section: type[BaseModel], prefix: str) -> list[list[str]]:
    """A row for each plain key: key, type, default, meaning. Raises ValueError for a key without a description."""
    rows = []
    for key, field in section.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            rows += render_keys(inner, f"{prefix}{key}.") if prefix else []  # one inside a section stands with its keys
            continue
        if not field.description:
            raise ValueError(f"{prefix}{key} has no description: write a string under it")
        meaning = " ".join(field.description.split())
        names = NAMES.get(prefix + key)
        kind = ", ".join(f"`{name}`" for name in names) if names else describe_type(field.annotation, field.metadata)
        rows.append([f"`{prefix}{key}`", kind, describe_default(field), meaning])
    return rows


def render_section(name: str, section: type[BaseModel]) -> str:
    """A heading, the section's sentence and a table of its plain keys."""
    heading = f"### {name}" if name else "### Top level"
    sentence = (section.__doc__ or "").partition("\n\n")[0].strip()
    rows = render_keys(section, f"{name}." if name else "")
    return f"{heading}\n\n{sentence}\n\n{render_table(['key', 'type', 'default', 'meaning'], rows)}"


def render_reference() -> str:
    """All sections, the keys of the top level first."""
    parts = [render_section("", Config)]
    for name, field in Config.model_fields.items():
        section = section_of(field)
        if section is not None:
            parts.append(render_section(name, section))
    return "\n\n".join(parts)


def render_options() -> str:
    """The options that methods have of their own."""
    rows = []
    for name, method in METHODS.items():
        for row in render_keys(method.options_type, "prompt."):
            rows.append([f"`{name}`", *row])
    return render_table(["method", "option", "type", "default", "meaning"], rows)


def render_metrics() -> str:
    """What each metric is, what it is computed from and by which library."""
    needs = {
        "losses": "losses",
        "label_losses": "likelihoods of labels",
        "answers": "generated answers",
        "values": "numbers",
    }
    rows = []
    for name, metric in METRICS.items():
        function = getattr(metric.compute, "func", metric.compute)  # of a functools.partial
        if not function.__doc__:
            raise ValueError(f"metric {name} has no description: write a docstring for {function.__name__}")
        meaning = function.__doc__.partition("\n\n")[0]
        better = "higher" if metric.higher_is_better else "lower"
        rows.append([f"`{name}`", " ".join(meaning.split()), needs[metric.needs], better, metric.package or "-"])
    return render_table(["metric", "meaning", "computed from", "better", "library"], rows)


def render_learning_rates() -> str:
    """Each method's default learning rate and warm-up for each family that has it."""
    rows = []
    for name, method in METHODS.items():
        options = method.options_type.model_construct()
        found = {
            family: method.choose_training(options, family)
            for family in FAMILIES
            if method.families is None or family in method.families
        }
        cells = [f"{found[family].learning_rate:g}" if family in found else "-" for family in FAMILIES]
        sources = "; ".join(dict.fromkeys(defaults.source for defaults in found.values()))
        share = next(iter(found.values())).warmup_share
        rows.append([f"`{name}`", *cells, f"{share:.0%} of the steps" if share else "none", sources])
    return render_table(["method", *FAMILIES, "warm-up", "source"], rows)


RENDER: dict[str, Callable[[], str]] = {
    "every key": render_reference,
    "options of methods": render_options,
    "default learning rates": render_learning_rates,
    "metrics": render_metrics,
    "bases": render_bases,
    "what methods allow": render_methods,
}


def fill(text: str) -> str:
    """A page with its blocks filled."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{RENDER[found['name']]()}\n\n{found[3]}", text)


def main() -> int:
    status = 0
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"error: {page} is not current: run python docs/fill_reference.py", file=sys.stderr)
            status = 1
        else:
            page.write_text(filled, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
