"""What is right for rows that `generate` answers, where they say so, and how good each answer is."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ptune_dist.config.schema import DataConfig, EvaluateConfig
from ptune_dist.data.build import build_templates, label_column
from ptune_dist.data.chat import read_messages, text_of_content
from ptune_dist.data.json_values import text_of
from ptune_dist.data.numbers import read_number
from ptune_dist.data.references import read_references
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import TARGET_KEY, Template, render_row
from ptune_dist.errors import UserError
from ptune_dist.metrics import METRICS
from ptune_dist.metrics.metric import Metric, Need


@dataclass(frozen=True)
class RowScores:
    """Adds to an answer what is right for its row, and the metrics that one row has a score in."""

    data: DataConfig
    target: Template | None  # None where rows are conversations
    label: str | None  # the column of the labels that are chosen among, where they are
    metrics: list[Metric]

    def __call__(self, row: dict[str, Any], answer: str, where: Callable[[], str]) -> dict[str, Any]:
        """Empty for a row that lacks a value."""
        try:
            accepted = self.read_accepted(row, where)
        except UserError:
            return {}
        if not accepted:
            return {}
        found: dict[str, Any] = {"gold": accepted[0] if len(accepted) == 1 else accepted}
        given: dict[Need, tuple[Any, list[Any]]] = {"answers": (answer, accepted)}
        if self.label is not None:
            found["gold_label"] = text_of(row.get(self.label))
            given["label_losses"] = (answer, [found["gold_label"]])
        right = read_number(accepted[0])
        predicted = read_number(answer)
        if right is not None and predicted is not None:
            given["values"] = (predicted, [right])
        for metric in self.metrics:
            if metric.needs in given:
                own, references = given[metric.needs]
                found[metric.name] = float(metric.compute([own], [references]))
        return found

    def names(self) -> list[str]:
        """What may be added to a row beside its answer."""
        return ["gold", *(["gold_label"] if self.label is not None else []), *(metric.name for metric in self.metrics)]

    def read_accepted(self, row: dict[str, Any], where: Callable[[], str]) -> list[str]:
        """The acceptable answers. Raises UserError for a row without any."""
        if self.target is None:
            assert self.data.messages is not None
            last = read_messages(row.get(self.data.messages), self.data.messages, where)[-1]
            return [text_of_content(last["content"]).strip()] if last["role"] == "assistant" else []
        if self.data.references is None:
            return [render_row(self.target, row, key=TARGET_KEY, where=where).strip()]
        column, *names = [self.data.references] if self.data.references in row else self.data.references.split(".")
        return read_references(row.get(column), names, where)


def build_row_scores(
    data: DataConfig, evaluate: EvaluateConfig, rows: Rows, *, chooses_label: bool
) -> RowScores | None:
    """None where the rows have no column that says what is right. Raises UserError."""
    if data.template is None and data.messages is None:
        return None
    target = None
    if data.messages is None:
        _, target = build_templates(data)
        needed = target.row_columns if data.references is None else [find_column(data.references, rows)]
        if not needed or any(name not in rows.columns() for name in needed):
            return None
    label = label_column(data) if chooses_label else None
    metrics = [METRICS[name] for name in evaluate.metrics]
    usable = [metric for metric in metrics if metric.is_mean and metric.needs != "losses" and is_available(metric)]
    return RowScores(data, target, label, usable)


def find_column(references: str, rows: Rows) -> str:
    """The column of `data.references`, which may name a value inside it."""
    return references if references in rows.columns() else references.partition(".")[0]


def is_available(metric: Metric) -> bool:
    try:
        metric.check_available()
    except UserError:
        return False
    return True


def add_scores(scores: RowScores | None, rows: Rows, number: int, found: dict[str, Any]) -> dict[str, Any]:
    """A row with its answer and, where the row says what is right, its scores."""
    (row,) = rows.read(number, number + 1)
    own = scores(row, found["generated"], functools.partial(rows.where, number)) if scores else {}
    names = {*found, *scores.names()} if scores else found.keys()
    return keep_apart(row, names) | found | own


def keep_apart(row: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A row whose columns have none of these names, which results are written under: `row_` is put before them."""
    kept: dict[str, Any] = {}
    for column, value in row.items():
        name = column
        while name in names or (name != column and name in row):
            name = f"row_{name}"
        kept[name] = value
    return kept
