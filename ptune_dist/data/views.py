"""Rows that are made of other rows: several sources as one, and some rows of a source."""

import dataclasses
from typing import Any

import numpy as np

from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError


@dataclasses.dataclass(frozen=True)
class JoinedRows(Rows):
    """The rows of several sources, one after another."""

    parts: tuple[Rows, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def columns(self) -> list[str]:
        return list({name: None for part in self.parts for name in part.columns()})

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part in self.parts:
            if last > 0 and first < len(part):
                found += part.read(max(0, first), min(len(part), last))
            first -= len(part)
            last -= len(part)
        return found

    def first(self, count: int) -> Rows:
        parts = []
        for part in self.parts:
            if count <= 0:
                break
            parts.append(part.first(count))
            count -= len(part)
        return dataclasses.replace(self, parts=tuple(parts))

    def where(self, index: int) -> str:
        for part in self.parts:
            if index < len(part):
                return part.where(index)
            index -= len(part)
        raise IndexError(index)


def join_rows(parts: list[Rows], key: str) -> Rows:
    """The rows of one source or of several; `key` names them. Raises UserError where text and rows are mixed."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    other = next((part for part in parts if part.kind != first.kind), None)
    if other is not None:
        text, rows = (first, other) if first.kind == "text" else (other, first)
        raise UserError(f"{key}: {text.name} is plain text and {rows.name} has rows: give files of one kind")
    unreadable = {name: kind for part in parts for name, kind in part.unreadable.items()}
    name = f"{first.name} and {len(parts) - 1} more"
    return JoinedRows(name, first.source, first.kind, unreadable, tuple(parts))


@dataclasses.dataclass(frozen=True)
class PickedRows(Rows):
    """Some rows of a source: `chosen` are their numbers there, int64 [N], in the order of the source."""

    base: Rows | None = None
    chosen: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, base: Rows, chosen: np.ndarray) -> "PickedRows":
        return cls(base.name, base.source, base.kind, base.unreadable, base, chosen)

    @property
    def whole(self) -> Rows:
        assert self.base is not None, "rows are picked from rows"
        return self.base

    def __len__(self) -> int:
        return len(self.chosen)

    def columns(self) -> list[str]:
        return self.whole.columns()

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        some = self.chosen[first:last]
        if not len(some):
            return []
        if some[-1] - some[0] < 4 * len(some):  # one read of what lies between
            start = int(some[0])
            rows = self.whole.read(start, int(some[-1]) + 1)
            return [rows[int(index) - start] for index in some]
        return [row for index in some.tolist() for row in self.whole.read(index, index + 1)]

    def first(self, count: int) -> Rows:
        return dataclasses.replace(self, chosen=self.chosen[:count])

    def where(self, index: int) -> str:
        return self.whole.where(int(self.chosen[index]))


@dataclasses.dataclass(frozen=True)
class GroupedRows(Rows):
    """Rows of which each row of a source makes one or several: its alternatives, or its parts.

    ends: int64 [rows of the source], how many rows it and those before it make.
    """

    base: Rows | None = None
    ends: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def whole(self) -> Rows:
        assert self.base is not None, "rows are made of rows"
        return self.base

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def columns(self) -> list[str]:
        return self.whole.columns()

    def make(self, row: dict[str, Any], number: int, index: int) -> dict[str, Any]:
        """The row number `number` that a row of the source makes, which is row `index` of all. Raises UserError."""
        raise NotImplementedError

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """The rows of the source that these rows are made of."""
        return np.searchsorted(self.ends, indices, side="right")

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        last = min(last, len(self))
        if first >= last:
            return []
        indices = np.arange(first, last)
        sources = self.sources_of(indices)
        start = int(sources[0])
        rows = self.whole.read(start, int(sources[-1]) + 1)
        found = []
        for index, source in zip(indices.tolist(), sources.tolist(), strict=True):
            number = index - (int(self.ends[source - 1]) if source else 0)
            found.append(self.make(rows[source - start], number, index))
        return found

    def first(self, count: int) -> Rows:
        if count >= len(self):
            return self
        return PickedRows.of(self, np.arange(count))

    def where(self, index: int) -> str:
        return self.whole.where(int(self.sources_of(np.array([index]))[0]))
