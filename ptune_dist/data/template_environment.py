"""The jinja2 environment of templates: what a missing value does, and how values become text.

A column or a value that a row lacks is false in a test and an error where it is printed; null is the same. Expressions
over it (`input | trim`, `meta.author`, `input.strip()`) are missing too, so a template can test for any of them. What
jinja2 would make up without a word is an error: the text of a method (`printing.py`), 0 for what is no number, a random
item.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, cast

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

from ptune_dist.data.numbers import to_float, to_integer
from ptune_dist.data.printing import Formatter, formatted, join_values, json_text, printed
from ptune_dist.data.template_names import names_in, show_expression, tested_names

# Filters that take any value for its text. Others, such as `length` or `map`, read a list of parts as a list.
TEXT_FILTERS = (
    *("capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "string", "striptags"),
    *("title", "trim", "truncate", "upper", "wordcount", "wordwrap"),
)
DEFAULT_FILTERS = ("default", "d")
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
    """A sandbox in which a null inside a row is Missing, and values print the same wherever they are made text."""

    intercepted_binops = frozenset("%")

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """`'%s' % value` prints a value as `{{ value }}` does."""
        if isinstance(left, str):
            if isinstance(right, tuple):
                right = tuple(map(formatted, right))
            elif isinstance(right, dict) and "%(" in left:
                right = {name: formatted(value) for name, value in right.items()}
            else:
                right = formatted(right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`'{}'.format(value)` prints a value as `{{ value }}` does."""
        if super().wrap_str_format(value) is None:
            return None
        source = str(value.__self__)

        def format_text(*arguments: Any, **options: Any) -> str:
            if value.__name__ == "format_map":
                return Formatter(self).vformat(source, (), arguments[0])
            return Formatter(self).vformat(source, arguments, options)

        return format_text

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._known(super().getattr(obj, attribute), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Missing):
            return obj
        if isinstance(obj, dict) and argument not in obj:  # m['items'] is a key and never a method
            return self.undefined(obj=obj, name=argument)
        return self._known(super().getitem(obj, argument), argument)

    def _known(self, value: Any, name: object) -> Any:
        return Null(hint=f"{name!r} is null", name=str(name)) if value is None else value

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Explicit().visit(super()._parse(source, name, filename))


class _Explicit(jinja2.visitor.NodeTransformer):
    """Makes explicit what a filter cannot know.

    The parts of `a ~ b` are printed as `{{ a }}{{ b }}` would be, what `or` gives a fallback is marked, and `int` and
    `float` get the expression that they are applied to, for messages.
    """

    def visit_Filter(self, node: jinja2.nodes.Filter) -> jinja2.nodes.Node:
        expression = show_expression(node.node)
        node = cast(jinja2.nodes.Filter, self.generic_visit(node))
        if node.name in ("int", "float") and expression:
            given = jinja2.nodes.Keyword("expression", jinja2.nodes.Const(expression))
            node.kwargs = [*node.kwargs, cast(jinja2.nodes.Pair, given)]  # jinja2's type is that of a dict
        return node

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
        "pprint": to_json,
        "format": passing_missing(format_text, takes_text=True),
        "int": passing_missing(to_integer, takes_text=False),
        "float": passing_missing(to_float, takes_text=False),
        PRINTED: printed,
        FALLBACK: lambda value: None if isinstance(value, Missing) else value,
    }
    del environment.filters["random"]  # every rank and every start must make the same text of a row
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
    return json_text(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def format_text(source: str, *arguments: Any, **options: Any) -> str:
    """jinja2's `format`, in which a value prints as `{{ value }}` does."""
    if arguments and options:
        raise jinja2.UndefinedError("format takes values by position or by name, not both")
    return source % ({name: formatted(value) for name, value in options.items()} or tuple(map(formatted, arguments)))


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
