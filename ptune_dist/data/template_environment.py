"""The jinja2 environment of templates: what a missing value does, and how values become text.

A column or a value that a row lacks is false in a test and an error where it is printed; null is the same. Expressions
over it (`input | trim`, `meta.author`, `input.strip()`) are missing too, so a template can test for any of them. What
jinja2 would print without a word although nobody means it, a method, a generator or null inside a list that is joined,
is an error. A chat message's content that is a list of parts prints as the text of its parts.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

from ptune_dist.data.json_values import dump_json

# Filters that take any value for its text. Others, such as `length` or `map`, read a list of parts as a list.
TEXT_FILTERS = (
    *("capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "string", "striptags"),
    *("title", "trim", "truncate", "upper", "urlencode", "wordcount", "wordwrap"),
)
DEFAULT_FILTERS = ("default", "d")
# Of the parts of a chat message's content, as OpenAI's and transformers' formats name them.
PART_TYPES = (
    *("text", "input_text", "output_text", "image", "image_url", "input_image", "audio", "audio_url", "input_audio"),
    *("video", "video_url", "file", "input_file"),
)
PRINTED = "_printed"  # filters that only `_Explicit` puts into a template
FALLBACK = "_fallback"


class MissingColumn(jinja2.UndefinedError):
    """A column that a row lacks, or that is null, was printed or computed with; the message is its name."""


class UntestedTruth(MissingColumn):
    """A missing column of a target was tested without a fallback: its text would depend on what the row lacks."""


class Missing(jinja2.StrictUndefined):
    """A value that is absent: false in a test, an error anywhere else. Attributes and calls of it are missing too."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("unsafe_callable", "alters_data"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> "Missing":
        return self

    def __call__(self, *arguments: object, **options: object) -> "Missing":
        return self

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, jinja2.Undefined):
            return True
        return self.fail()

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # nothing is looked up with what is absent

    def fail(self) -> NoReturn:
        raise self._undefined_exception(self._undefined_message)


class Null(Missing):
    """Null inside a row, which compares as null does."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, jinja2.Undefined)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class MissingInTarget(Missing):
    """A missing column of a target: it may have a fallback (`or`, `default`, `is defined`), but is not simply false."""

    __slots__ = ()

    def __bool__(self) -> bool:
        raise UntestedTruth(self._undefined_message)


def missing_column(name: str, *, in_target: bool) -> Missing:
    """What stands for a column that a row lacks. Using it raises MissingColumn with the name."""
    kind = MissingInTarget if in_target else Missing
    return kind(hint=name, name=name, exc=MissingColumn)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox in which a null inside a row is Missing."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._known(super().getattr(obj, attribute), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Missing):
            return obj
        return self._known(super().getitem(obj, argument), argument)

    def _known(self, value: Any, name: object) -> Any:
        return Null(hint=f"{name!r} is null", name=str(name)) if value is None else value

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Explicit().visit(super()._parse(source, name, filename))


class _Explicit(jinja2.visitor.NodeTransformer):
    """Lets the parts of `a ~ b` be printed as `{{ a }}{{ b }}` would be, and marks what `or` gives a fallback."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        node = cast(jinja2.nodes.Concat, self.generic_visit(node))
        node.nodes = [filtered(part, PRINTED) for part in node.nodes]
        return node

    def visit_Or(self, node: jinja2.nodes.Or) -> jinja2.nodes.Node:
        node = cast(jinja2.nodes.Or, self.generic_visit(node))
        node.left = filtered(node.left, FALLBACK)
        return node


def filtered(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Expr:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def build_environment() -> Environment:
    """The environment of all templates."""
    environment = Environment(undefined=Missing, keep_trailing_newline=True, finalize=printed)
    environment.globals.clear()  # columns may be named `range`, `dict` and so on
    for name, function in list(environment.filters.items()):
        if name not in DEFAULT_FILTERS:
            environment.filters[name] = passing_missing(function, takes_text=name in TEXT_FILTERS)
    environment.filters |= dict.fromkeys(DEFAULT_FILTERS, default_filter)
    environment.filters |= {
        "tojson": to_json,
        "join": passing_missing(join_values, takes_text=False),
        PRINTED: printed,
        FALLBACK: lambda value: None if isinstance(value, Missing) else value,
    }
    environment.tests["none"] = lambda value: value is None or isinstance(value, Missing)
    return environment


def passing_missing(function: Callable[..., Any], *, takes_text: bool) -> Callable[..., Any]:
    """A filter that leaves a missing value missing, so that it can be tested for."""
    num_before = int(hasattr(function, "jinja_pass_arg"))  # jinja2 passes its context or environment first

    @functools.wraps(function)
    def filter_value(*arguments: Any, **options: Any) -> Any:
        value = arguments[num_before]
        if value is None or isinstance(value, Missing):
            return value
        if takes_text and not isinstance(value, str):
            value = printed(value)
            arguments = (*arguments[:num_before], value, *arguments[num_before + 1 :])
        return function(*arguments, **options)

    return filter_value


def default_filter(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    """jinja2's `default`, which takes null for a missing value too."""
    is_missing = value is None or isinstance(value, jinja2.Undefined)
    return default_value if is_missing or (boolean and not value) else value


def to_json(value: Any, indent: int | None = None, *, ensure_ascii: bool = False, sort_keys: bool = False) -> Any:
    """Plain JSON with the keys in the row's order; jinja2's own sorts them and escapes for HTML."""
    if isinstance(value, Null):
        value = None
    if isinstance(value, Missing):
        return value
    return dump_json(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


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


def printed(value: Any) -> Any:
    """What a value prints as. Raises UndefinedError for what nobody means to print."""
    if isinstance(value, (str, int, float, Missing)):
        return value
    if value is None:
        raise jinja2.UndefinedError("a value in {{ ... }} is null")
    if isinstance(value, list) and is_content(value):
        return text_of_parts(value)
    if isinstance(value, (bytes, bytearray)):
        raise jinja2.UndefinedError("a value in {{ ... }} is bytes, not text")
    if isinstance(value, Iterator):
        raise jinja2.UndefinedError("a value in {{ ... }} is a generator: add | list or | join(', ')")
    if callable(value):
        name = getattr(value, "__name__", "a function")
        raise jinja2.UndefinedError(f"a value in {{{{ ... }}}} is the method {name!r}: write ['{name}'] for a key")
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


def find_guarded(parsed: jinja2.nodes.Template, *, in_target: bool) -> set[str]:
    """The names that a template gives a fallback or tests, so that a row may lack them."""
    found: set[str] = set()
    if not in_target:
        for node in parsed.find_all((jinja2.nodes.If, jinja2.nodes.CondExpr)):
            found |= tested_names(node.test)
    for node in parsed.find_all((jinja2.nodes.Filter, jinja2.nodes.Test)):
        if node.name in (*DEFAULT_FILTERS, FALLBACK, "defined", "undefined", "none"):
            found |= names_in(node.node)
    return found


def tested_names(test: jinja2.nodes.Node) -> set[str]:
    """The names whose truth a test asks for; what is compared with a value must be there."""
    if isinstance(test, jinja2.nodes.Compare):
        operands = [test.expr, *(operand.expr for operand in test.ops)]
        if not any(isinstance(node, jinja2.nodes.Const) and node.value is None for node in operands):
            return set()
    if isinstance(test, jinja2.nodes.Name):
        return {test.name}
    return set().union(*(tested_names(node) for node in test.iter_child_nodes()))


def names_in(node: jinja2.nodes.Node | None) -> set[str]:
    if node is None:
        return set()
    own = {node.name} if isinstance(node, jinja2.nodes.Name) else set()
    return own | {name.name for name in node.find_all(jinja2.nodes.Name)}
