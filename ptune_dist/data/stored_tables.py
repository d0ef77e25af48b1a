"""Tables that `datasets` loads, with its cache and its locks: Parquet files, saved folders and hub datasets."""

import contextlib
import glob
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
import datasets.exceptions
import pyarrow
import pyarrow.parquet

from ptune_dist.common.hub import hub_answers
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.data.arrow_values import has_narrow_floats, shorten_floats, split_columns
from ptune_dist.data.content import HEAD_BYTES, find_kind, looks_like_text
from ptune_dist.errors import UserError


def read_columns(table: datasets.Dataset, first: int, last: int) -> dict[str, list[Any]]:
    """The values of rows `first` up to `last` (from 0), by column."""
    columns = cast(dict[str, list[Any]], table[first:last])
    for name, feature in table.features.items():
        if has_narrow_floats(feature):
            columns[name] = [shorten_floats(value, feature) for value in columns[name]]
    return columns


def load_parquet(path: Path, name: str, key: str) -> tuple[datasets.Dataset, dict[str, str]]:
    """The file's rows, and its columns that cannot be read, with their types. Raises UserError."""
    try:
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise UserError(f"{key}: {name} has no rows")
        schema, unreadable = split_columns(pyarrow.parquet.read_schema(path))
        if not schema.names:
            raise UserError(f"{key}: {name}: no column has a type that can be read: {unreadable}")
        options: dict[str, Any] = {}
        if unreadable:
            options = {"columns": schema.names, "features": datasets.Features.from_arrow_schema(schema)}
        with _quiet(), BusyLine(f"loading {name}"):
            # The stamp is passed as the dataset's config name, which is part of the key of its cache.
            files = glob.escape(str(path.resolve()))
            loaded = datasets.load_dataset("parquet", _stamp(path), data_files=files, split="train", **options)
        return loaded, unreadable
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = _one_line(error.__cause__ or error)
        raise UserError(f"{key}: {name} cannot be read as parquet: {describe_other_kind(path) or reason}") from None


def describe_other_kind(path: Path) -> str:
    """What a file that is named .parquet is instead; empty where it is not known."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    kind = "text, perhaps .jsonl or .csv" if looks_like_text(head) else find_kind(head)
    return "" if kind in (None, ".parquet") else f"the content is {kind}: name it by what it is"


def _stamp(path: Path) -> str:
    """A digest that changes with the file; `datasets` checks only the modification time, which `cp -p` preserves."""
    stat = path.stat()
    version = f"{path.resolve()}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def load_saved(path: Path, name: str, split: str, key: str) -> datasets.Dataset:
    """A split of a folder that `save_to_disk` has written. Raises UserError."""
    try:
        with _quiet(), BusyLine(f"loading {name}"):
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


def load_hub(
    source: str, name: str, config: str | None, split: str, *, key: str, revision: str | None = None
) -> datasets.Dataset:
    """A split of a dataset on the hub, or in its cache; the user wrote it as `source`. Raises UserError."""
    with _quiet(), BusyLine(f"loading {source}"):
        online = hub_answers()
        was_offline = datasets.config.HF_HUB_OFFLINE
        # Without a network, `datasets` retries every look-up for a minute or more; in offline mode it goes straight to
        # its cache.
        datasets.config.HF_HUB_OFFLINE = was_offline or not online
        try:
            loaded = datasets.load_dataset(name, config, split=split, revision=revision)
        except Exception as error:  # wrong name or split, gated, damaged, connection lost
            raise UserError(f"{key}: {_describe_hub_error(source, online, error)}") from None
        finally:
            datasets.config.HF_HUB_OFFLINE = was_offline
    if revision is not None and not online:
        _check_cached_revision(cast(datasets.Dataset, loaded), source, revision, key)
    return cast(datasets.Dataset, loaded)


def _check_cached_revision(table: datasets.Dataset, source: str, revision: str, key: str) -> None:
    """Raise UserError unless rows from the cache are of this commit: there `datasets` takes the newest of any."""
    commits = {Path(file["filename"]).parent.name for file in table.cache_files}
    if commits != {revision}:
        raise UserError(
            f"{key}: {source} in the cache is of commit {', '.join(sorted(commits))}, and not of data.revision "
            f"{revision}; the hub cannot be reached"
        )


def _describe_hub_error(source: str, online: bool, error: Exception) -> str:
    if online and not isinstance(error, ConnectionError):
        return f"{source} cannot be loaded from the hub: {_one_line(error)}"
    if isinstance(error, ValueError):
        return f"{source} cannot be loaded from the cache, and the hub cannot be reached: {_one_line(error)}"
    return (
        f"{source} is not a file or folder here; as a hub dataset it cannot be reached and is not in the cache: "
        "there is no network, or the name is wrong"
    )


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
