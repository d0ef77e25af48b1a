"""Load a data source (`data.train: ...`) as Rows: a `datasets.Dataset` that can name the line of each row.

Text files are read into memory by readers.py: they are not cached, so they cannot be stale, and ranks need no locks.
Parquet files, saved folders and hub datasets are loaded by `datasets`, with its cache and its locks.
"""

import contextlib
import difflib
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import datasets.config
import datasets.exceptions
import pyarrow
import pyarrow.parquet

from ptune_dist.common.hub import hub_answers
from ptune_dist.data.readers import TEXT_SUFFIXES, name_kind, read_records
from ptune_dist.errors import UserError

CHUNK_ROWS = 10_000
_FORMATS = "use " + ", ".join((*TEXT_SUFFIXES, ".parquet")) + ", a folder saved by datasets, or a hub dataset name"
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<config>[^:@]+))?(:(?P<split>[^:@]+))?")


@dataclass(frozen=True)
class Rows:
    """The rows of one source.

    name: the source as the user wrote it. kind: "text" for a .txt file, whose rows are its lines, with line breaks, in
    a column `text`; otherwise "rows". path: the file, if it is a text file whose lines can be counted.
    """

    name: str
    dataset: datasets.Dataset
    kind: str
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def columns(self) -> list[str]:
        return self.dataset.column_names

    def where(self, index: int) -> str:
        """The place of row `index` (from 0) for error messages; slow, because it reads the file to count lines."""
        if self.path is not None:
            with contextlib.suppress(UserError):  # the file has changed since it was loaded
                for line, _ in islice(read_records(self.path, self.name), index, index + 1):
                    return f"{self.name} line {line}"
        return f"{self.name} row {index + 1} (the first is row 1)"


def load_rows(source: str, *, key: str, default_split: str) -> Rows:
    """Load a file, a folder saved by `datasets`, or a hub dataset; `key` is the config key that names it.

    FOLDER:SPLIT and NAME@CONFIG:SPLIT select a split; the default is `default_split`. Not collective. Raises UserError
    for anything wrong with the source, with the line number if it is a text file.
    """
    path = Path(source).expanduser()
    folder, _, folder_split = source.rpartition(":")
    if path.is_dir():
        rows = Rows(source, _load_saved(path, source, default_split, key), "rows")
    elif folder and Path(folder).expanduser().is_dir():
        rows = Rows(source, _load_saved(Path(folder).expanduser(), folder, folder_split, key), "rows")
    elif path.is_file():
        rows = _load_file(path, source, key)
    elif _looks_like_path(source):
        raise UserError(_describe_missing(path, source, key))
    else:
        rows = Rows(source, _load_hub(source, default_split, key), "rows")
    if len(rows) == 0:
        raise UserError(f"{key}: {source} has no rows")
    return rows


def _load_file(path: Path, name: str, key: str) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Rows(name, _load_parquet(path, name, key), "rows")
    if suffix not in TEXT_SUFFIXES:
        raise UserError(f"{key}: {name} has an unknown type ({suffix or 'no extension'}); {_FORMATS}")
    table = _build_table(read_records(path, name), path, name)
    dataset = datasets.Dataset(table, fingerprint=_stamp(path))
    if suffix == ".txt" and len(dataset) and not any(line.strip() for line in dataset["text"]):
        raise UserError(f"{key}: {name} has no text")
    return Rows(name, dataset, "text" if suffix == ".txt" else "rows", path)


def _stamp(path: Path) -> str:
    """A digest that changes with the file; `datasets` checks only the modification time, which `cp -p` preserves."""
    stat = path.stat()
    version = f"{path.resolve()}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def _build_table(records: Iterable[tuple[int, dict]], path: Path, name: str) -> pyarrow.Table:
    """An Arrow table with the union of the rows' columns; integers in a column with floats become floats."""
    rows = (row for _, row in records)
    tables = []
    try:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            columns = dict.fromkeys(column for row in chunk for column in row)  # in order of appearance
            tables.append(pyarrow.table({column: [row.get(column) for row in chunk] for column in columns}))
        return pyarrow.concat_tables(tables, promote_options="permissive") if tables else pyarrow.table({})
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise _explain_types(path, name, error) from None


def _explain_types(path: Path, name: str, error: Exception) -> UserError:
    """The error that names the first value whose type differs from that of earlier rows."""
    first_seen: dict[str, tuple[str, int]] = {}
    for line, row in read_records(path, name):
        for field, value in _walk(row, ""):
            problem = _unstorable(value)
            if problem:
                return UserError(f"{name} line {line}: column {field!r} contains {problem}")
            kind = name_kind(value)
            first_kind, first_line = first_seen.setdefault(field, (kind, line))
            if kind != first_kind:
                return UserError(
                    f"{name} line {line}: column {field!r} contains {kind}, but {first_kind} in line {first_line}; "
                    "use the same type in every row"
                )
    return UserError(f"{name}: the rows do not fit into one table: {_one_line(error)}")


def _walk(value: object, field: str) -> Iterator[tuple[str, object]]:
    """Every non-null value nested in `value`, with its path, such as "meta.tags[]"."""
    if field and value is not None:
        yield field, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, field + "[]")


def _unstorable(value: object) -> str | None:
    """Why Arrow cannot store a value, or None."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "an integer of more than 64 bits; write it as text"
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return "half of a surrogate pair, which is not a character; write the character itself"
    return None


def _load_parquet(path: Path, name: str, key: str) -> datasets.Dataset:
    try:
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise UserError(f"{key}: {name} has no rows")
        with _quiet():
            # The stamp is passed as the dataset's config name, which is part of the key of its cache.
            files = glob.escape(str(path.resolve()))
            return datasets.load_dataset("parquet", _stamp(path), data_files=files, split="train")
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError) as error:
        reason = _one_line(error.__cause__ or error)
        raise UserError(f"{key}: {name} cannot be read as parquet: {reason}") from None


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
