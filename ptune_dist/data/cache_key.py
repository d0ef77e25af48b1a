"""What token ids depend on, as hashes: the content of the data, the tokenizer, the options and this package's code."""

import dataclasses
import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from ptune_dist.common.progress_line import REPORT_S, ProgressLine, is_first_here
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.alternatives import find_path
from ptune_dist.data.cache_entry import FORMAT, hash_text
from ptune_dist.data.encode import Encoding

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".parquet")
GIB = 1 << 30
HASHED_BYTES = 1 << 22
# Of config section `data`: what tokens do not depend on.
NOT_IN_KEY = {"train", "validation", "references", "task", "tasks", "cache_dir", "cache_gib"}


def describe_options(
    data: DataConfig, encoding: Encoding, sources: list[str], rows: tuple[str, int, str], files: list[Path]
) -> str:
    """All that the token ids of a split depend on besides the content of its files; `rows` is which of them it has."""
    options = {
        "format": FORMAT,
        "code": hash_code(),
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2", "numpy", "datasets")],
        "tokenizer": hash_tokenizer(encoding),
        "data": data.model_dump(mode="json", exclude=NOT_IN_KEY),
        "source": [source.rpartition(":")[2] if not Path(source).exists() else "" for source in sources],
        "rows": [*rows, data.validation if data.holds_out else None],
        "chat": [*encoding.chat.facts(), str(encoding.tokenizer.chat_template)] if encoding.chat else None,
        "text": [encoding.around, encoding.lead],
        "references": data.references if find_path(data) else None,
        "suffixes": [file.suffix.lower() for file in files],
        "framing": [dataclasses.asdict(encoding.framing), type(encoding.targets).__name__, encoding.targets.specials],
        "encoding": [
            encoding.max_length,
            encoding.placement,
            encoding.truncation_side,
            encoding.num_embeddings,
            encoding.needs_rest,
        ],
    }
    return json.dumps(options, sort_keys=True)


def find_files(source: str) -> list[Path]:
    """The files of a source: a file, or those of a folder; none for a name on the hub."""
    path = Path(source).expanduser()
    if not path.exists() and ":" in source:
        path = Path(source.rpartition(":")[0]).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def size_of(file: Path) -> int:
    size = file.stat().st_size
    return 8 * size if file.suffix.lower() in COMPRESSED else size


def hash_tokenizer(encoding: Encoding) -> str:
    """Of everything that decides how the tokenizer splits a text."""
    tokenizer = encoding.tokenizer
    parts = [type(tokenizer).__qualname__, str(getattr(tokenizer, "split_special_tokens", False))]
    parts.append(json.dumps([encoding.specials, tokenizer.special_tokens_map], default=str, sort_keys=True))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hash_text(*parts, backend.to_str())
    place = Path(tokenizer.name_or_path)
    files = sorted(place.iterdir()) if place.is_dir() else []
    models = [file for file in files if file.is_file() and file.stat().st_size < GIB and "safetensors" not in file.name]
    parts.append(json.dumps(tokenizer.get_vocab(), sort_keys=True))
    return hash_text(*parts, *map(hash_file, models))


@functools.cache
def hash_code() -> str:
    """Of this package's modules that make tokens out of rows: another version may make others."""
    return hash_text(*(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))))


def hash_file(path: Path) -> str:
    """Of a file's content, with a line of progress where it is long."""
    hashed = hashlib.sha256()
    progress = ProgressLine(f"reading {path.name} (bytes)", path.stat().st_size, is_first_here(), between_s=REPORT_S)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASHED_BYTES):
            hashed.update(chunk)
            progress.count(len(chunk))
    return hashed.hexdigest()
