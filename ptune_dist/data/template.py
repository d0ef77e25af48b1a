"""Render rows to text: sandboxed jinja2 templates over a row's columns, in which a missing or null value is an error.

With placement `template` the name `prompt` is not a column: `{{ prompt }}` marks where the virtual tokens stand.
"""

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import jinja2
import jinja2.meta
import jinja2.sandbox

from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError

MARKER_NAME = "prompt"
# {{ prompt }} is rendered as these private-use characters, which no filter alters and no text has in this order.
MARKER = "\ue5a1\uf3c7\ue09d\uf61b\ue2f4\uf08e"


@dataclass(frozen=True)
class Template:
    """A compiled template; `columns` are the names that it reads from a row, sorted, without the marker's."""

    source: str
    columns: tuple[str, ...]
    compiled: jinja2.Template = field(repr=False, compare=False)
    has_marker: bool = False

    def render(self, row: Mapping[str, object]) -> str:
        """The text of a row. Raises any error of jinja2 or of an expression; `render_row` makes them UserErrors."""
        values = {column: row[column] for column in self.columns if column in row}
        if self.has_marker:
            values[MARKER_NAME] = MARKER
        return self.compiled.render(values)


def compile_template(source: str, *, key: str, marker: bool = False) -> Template:
    """Compile the template under config key `key`; with `marker`, it must contain `{{ prompt }}`.

    Raises UserError for a syntax error, with the line in the template, and for a missing marker.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null
    )
    environment.globals.clear()  # columns may be named `range`, `dict` and so on
    try:
        parsed = environment.parse(source)
        compiled = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{key}: line {error.lineno} of the template: {error.message}") from None
    names = jinja2.meta.find_undeclared_variables(parsed)
    if marker and MARKER_NAME not in names:
        raise UserError(f"{key}: placement template needs {{{{ prompt }}}} where the virtual tokens stand")
    columns = names - {MARKER_NAME} if marker else names
    return Template(source, tuple(sorted(columns)), compiled, marker)


def check_columns(template: Template, available: list[str], *, key: str, source_name: str) -> None:
    """Raise UserError if the template under `key` uses a column that the source does not have."""
    for column in template.columns:
        if column not in available:
            near = difflib.get_close_matches(column, available, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if column == "prompt":
                hint += "set prompt.placement=template if it marks the place of the virtual tokens; "
            raise UserError(
                f"{key} uses column {column!r}, which {source_name} does not have; {hint}"
                f"its columns: {', '.join(available) or 'none'}"
            )


def render_row(template: Template, row: Mapping[str, object], *, key: str, where: Callable[[], str]) -> str:
    """Render one row. Raises UserError if a used column is null or rendering fails; `where` then names the row."""
    for column in template.columns:
        if row.get(column) is None:
            raise UserError(
                f"{where()}: column {column!r}, which {key} uses, is missing or null; fill it or drop the row"
            )
    try:
        return template.render(row)
    except Exception as error:  # expressions are the user's code and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where()}: {key} cannot be rendered: {reason}") from None


def render_batches(rows: Rows, templates: dict[str, Template], batch_rows: int) -> Iterator[tuple]:
    """Yield (index of the first row, texts of the first template, texts of the second, ...) of `batch_rows` rows each.

    The keys of `templates` are config keys. Raises UserError as `render_row` does.
    """
    used = {column for template in templates.values() for column in template.columns}
    dataset = rows.dataset.select_columns([column for column in rows.columns() if column in used])
    for first in range(0, len(rows), batch_rows):
        count = min(batch_rows, len(rows) - first)
        columns = dataset[first : first + count] if used else {}
        batch = [{column: values[i] for column, values in columns.items()} for i in range(count)]
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
    if placement in ("prefix", "encoder"):
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


def _refuse_null(value: object) -> object:
    """Refuse a null inside a row, as in {{ meta.author }}, which jinja2 would print as 'None'."""
    if value is None:
        raise jinja2.UndefinedError("a value in {{ ... }} is null")
    return value
