"""The acceptable answers to a row: what generated answers are compared with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.chat import ANSWER
from ptune_dist.data.examples import Examples
from ptune_dist.data.framing import tokenize
from ptune_dist.data.json_values import text_of
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import compile_template, render_batches
from ptune_dist.data.workers import Encode
from ptune_dist.errors import UserError

BATCH_ROWS = 1000
KEY = "data.references"


def build_references(data: DataConfig, rows: Rows) -> list[list[str]]:
    """One or several texts for each row, without whitespace at either end.

    They are read from the column `data.references`, in which `answers.text` is what `text` holds inside column
    `answers`; without one, the rendered target is the only reference. Raises UserError with the row and the key.
    """
    if data.references is None and data.messages is not None:
        return [[row[ANSWER].strip()] for row in rows.read(0, len(rows))]
    if data.references is None:
        assert data.target is not None, "rows that are not plain text have a target"
        template = compile_template(data.target, key="data.target", optional=data.optional_columns)
        batches = render_batches(rows, {"data.target": template}, BATCH_ROWS)
        return [[text.strip()] for _, texts in batches for text in texts]
    return find_references(data.references, rows)(0, len(rows))


def find_references(path: str, rows: Rows) -> Callable[[int, int], list[list[str]]]:
    """What reads the references of a range of rows. Raises UserError for a column that they lack."""
    column, *names = [path] if path in rows.columns() else path.split(".")
    if column not in rows.columns():
        raise UserError(
            f"{KEY} is column {column!r}, which {rows.name} does not have; "
            f"its columns: {', '.join(rows.columns()) or 'none'}"
        )

    def read(first: int, end: int) -> list[list[str]]:
        return [
            read_references(row.get(column), names, functools.partial(rows.where, index))
            for index, row in enumerate(rows.read(first, end), first)
        ]

    return read


def checking_references(encode: Encode, path: str, rows: Rows) -> Encode:
    """`encode`, which then refuses rows without references too; `rows` have them. Raises UserError."""
    read = find_references(path, rows)

    def encode_checked(*, first_row: int, end_row: int) -> Examples:
        read(first_row, end_row)
        return encode(first_row=first_row, end_row=end_row)

    return encode_checked


def read_references(value: Any, names: list[str], where: Callable[[], str]) -> list[str]:
    """The texts of one row's value, which is a text, a number or a list of them, found under `names` inside it."""
    for name in names:
        value = [look_up(part, name) for part in value] if isinstance(value, list) else look_up(value, name)
    listed = value if isinstance(value, list) else [value]
    if not listed or any(reference is None for reference in listed):
        raise UserError(f"{where()}: {KEY} is missing, null or empty for this row; fill it or drop the row")
    for reference in listed:
        if not isinstance(reference, str | int | float):
            kind = type(reference).__name__
            raise UserError(f"{where()}: {KEY} holds a {kind}; a text or a list of texts is needed")
    return [text_of(reference).strip() for reference in listed]


def look_up(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def longest_reference(references: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest reference, and one to end with."""
    texts = sorted({text for row in references for text in row}, key=len)
    return 1 + max(map(len, tokenize(tokenizer, texts)), default=0)
