"""Read what `model.path` names, a folder or a hub name: the shape, the tokenizer, and a fingerprint of the weights.

Errors are reported in one line.
"""

import difflib
import hashlib
from pathlib import Path
from typing import cast

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ptune_dist.base.multimodal import text_shape
from ptune_dist.base.other_folders import (
    OWN_CODE,
    describe_gguf,
    describe_other_folder,
    describe_pointers,
    describe_tokenizer,
    import_command,
)
from ptune_dist.common.hub import hub_answers, split_revision
from ptune_dist.errors import UserError

SAMPLE_BYTES = 1 << 20
MOST_CHARACTERS = 400  # of a message of transformers


def load_shape(path: str) -> transformers.PretrainedConfig:
    """The configuration of what is used, which is the language model of a multimodal base. Raises UserError."""
    return text_shape(load_whole_shape(path))


def load_whole_shape(path: str) -> transformers.PretrainedConfig:
    """The architecture's configuration, without weights. Raises UserError."""
    check_folder(path)
    try:
        # Code of a base's own is never run; without an answer here, transformers asks the terminal for one.
        name, revision = split_revision(path)
        return AutoConfig.from_pretrained(
            name, revision=revision or "main", local_files_only=is_local_only(path), trust_remote_code=False
        )
    except Exception as error:  # the hub, JSON and transformers each have their own errors
        if "trust_remote_code" in str(error):
            raise UserError(f"model.path: the architecture of {path} {OWN_CODE}") from None
        raise UserError(describe_load_error(path, "config.json", error)) from None


def load_tokenizer(
    path: str, shape: transformers.PretrainedConfig, *, with_eos: bool = True
) -> PreTrainedTokenizerBase:
    """The base's tokenizer, checked, `with_eos`, for an end token. Raises UserError.

    It may have ids beyond the base's embeddings (a token for images, say): rows that have one are refused. The padding
    token is one that has an embedding: what it is makes no difference.
    """
    check_folder(path)
    try:
        name, revision = split_revision(path)
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", local_files_only=is_local_only(path), trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library has its own errors too
        what = describe_tokenizer(Path(path), str(error)) if Path(path).is_dir() else None
        if what:
            raise UserError(f"model.path: {what}") from None
        raise UserError(describe_load_error(path, "tokenizer", error)) from None
    vocab_size = shape.get_text_config().vocab_size
    if largest_id(tokenizer) < 0:
        raise UserError(f"model.path: {path} has no tokenizer: put the base's tokenizer.json next to its config.json")
    if tokenizer.pad_token_id is not None and cast(int, tokenizer.pad_token_id) >= vocab_size:
        tokenizer.pad_token_id = 0
    if with_eos and tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {path} names no eos_token: set it in tokenizer_config.json")
    return tokenizer


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id; -1 of a tokenizer without tokens."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_folder(path: str) -> None:
    """Raise UserError for a path that can only mean a local folder but is not one."""
    if not path.strip():
        raise UserError("model.path: is empty: give a folder or a name on the hub")
    place = Path(path)
    if place.is_dir():
        what = describe_pointers(place)
        if not what and not (place / "config.json").is_file():
            what = describe_other_folder(place)
        if what:
            raise UserError(f"model.path: {path} {what}")
        return
    if place.exists():
        if place.suffix == ".gguf":
            raise UserError(f"model.path: {path} is a GGUF file: {describe_gguf(place)}")
        if place.suffix in (".bin", ".whl"):
            raise UserError(f"model.path: {path} is a file: make a base of it with: {import_command(path)}")
        raise UserError(f"model.path: {path} is a file: give the folder that contains config.json")
    check_hub_name("model.path", path)


def check_hub_name(key: str, path: str) -> None:
    """Raise UserError for a path of nothing here that can only mean something local."""
    place = Path(path)
    is_in_folder = place.parent != Path(".") and place.parent.is_dir()
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or is_in_folder:
        near = difflib.get_close_matches(place.name, [p.name for p in place.parent.glob("*/")], n=1)
        hint = f", did you mean {place.parent / near[0]}?" if near else ""
        raise UserError(f"{key}: no folder {path}{hint}")


def is_local_only(path: str) -> bool:
    """Whether not to ask the hub: the path is a folder, or the hub cannot be reached (its cache may have the name)."""
    return Path(path).is_dir() or not hub_answers()


def describe_load_error(path: str, what: str, error: Exception) -> str:
    """A message of transformers, which may have many lines, in one line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    first = lines[0] if not lines[0].endswith(":") else " ".join(lines)[:MOST_CHARACTERS]
    if Path(path).is_dir():
        return f"model.path: cannot read the {what} of {path}: {first}"
    return (
        f"model.path: there is no folder {path} here, and no {what} of that name on the hub or no network to reach "
        "it: give a local folder, or download the base where there is a network"
    )


def fingerprint_base(path: str, *, random_init: bool, seed: int) -> str:
    """A short digest that identifies a base: of its config.json and of samples of its safetensors files."""
    name, revision = split_revision(path)
    found = cached_file(name, "config.json", revision=revision, local_files_only=is_local_only(path))
    assert found is not None  # a missing file is an OSError
    config_file = Path(found)
    digest = hashlib.sha256(config_file.read_bytes())
    if random_init:
        digest.update(f"random {seed}".encode())
        return digest.hexdigest()[:16]
    for file in sorted(config_file.parent.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):  # the header is at the start
                opened.seek(start)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
