"""Which task each row is of: named by a column, or by the file that a row comes from."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.examples import Examples
from ptune_dist.data.label_names import describe_unlisted
from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError

BATCH_ROWS = 1000
DEFAULT_COLUMN = "task"  # of rows whose files name their tasks


@dataclass(frozen=True)
class TaskRows(Rows):
    """The rows of one source for each task, one after another, with the task's name in column `column`."""

    parts: dict[str, Rows] = dataclasses.field(default_factory=dict)
    column: str = DEFAULT_COLUMN

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def columns(self) -> list[str]:
        names = {name: None for part in self.parts.values() for name in part.columns()}
        return [*names, self.column]

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for task, part in self.parts.items():
            some = part.read(max(0, first), min(len(part), last)) if last > 0 and first < len(part) else []
            found += [{**row, self.column: task} for row in some]
            first -= len(part)
            last -= len(part)
        return found

    def first(self, count: int) -> "Rows":
        """As many of each task, so that none is left out."""
        share = max(1, count // len(self.parts))
        return dataclasses.replace(self, parts={task: part.first(share) for task, part in self.parts.items()})

    def where(self, index: int) -> str:
        for part in self.parts.values():
            if index < len(part):
                return part.where(index)
            index -= len(part)
        raise IndexError(index)


def task_column(data: DataConfig) -> str | None:
    """The column that names a row's task; None where rows have no tasks."""
    if data.task is not None:
        return data.task
    return DEFAULT_COLUMN if isinstance(data.tasks, dict) else None


def join_task_rows(data: DataConfig, which: str, load: Callable[[str, str], Rows]) -> Rows:
    """The rows of all tasks that have a file for this split; `load` takes a source and its key. Raises UserError."""
    assert isinstance(data.tasks, dict)
    column = task_column(data) or DEFAULT_COLUMN
    parts: dict[str, Rows] = {}
    for task, files in data.tasks.items():
        source = getattr(files, which)
        if source is None:
            continue
        key = f"data.tasks.{task}.{which}"
        part = load(source, key)
        if part.kind == "text":
            raise UserError(f"{key}: {source} is plain text, whose rows have no columns: use another format")
        if column in part.columns():
            raise UserError(
                f"{key}: {source} has a column {column!r} already, which would hold the task's name: name another one "
                "in data.task"
            )
        parts[task] = part
    unreadable = {name: kind for part in parts.values() for name, kind in part.unreadable.items()}
    name = ", ".join(part.name for part in parts.values())
    return TaskRows(name, next(iter(parts.values())).source, "rows", unreadable, parts, column)


def read_tasks(data: DataConfig, rows: Rows) -> np.ndarray | None:
    """The number of each row's task among `data.tasks`, int32 [N]; None where rows have no tasks. Raises UserError."""
    column = task_column(data)
    if column is None:
        return None
    if column not in rows.columns():
        raise UserError(
            f"data.task is column {column!r}, which {rows.name} does not have; its columns: {', '.join(rows.columns())}"
        )
    numbers = {task: number for number, task in enumerate(data.tasks or [])}
    found = np.zeros(len(rows), np.int32)
    for first in range(0, len(rows), BATCH_ROWS):
        for index, row in enumerate(rows.read(first, first + BATCH_ROWS), first):
            value = row.get(column)
            if str(value) not in numbers:
                raise UserError(describe_unlisted(rows.where(index), column, value, list(numbers), key="data.tasks"))
            found[index] = numbers[str(value)]
    return found


def with_tasks(examples: Examples, tasks: np.ndarray | None) -> Examples:
    """The examples with the numbers of their tasks, which are part of what a resumed run compares."""
    if tasks is None:
        return examples
    digest = hashlib.sha256(np.ascontiguousarray(tasks).data).hexdigest()[:16]
    facts = dataclasses.replace(examples.known, digest=f"{examples.known.digest}/{digest}")
    return dataclasses.replace(examples, tasks=tasks, facts=facts)
