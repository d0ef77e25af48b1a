"""Text from a row: jinja2 templates over the row's columns, in a sandbox, with nothing missing going unnoticed."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jinja2
import jinja2.meta
import jinja2.sandbox

from ptune_dist.errors import UserError


@dataclass(frozen=True)
class Template:
    """A compiled template; `columns` are the names that it takes from a row, sorted."""

    source: str
    columns: tuple[str, ...]
    compiled: jinja2.Template = field(repr=False, compare=False)

    def render(self, row: Mapping[str, object]) -> str:
        """Raises jinja2's errors, or whatever an expression raises; `render_row` makes them the user's."""
        return self.compiled.render({column: row[column] for column in self.columns if column in row})


def compile_template(source: str, *, key: str) -> Template:
    """Compile the template written under config key `key`; UserError with the template's line on a syntax error."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null
    )
    environment.globals.clear()  # `range`, `dict` and the like are good names for columns
    try:
        parsed = environment.parse(source)
        compiled = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{key}: line {error.lineno} of the template: {error.message}") from None
    return Template(source, tuple(sorted(jinja2.meta.find_undeclared_variables(parsed))), compiled)


def check_columns(template: Template, available: list[str], *, key: str, source_name: str) -> None:
    """UserError when the template under `key` uses a column that the source lacks."""
    for column in template.columns:
        if column not in available:
            near = difflib.get_close_matches(column, available, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"{key} uses column {column!r}, which {source_name} does not have; {hint}"
                f"its columns: {', '.join(available) or 'none'}"
            )


def render_row(template: Template, row: Mapping[str, object], *, key: str, where: Callable[[], str]) -> str:
    """Render one row; UserError when a used column is null or rendering fails. `where` names the row if it must."""
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


def _refuse_null(value: object) -> object:
    """Without this a null inside a row, as in {{ meta.author }}, would be printed as 'None'."""
    if value is None:
        raise jinja2.UndefinedError("a value in {{ ... }} is null")
    return value
