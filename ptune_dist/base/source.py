"""What `model.path` names: a folder or a hub name with a shape, a tokenizer and weights that a digest tells apart.

What can be wrong with it is said here, in one line.
"""

import difflib
import hashlib
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ptune_dist.common.hub import hub_answers
from ptune_dist.errors import UserError

SAMPLE_BYTES = 1 << 20


def load_shape(path: str) -> transformers.PretrainedConfig:
    """The architecture's configuration, without weights. Raises UserError."""
    check_folder(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=is_local_only(path))
    except Exception as error:  # the hub, JSON, and transformers' own checks each raise their own
        raise UserError(describe_load_error(path, "config.json", error)) from None


def load_tokenizer(
    path: str, shape: transformers.PretrainedConfig, *, with_eos: bool = True
) -> PreTrainedTokenizerBase:
    """The base's tokenizer, checked against its embeddings and, `with_eos`, for a token that ends. Raises UserError."""
    check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=is_local_only(path))
    except Exception as error:  # so does the tokenizers library
        raise UserError(describe_load_error(path, "tokenizer", error)) from None
    vocab_size = shape.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise UserError(f"model.path: {path} has no tokenizer: put the base's tokenizer.json beside its config.json")
    if largest >= vocab_size:
        raise UserError(
            f"model.path: the tokenizer of {path} does not fit its base: it has token id {largest}, "
            f"the base embeds {vocab_size}"
        )
    if with_eos and tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {path} names no eos_token: set it in tokenizer_config.json")
    return tokenizer


def check_folder(path: str) -> None:
    """Raise UserError for a path that can only be a local folder and is not one."""
    place = Path(path)
    if place.is_dir():
        return
    if place.exists():
        raise UserError(f"model.path: {path} is a file: give the folder that holds config.json")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or place.parent != Path(".") and place.parent.is_dir():
        near = difflib.get_close_matches(place.name, [p.name for p in place.parent.glob("*/")], n=1)
        hint = f", did you mean {place.parent / near[0]}?" if near else ""
        raise UserError(f"model.path: no folder {path}{hint}")


def is_local_only(path: str) -> bool:
    """True where the hub need not or cannot be asked: its cache may still hold the name."""
    return Path(path).is_dir() or not hub_answers()


def describe_load_error(path: str, what: str, error: Exception) -> str:
    """One line for what transformers says in many."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if Path(path).is_dir():
        return f"model.path: cannot read the {what} of {path}: {first}"
    return (
        f"model.path: no folder {path} here, and no {what} of that name on the hub or no network to reach it: "
        "give a local folder, or download the base where there is a network"
    )


def fingerprint_base(path: str, *, random_init: bool, seed: int) -> str:
    """A short digest that tells one base from another: its config.json and samples of its safetensors files."""
    config_file = Path(cached_file(path, "config.json", local_files_only=is_local_only(path)))
    digest = hashlib.sha256(config_file.read_bytes())
    if random_init:
        digest.update(f"random {seed}".encode())
    for file in sorted(config_file.parent.glob("*.safetensors")) if not random_init else ():
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):  # the header is at the start
                opened.seek(start)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
