"""Several acceptable answers to a row: `data.target` is rendered with each, and an epoch is trained on one of them."""

import dataclasses
from typing import Any

import jinja2.nodes
import numpy as np

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import shared_environment
from ptune_dist.data.template_environment import TEXT_FILTERS
from ptune_dist.data.template_names import show_expression
from ptune_dist.data.views import GroupedRows

BATCH_ROWS = 1000


def find_path(data: DataConfig) -> list[str]:
    """Where `data.target` prints all of `data.references`: the names on the way there; empty where it does not.

    A template that chooses by itself (`answers[0]`, `answers | join(', ')`) does not.
    """
    if data.references is None or data.target is None:
        return []
    try:
        parsed = shared_environment().parse(data.target)
    except jinja2.TemplateSyntaxError:  # reported where it is compiled
        return []
    path = data.references
    printed = sum(prints(node, path) for output in parsed.find_all(jinja2.nodes.Output) for node in output.nodes)
    uses = sum(show_expression(node) == path for node in parsed.find_all((jinja2.nodes.Name, jinja2.nodes.Getattr)))
    return path.split(".") if printed and printed == uses else []


def prints(node: jinja2.nodes.Node, path: str) -> bool:
    """Whether an expression is the value at a path, perhaps through filters of text."""
    while isinstance(node, jinja2.nodes.Filter) and node.name in TEXT_FILTERS and node.node is not None:
        node = node.node
    return show_expression(node) == path


@dataclasses.dataclass(frozen=True)
class AlternativeRows(GroupedRows):
    """Each row once for each of its answers, which stand in a list at `path`."""

    path: tuple[str, ...] = ()

    def make(self, row: dict[str, Any], number: int, index: int) -> dict[str, Any]:
        values = find_list(row, self.path)
        if values is None:
            return row
        return replace_at(row, self.path, values[number] if values else None)


def find_list(row: dict[str, Any], path: tuple[str, ...]) -> list[Any] | None:
    """The list at a path of a row; None where there is another value, or none."""
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, list) else None


def replace_at(row: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    name, *rest = path
    return {**row, name: replace_at(row[name], tuple(rest), value) if rest else value}


def spread_alternatives(rows: Rows, path: list[str], *, only_first: bool) -> AlternativeRows:
    """The rows with one answer each in place of a list of them: of every answer, or of the first alone."""
    counts = np.ones(len(rows), np.int64)
    for first in range(0, len(rows) if not only_first else 0, BATCH_ROWS):
        for index, row in enumerate(rows.read(first, first + BATCH_ROWS), first):
            counts[index] = max(1, len(find_list(row, tuple(path)) or ()))
    return AlternativeRows(rows.name, rows.source, rows.kind, rows.unreadable, rows, np.cumsum(counts), tuple(path))
