"""Render rows to text: sandboxed jinja2 templates over a row's columns; printing a missing or null value is an error.

With placement `template` the name `prompt` is not a column: `{{ prompt }}` marks where the virtual tokens stand.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.meta

from ptune_dist.config.prompt_text import Around
from ptune_dist.data.json_values import text_of
from ptune_dist.data.label_names import describe_unlisted
from ptune_dist.data.sources import Rows
from ptune_dist.data.template_environment import (
    MissingColumn,
    UntestedTruth,
    build_environment,
    find_guarded,
    missing_column,
)
from ptune_dist.data.template_names import find_expressions, find_reserved
from ptune_dist.errors import UserError

MARKER_NAME = "prompt"
LINE_BREAK = '{{ "\\n" }}'  # one that no `-` of a neighbour removes
# {{ prompt }} is rendered as these private-use characters, which no filter alters and no text has in this order.
MARKER = "\ue5a1\uf3c7\ue09d\uf61b\ue2f4\uf08e"
# Columns that hold the messages of a chat, and the name of a message's text.
CHATS = {"messages": "content", "conversations": "value", "conversation": "content"}
TEMPLATE_KEY = "data.template"
TARGET_KEY = "data.target"


@dataclass(frozen=True)
class Template:
    """A compiled template; `columns` are the names that it reads from a row, sorted, without the marker's.

    guarded: those that it tests or gives a fallback, so that a row may lack them. empty: those that are empty text
    where a row lacks them. labels: the values that its one column may take, if they are known. fixed: values that win
    over the row's. reserved: names that it uses and that are not columns to the template language, such as `true`.
    owners: the config keys of columns that only the texts around a template use.
    """

    source: str
    columns: tuple[str, ...]
    compiled: jinja2.Template = field(repr=False, compare=False)
    has_marker: bool = False
    is_target: bool = False
    guarded: frozenset[str] = frozenset()
    empty: frozenset[str] = frozenset()
    reserved: frozenset[str] = frozenset()
    labels: tuple[str, ...] | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable[..., "Template"], tuple[object, ...]]:
        """Pickled as its source: compiled templates have no pickled form."""
        key = TARGET_KEY if self.is_target else TEMPLATE_KEY
        given = {"labels": self.labels, "fixed": dict(self.fixed), "owners": dict(self.owners)}
        return _compile_again, (self.source, key, self.has_marker, self.empty, given)

    @property
    def row_columns(self) -> list[str]:
        """The columns that are read from a row."""
        return [column for column in self.columns if column not in self.fixed]

    def with_fixed(self, column: str, value: object) -> "Template":
        """The same template where `column` has this value in every row."""
        return dataclasses.replace(self, fixed={**self.fixed, column: value}, labels=None)

    def render(self, row: Mapping[str, object]) -> str:
        """The text of a row. Raises any error of jinja2 or of an expression; `render_row` makes them UserErrors."""
        values = {column: self._value_of(column, row) for column in self.columns}
        if self.has_marker:
            values[MARKER_NAME] = MARKER
        return self.compiled.render(values)

    def _value_of(self, column: str, row: Mapping[str, object]) -> object:
        value = self.fixed[column] if column in self.fixed else row.get(column)
        if value is not None:
            return value
        return "" if column in self.empty else missing_column(column, in_target=self.is_target)


def compile_template(source: str, *, key: str, marker: bool = False, optional: Collection[str] = ()) -> Template:
    """Compile the template under config key `key`; with `marker`, it must contain `{{ prompt }}`.

    `optional` columns are empty text where a row lacks them. Raises UserError for a syntax error, with the line in the
    template, and for a missing marker.
    """
    environment = shared_environment()
    try:
        parsed = environment.parse(source)
        compiled = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{key}: line {error.lineno} of the template: {error.message}") from None
    names = jinja2.meta.find_undeclared_variables(parsed)
    if marker and MARKER_NAME not in names:
        raise UserError(f"{key}: placement template needs {{{{ prompt }}}} where the virtual tokens stand")
    columns = names - {MARKER_NAME} if marker else names
    is_target = key == TARGET_KEY
    guarded = frozenset(find_guarded(parsed, in_target=is_target) & columns)
    empty = frozenset(columns & set(optional))
    reserved = frozenset(find_reserved(parsed))
    return Template(source, tuple(sorted(columns)), compiled, marker, is_target, guarded, empty, reserved)


@functools.cache
def shared_environment() -> jinja2.Environment:
    return build_environment()


def _compile_again(source: str, key: str, marker: bool, empty: frozenset[str], given: Mapping[str, Any]) -> Template:
    template = compile_template(source, key=key, marker=marker, optional=empty)
    return dataclasses.replace(template, **given)


def surround(template: Template, around: Around) -> Template:
    """An input's template with the texts around it. Raises UserError as `compile_template` does, with a text's key."""
    texts = [*around.before, *around.after]
    if not texts:
        return template
    owners: dict[str, str] = {}
    for key, text in texts:
        own = compile_template(text, key=key)
        owners |= {column: key for column in own.columns if column not in template.columns}
    source = template.source
    if around.after and not around.joins:
        source = source.removesuffix("\n")
    whole = around.head(LINE_BREAK) + source + around.tail(LINE_BREAK)
    found = compile_template(whole, key=TEMPLATE_KEY, marker=template.has_marker, optional=template.empty)
    return dataclasses.replace(found, owners=owners)


def check_columns(template: Template, available: Sequence[str], *, key: str, source_name: str) -> None:
    """Raise UserError if the template under `key` needs a column that the source does not have, or cannot reach one.

    A column that rows may lack is not needed; `find_absent` names it.
    """
    for column in available:
        if column in template.reserved:
            raise UserError(
                f"{key} uses {column!r}, which the template language keeps for itself, and {source_name} has a column "
                "of this name, which no template can reach: rename the column"
            )
    for column in template.row_columns:
        if column not in available and column not in template.guarded | template.empty:
            hint = name_nearest(column, available, "? ")
            if column == MARKER_NAME:
                hint += "set prompt.placement=template if it marks the place of the virtual tokens; "
            hint += next((f"{describe_chat(name)}; " for name in available if name in CHATS), "")
            raise UserError(
                f"{template.owners.get(column, key)} uses column {column!r}, which {source_name} does not have; {hint}"
                f"its columns: {', '.join(available) or 'none'}"
            )


def describe_chat(column: str) -> str:
    """How a template reads the messages of a chat."""
    text = CHATS[column]
    return (
        f"the text of a chat's messages is {{{{ {column}[0].{text} }}}} and so on, the last one's "
        f"{{{{ {column}[-1].{text} }}}}"
    )


def find_shared(template: Template, target: Template, row: Mapping[str, object]) -> list[str]:
    """The texts and numbers of a row that both the input and the target are made of, as their templates write them."""
    environment = shared_environment()
    both = set.intersection(*(set(find_expressions(environment.parse(some.source))) for some in (template, target)))
    found = []
    for expression in sorted(both):
        try:
            value = environment.compile_expression(expression)(row)
        except Exception:  # expressions are the user's code and may raise anything
            continue
        if isinstance(value, str | int | float):
            found.append(expression)
    return found


def find_absent(template: Template, available: Sequence[str]) -> list[str]:
    """Columns that rows may lack and that no row of a source has: perhaps misspelled ones."""
    return [column for column in template.row_columns if column not in available]


def name_nearest(name: str, known: Sequence[str], end: str = "?") -> str:
    """ "did you mean ...?", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}{end}" if near else ""


def render_row(template: Template, row: Mapping[str, object], *, key: str, where: Callable[[], str]) -> str:
    """Render one row. Raises UserError if a null is printed or rendering fails; `where` then names the row."""
    if template.labels is not None:
        (column,) = template.columns
        value = row.get(column)
        if value is not None and text_of(value) not in template.labels:
            raise UserError(describe_unlisted(where(), column, value, template.labels))
    try:
        return template.render(row)
    except MissingColumn as error:
        key = template.owners.get(str(error), key)
        raise UserError(describe_missing(str(error), key, where(), isinstance(error, UntestedTruth))) from None
    except Exception as error:  # expressions are the user's code and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where()}: {key} cannot be rendered: {reason}") from None


def describe_missing(column: str, key: str, where: str, is_tested: bool) -> str:
    """What can be done about a row that lacks a column."""
    guard = f"{{{{ {column} | default('') }}}}" if is_tested or key == TARGET_KEY else f"{{% if {column} %}}"
    return (
        f"{where}: column {column!r}, which {key} uses, is missing or null; fill it or drop the row, or, "
        f"if rows may lack it, write {guard} or list it in data.optional_columns"
    )


def render_batches(
    rows: Rows, templates: dict[str, Template], batch_rows: int, first_row: int = 0, end_row: int | None = None
) -> Iterator[tuple]:
    """Yield (index of the first row, texts of the first template, texts of the second, ...) of `batch_rows` rows each.

    The keys of `templates` are config keys. Raises UserError as `render_row` does.
    """
    end = len(rows) if end_row is None else end_row
    for first in range(first_row, end, batch_rows):
        batch = rows.read(first, min(end, first + batch_rows))
        texts = [
            [
                render_row(template, row, key=key, where=functools.partial(rows.where, index))
                for index, row in enumerate(batch, first)
            ]
            for key, template in templates.items()
        ]
        yield first, *texts


def split_input(text: str, placement: str, *, key: str, where: Callable[[], str]) -> tuple[str, str]:
    """Split a rendered input into the text before the virtual tokens and the text after them.

    With placement `template` it is split at the marker. Raises UserError if the text does not have exactly one.
    """
    if placement in ("prefix", "encoder", "both"):
        return "", text
    if placement in ("infix", "decoder"):
        return text, ""
    assert placement == "template", placement
    parts = text.split(MARKER)
    if len(parts) != 2:
        raise UserError(
            f"{where()}: {key} renders {{{{ prompt }}}} {len(parts) - 1} times for this row; it must occur exactly once"
        )
    return parts[0], parts[1]
