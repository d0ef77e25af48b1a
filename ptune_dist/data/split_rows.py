"""The rows of a split as the config's `data` section asks for them, before they are tokenized."""

from collections.abc import Callable
from pathlib import Path

from ptune_dist.common.files import text_suffix
from ptune_dist.config.schema import DataConfig
from ptune_dist.config.sections import CsvConfig
from ptune_dist.data.alternatives import find_path, spread_alternatives
from ptune_dist.data.chat import spread_turns
from ptune_dist.data.delimited import DELIMITED_SUFFIXES, CsvDialect
from ptune_dist.data.encode import Encoding
from ptune_dist.data.held_out import HeldOut
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.data.tasks import join_task_rows
from ptune_dist.data.views import PickedRows, join_rows
from ptune_dist.errors import UserError


def load_split(data: DataConfig, which: str, held_out: HeldOut | None, read_source: Callable[[], Rows]) -> Rows:
    """The rows of a split: those of its sources, or a part of the training rows. Raises UserError."""
    if which == "validation" and held_out is None:
        return load_sources(data, "validation")
    rows = read_source()
    if held_out is None:
        return rows
    held_out.check(rows)
    return PickedRows.of(rows, held_out.rows if which == "validation" else held_out.others())


def load_source_rows(data: DataConfig) -> Rows:
    """The rows of `data.train`, as many as are asked for. Raises UserError."""
    rows = load_sources(data, "train")
    return rows.first(data.max_examples) if data.max_examples else rows


def load_sources(data: DataConfig, which: str) -> Rows:
    """All rows of a split's sources, one after another. Raises UserError."""

    def load_source(source: str, key: str) -> Rows:
        return load_rows(source, key=key, default_split=which, csv=csv_dialect(data), revision=data.revision)

    if isinstance(data.tasks, dict):
        return join_task_rows(data, which, load_source)
    sources = data.train_sources if which == "train" else data.validation_sources
    return join_rows([load_source(source, f"data.{which}") for source in sources], f"data.{which}")


def is_grouped(data: DataConfig, which: str) -> bool:
    """Whether a row makes several examples, which belong together."""
    return data.messages is not None or (which == "train" and bool(find_path(data)))


def is_first_of_several(data: DataConfig, which: str) -> bool:
    """Whether only the first of a row's references is tokenized."""
    return which == "validation" and bool(find_path(data))


def arrange(data: DataConfig, encoding: Encoding, which: str, rows: Rows) -> Rows:
    """The rows that are tokenized: of a conversation its turns, of a row with several references one for each."""
    if data.messages is not None:
        assert encoding.chat is not None
        return spread_turns(rows, data, encoding.chat)
    path = find_path(data)
    return spread_alternatives(rows, path, only_first=which == "validation") if path else rows


def check_csv_keys(data: DataConfig) -> None:
    """Raise UserError where keys of data.csv are given that no source of the config follows."""
    given = [name for name, value in data.csv if value != getattr(CsvConfig(), name)]
    sources = [*data.train_sources, *data.validation_sources]
    if given and not any(text_suffix(Path(source)) in DELIMITED_SUFFIXES for source in sources):
        raise UserError(
            f"data.csv.{given[0]} is given, but {' and '.join(dict.fromkeys(sources))} is no .csv or .tsv file: leave "
            "data.csv out"
        )


def csv_dialect(data: DataConfig) -> CsvDialect:
    return CsvDialect(**data.csv.model_dump())
