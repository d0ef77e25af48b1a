"""Validation rows that are drawn from the training rows, and their place in a run: split.json."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError

FILE = "split.json"


@dataclass(frozen=True)
class HeldOut:
    """The numbers of the validation rows among `num_rows` training rows: int64 [N], in order.

    is_fresh: the config alone decides them; else they are those that a run has stored.
    """

    asked: dict[str, Any]
    num_rows: int
    rows: np.ndarray
    is_fresh: bool = True

    @property
    def name(self) -> str:
        """Tells selections apart."""
        return hashlib.sha256(np.ascontiguousarray(self.rows).data).hexdigest()[:16]

    def others(self) -> np.ndarray:
        """The numbers of the rows that are trained on."""
        is_training = np.ones(self.num_rows, bool)
        is_training[self.rows] = False
        return np.flatnonzero(is_training)

    def check(self, rows: Rows) -> None:
        """Raise UserError where the rows are not those that were drawn from."""
        if len(rows) != self.num_rows:
            raise UserError(
                f"data.train: {rows.name} has {len(rows):,} rows, and had {self.num_rows:,} when the run drew its "
                "validation rows (split.json): restore them, or choose another output_dir"
            )

    def content(self) -> dict[str, Any]:
        """What split.json holds."""
        return {**self.asked, "num_rows": self.num_rows, "validation_rows": self.rows.tolist()}


def describe_asked(data: DataConfig) -> dict[str, Any]:
    return {"validation": data.validation, "split_seed": data.split_seed}


def choose_held_out(data: DataConfig, rows: Rows) -> HeldOut:
    """Draw validation rows. Raises UserError where there are too few."""
    return HeldOut(describe_asked(data), len(rows), draw(data, len(rows), is_text=rows.kind == "text"))


def draw(data: DataConfig, num_rows: int, *, is_text: bool) -> np.ndarray:
    """The numbers of validation rows, int64 [N]; of plain text, whose lines belong together, the last ones."""
    asked = data.validation
    assert isinstance(asked, (int, float)), "data.holds_out"
    count = max(1, round(asked * num_rows)) if asked < 1 else int(asked)
    if count >= num_rows:
        raise UserError(f"data.validation: {asked} takes {count:,} rows, and data.train has {num_rows:,}")
    if is_text:
        return np.arange(num_rows - count, num_rows)
    return np.sort(np.random.default_rng([data.split_seed, 0]).permutation(num_rows)[:count])


def read_held_out(data: DataConfig, folder: Path | None) -> HeldOut | None:
    """The validation rows that a run has stored for this config, if it has. Raises UserError for a damaged file."""
    if folder is None or not data.holds_out:
        return None
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        asked = {key: content[key] for key in describe_asked(data)}
        rows = np.array(content["validation_rows"], np.int64)
        num_rows = int(content["num_rows"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / FILE} is damaged: restore it, or choose another output_dir") from None
    if asked != describe_asked(data):  # of a run that never began
        return None
    if not len(rows) or rows[0] < 0 or rows[-1] >= num_rows:
        raise UserError(f"{folder / FILE} is damaged: restore it, or choose another output_dir")
    is_fresh = any(np.array_equal(rows, draw(data, num_rows, is_text=is_text)) for is_text in (False, True))
    return HeldOut(asked, num_rows, rows, is_fresh=is_fresh)
