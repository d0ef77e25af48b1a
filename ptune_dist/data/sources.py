"""Load a data source (`data.train: ...`) as Rows, which are read by number and can name the line of each row.

Text files are indexed and read by readers.py: they are not cached, so they cannot be stale, and ranks need no locks.
Parquet files, saved folders and hub datasets are loaded by `datasets` (stored_tables.py), with its cache and its locks.
`datasets` is imported only for these: it and pandas, which it needs, take half a second.
"""

import dataclasses
import difflib
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptune_dist.common.files import COMPRESSED_SUFFIXES, text_suffix
from ptune_dist.data.delimited import CsvDialect
from ptune_dist.data.readers import TEXT_SUFFIXES, TextTable, open_table
from ptune_dist.errors import UserError

if TYPE_CHECKING:
    import datasets

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
    source: "TextTable | datasets.Dataset"
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
        from ptune_dist.data.stored_tables import read_columns

        columns = read_columns(self.source, first, last)
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


def load_rows(
    source: str, *, key: str, default_split: str, csv: CsvDialect | None = None, revision: str | None = None
) -> Rows:
    """Load a file, a folder saved by `datasets`, or a hub dataset; `key` is the config key that names it.

    `csv` is how .csv and .tsv files are written, `revision` the commit, tag or branch of a hub dataset.
    FOLDER:SPLIT and NAME@CONFIG:SPLIT select a split; the default is `default_split`. Not collective. Raises UserError
    for anything wrong with the source, with the line number if it is a text file.
    """
    path = Path(source).expanduser()
    folder, _, folder_split = source.rpartition(":")
    if path.is_dir():
        rows = _load_folder(path, source, source, default_split, key)
    elif folder and Path(folder).expanduser().is_dir():
        rows = _load_folder(Path(folder).expanduser(), source, folder, folder_split, key)
    elif path.is_file():
        rows = _load_file(path, source, key, csv)
    elif path.exists():
        raise UserError(f"{key}: {source} is a pipe or a device, and rows are read several times: save them as a file")
    elif glob.has_magic(source):
        raise UserError(f"{key}: no file matches {source}")
    elif "://" in source:
        raise UserError(f"{key}: {source} is a URL, {_advise_on_url(source)}")
    elif _looks_like_path(source):
        raise UserError(_describe_missing(path, source, key))
    else:
        rows = _load_from_hub(source, default_split, key, revision)
    if len(rows) == 0:
        raise UserError(f"{key}: {source} has no rows")
    return rows


def _load_file(path: Path, name: str, key: str, csv: CsvDialect | None) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from ptune_dist.data.stored_tables import load_parquet

        table, unreadable = load_parquet(path, name, key)
        return Rows(name, table, "rows", unreadable)
    suffix = text_suffix(path)
    if suffix not in TEXT_SUFFIXES:
        raise UserError(f"{key}: {name} has an unknown type ({path.suffix or 'no extension'}); {_FORMATS}")
    return Rows(name, open_table(path, name, csv), "text" if suffix == ".txt" else "rows")


def _load_folder(path: Path, source: str, folder: str, split: str, key: str) -> Rows:
    from ptune_dist.data.stored_tables import load_saved

    return Rows(source, load_saved(path, folder, split, key), "rows")


def _load_from_hub(source: str, default_split: str, key: str, revision: str | None) -> Rows:
    from ptune_dist.data.stored_tables import load_hub

    name, config, split = split_hub_name(source, default_split)
    return Rows(source, load_hub(source, name, config, split, key=key, revision=revision), "rows")


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


def _advise_on_url(source: str) -> str:
    scheme, _, rest = source.partition("://")
    if scheme.lower() == "file":
        return f"and files are named by their paths: write /{rest.partition('/')[2]}"
    repository = re.match(r"(?:(?:www\.)?huggingface\.co/)?datasets/([\w.-]+/[\w.-]+)", rest)
    if repository is not None and (scheme.lower() == "hf" or rest.startswith(("huggingface.co", "www."))):
        return f"and datasets on the hub are named by their names: write {repository[1]}"
    return "and rows are read from files: copy it to a file first"


def split_hub_name(source: str, default_split: str) -> tuple[str, str | None, str]:
    """NAME, NAME@CONFIG, NAME:SPLIT or NAME@CONFIG:SPLIT -> (name, config or None, split)."""
    parts = _HUB_NAME.fullmatch(source)
    assert parts is not None, f"{source!r} looks like a path"
    return parts["name"], parts["config"], parts["split"] or default_split
