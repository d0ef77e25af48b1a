"""Load a data source (`data.train: ...`) as Rows, which are read by number and can name the line of each row.

Text files are indexed and read by readers.py: they are not cached, so they cannot be stale, and ranks need no locks.
Parquet files, saved folders and hub datasets are loaded by `datasets`, with its cache and its locks.
"""

import contextlib
import dataclasses
import difflib
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import datasets.exceptions
import pyarrow
import pyarrow.parquet

from ptune_dist.common.hub import hub_answers
from ptune_dist.data.arrow_values import has_narrow_floats, shorten_floats, split_columns
from ptune_dist.data.content import COMPRESSED_SUFFIXES, HEAD_BYTES, find_kind, looks_like_text, text_suffix
from ptune_dist.data.delimited import CsvDialect
from ptune_dist.data.readers import TEXT_SUFFIXES, TextTable, open_table
from ptune_dist.errors import UserError

_FORMATS = (
    f"use {', '.join(TEXT_SUFFIXES)} (or one with {', '.join(COMPRESSED_SUFFIXES)} after it), .parquet, "
    "a folder saved by datasets, or a hub dataset name"
)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<config>[^:@]+))?(:(?P<split>[^:@]+))?")


@dataclass(frozen=True)
class Rows:
    """The rows of one source.

    name: the source as the user wrote it. kind: "text" for a .txt file, whose rows are its lines, with line breaks, in
    a column `text`; otherwise "rows". unreadable: columns that are left out, with their types. Rows can be pickled and
    read in other processes.
    """

    name: str
    source: TextTable | datasets.Dataset
    kind: str
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def columns(self) -> list[str]:
        """The names that occur in any row, in order of appearance."""
        return list(self.source.names if isinstance(self.source, TextTable) else self.source.column_names)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Rows `first` up to `last` (from 0): each with its own keys in its own order, and the values of the file."""
        last = min(last, len(self))
        if first >= last:
            return []
        if isinstance(self.source, TextTable):
            return self.source.read(first, last)
        columns: dict[str, list[Any]] = self.source[first:last]
        for name, feature in self.source.features.items():
            if has_narrow_floats(feature):
                columns[name] = [shorten_floats(value, feature) for value in columns[name]]
        return [{name: values[i] for name, values in columns.items()} for i in range(last - first)]

    def first(self, count: int) -> "Rows":
        """The first `count` rows, or all."""
        if count >= len(self):
            return self
        if isinstance(self.source, TextTable):
            return dataclasses.replace(self, source=self.source.first(count))
        return dataclasses.replace(self, source=self.source.select(range(count)))

    def where(self, index: int) -> str:
        """The place of row `index` (from 0) for error messages; slow, because it reads the file to count lines."""
        line = self.source.line_of(index) if isinstance(self.source, TextTable) else None
        return f"{self.name} row {index + 1} (the first is row 1)" if line is None else f"{self.name} line {line}"


def load_rows(source: str, *, key: str, default_split: str, csv: CsvDialect | None = None) -> Rows:
    """Load a file, a folder saved by `datasets`, or a hub dataset; `key` is the config key that names it.

    `csv` is how .csv and .tsv files are written. FOLDER:SPLIT and NAME@CONFIG:SPLIT select a split; the default is
    `default_split`. Not collective. Raises UserError for anything wrong with the source, with the line number if it is
    a text file.
    """
    path = Path(source).expanduser()
    folder, _, folder_split = source.rpartition(":")
    if path.is_dir():
        rows = Rows(source, _load_saved(path, source, default_split, key), "rows")
    elif folder and Path(folder).expanduser().is_dir():
        rows = Rows(source, _load_saved(Path(folder).expanduser(), folder, folder_split, key), "rows")
    elif path.is_file():
        rows = _load_file(path, source, key, csv)
    elif _looks_like_path(source):
        raise UserError(_describe_missing(path, source, key))
    else:
        rows = Rows(source, _load_hub(source, default_split, key), "rows")
    if len(rows) == 0:
        raise UserError(f"{key}: {source} has no rows")
    return rows


def _load_file(path: Path, name: str, key: str, csv: CsvDialect | None) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _load_parquet(path, name, key)
    suffix = text_suffix(path)
    if suffix not in TEXT_SUFFIXES:
        raise UserError(f"{key}: {name} has an unknown type ({path.suffix or 'no extension'}); {_FORMATS}")
    return Rows(name, open_table(path, name, csv), "text" if suffix == ".txt" else "rows")


def _stamp(path: Path) -> str:
    """A digest that changes with the file; `datasets` checks only the modification time, which `cp -p` preserves."""
    stat = path.stat()
    version = f"{path.resolve()}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def _load_parquet(path: Path, name: str, key: str) -> Rows:
    try:
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise UserError(f"{key}: {name} has no rows")
        schema, unreadable = split_columns(pyarrow.parquet.read_schema(path))
        if not schema.names:
            raise UserError(f"{key}: {name}: no column has a type that can be read: {unreadable}")
        options: dict[str, Any] = {}
        if unreadable:
            options = {"columns": schema.names, "features": datasets.Features.from_arrow_schema(schema)}
        with _quiet():
            # The stamp is passed as the dataset's config name, which is part of the key of its cache.
            files = glob.escape(str(path.resolve()))
            loaded = datasets.load_dataset("parquet", _stamp(path), data_files=files, split="train", **options)
        return Rows(name, loaded, "rows", unreadable)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = _one_line(error.__cause__ or error)
        raise UserError(f"{key}: {name} cannot be read as parquet: {describe_other_kind(path) or reason}") from None


def describe_other_kind(path: Path) -> str:
    """What a file that is named .parquet is instead; empty where it is not known."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    kind = "text, perhaps .jsonl or .csv" if looks_like_text(head) else find_kind(head)
    return "" if kind in (None, ".parquet") else f"the content is {kind}: name it by what it is"


def _load_saved(path: Path, name: str, split: str, key: str) -> datasets.Dataset:
    try:
        with _quiet():
            loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise UserError(
            f"{key}: {name} is a folder, but not one written by save_to_disk of `datasets`; "
            "name a file in it, or save it that way"
        ) from None
    except IndexError:  # raised for a saved dataset without rows
        raise UserError(f"{key}: {name} has no rows") from None
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:  # damaged JSON or Arrow files
        raise UserError(f"{key}: the saved folder {name} cannot be loaded: {_one_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            splits = ", ".join(map(str, loaded))
            raise UserError(f"{key}: {name} has no split {split!r}, only {splits}; write {name}:SPLIT")
        loaded = loaded[split]
    return loaded.with_format(None)


def _looks_like_path(source: str) -> bool:
    """True for what cannot be a hub name: ./x, /x, ~/x, a/b/c, x.jsonl (but not user/data-1.5)."""
    name = re.split("[@:]", source)[0]
    if source.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(source):
        return True
    return re.search(r"\.[A-Za-z]\w*$", name) is not None


def _describe_missing(path: Path, source: str, key: str) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{key}: no file {source} (there is no folder {folder}); {_FORMATS}"
    near = difflib.get_close_matches(path.name, os.listdir(folder), n=1)
    hint = f"did you mean {folder / near[0]}?" if near else f"looked in {folder.resolve()}"
    return f"{key}: no file {source}; {hint}"


def _load_hub(source: str, default_split: str, key: str) -> datasets.Dataset:
    name, config, split = split_hub_name(source, default_split)
    with _quiet():
        online = hub_answers()
        was_offline = datasets.config.HF_HUB_OFFLINE
        # Without a network, `datasets` retries every look-up for a minute or more; in offline mode it goes straight to
        # its cache.
        datasets.config.HF_HUB_OFFLINE = was_offline or not online
        try:
            return datasets.load_dataset(name, config, split=split)
        except Exception as error:  # wrong name or split, gated, damaged, connection lost
            raise UserError(f"{key}: {_describe_hub_error(source, online, error)}") from None
        finally:
            datasets.config.HF_HUB_OFFLINE = was_offline


def _describe_hub_error(source: str, online: bool, error: Exception) -> str:
    if online and not isinstance(error, ConnectionError):
        return f"{source} cannot be loaded from the hub: {_one_line(error)}"
    if isinstance(error, ValueError):
        return f"{source} cannot be loaded from the cache, and the hub cannot be reached: {_one_line(error)}"
    return (
        f"{source} is not a file or folder here; as a hub dataset it cannot be reached and is not in the cache: "
        "there is no network, or the name is wrong"
    )


def split_hub_name(source: str, default_split: str) -> tuple[str, str | None, str]:
    """NAME, NAME@CONFIG, NAME:SPLIT or NAME@CONFIG:SPLIT -> (name, config or None, split)."""
    parts = _HUB_NAME.fullmatch(source)
    assert parts is not None, f"{source!r} looks like a path"
    return parts["name"], parts["config"], parts["split"] or default_split


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets` and the hub; errors are reported once, by us."""
    loggers = [logging.getLogger("datasets"), logging.getLogger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars_were_on = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars_were_on:
            datasets.enable_progress_bars()
