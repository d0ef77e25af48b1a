"""Read what `model.path` names, a folder or a hub name: the shape, the tokenizer, and a fingerprint of the weights.

Errors are reported in one line.
"""

import difflib
import hashlib
import json
import shlex
from pathlib import Path
from typing import cast

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ptune_dist.base.multimodal import text_shape
from ptune_dist.common.hub import hub_answers
from ptune_dist.errors import UserError

SAMPLE_BYTES = 1 << 20
MAX_POINTER_BYTES = 1024
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_shape(path: str) -> transformers.PretrainedConfig:
    """The configuration of what is used, which is the language model of a multimodal base. Raises UserError."""
    return text_shape(load_whole_shape(path))


def load_whole_shape(path: str) -> transformers.PretrainedConfig:
    """The architecture's configuration, without weights. Raises UserError."""
    check_folder(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=is_local_only(path))
    except Exception as error:  # the hub, JSON and transformers each have their own errors
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
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=is_local_only(path))
    except Exception as error:  # the tokenizers library has its own errors too
        if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZERS):
            raise UserError(
                f"model.path: no tokenizer.json in {path}: put the base's tokenizer files next to its config.json"
            ) from None
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
    place = Path(path)
    if place.is_dir():
        what = None if (place / "config.json").is_file() else describe_other_folder(place)
        what = what or describe_pointers(place)
        if what:
            raise UserError(f"model.path: {path} {what}")
        return
    if place.exists():
        if place.suffix == ".gguf":
            raise UserError(f"model.path: {path} is a GGUF file: {describe_gguf(place)}")
        raise UserError(f"model.path: {path} is a file: give the folder that contains config.json")
    is_in_folder = place.parent != Path(".") and place.parent.is_dir()
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or is_in_folder:
        near = difflib.get_close_matches(place.name, [p.name for p in place.parent.glob("*/")], n=1)
        hint = f", did you mean {place.parent / near[0]}?" if near else ""
        raise UserError(f"model.path: no folder {path}{hint}")


def describe_other_folder(place: Path) -> str | None:
    """What a folder without a config.json is and what to do; None if it cannot be told."""
    names = {file.name for file in place.iterdir()}

    def has(*patterns: str) -> bool:
        return any(any(place.glob(pattern)) for pattern in patterns)

    if "adapter_config.json" in names:
        try:
            base = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = "its base"
        return f"is a PEFT adapter of {base}: give that base, or the adapter merged into it (merge_and_unload)"
    if not names:
        return "is an empty folder: give the folder that contains config.json"
    if has("*.gguf"):
        return f"holds GGUF files: {describe_gguf(next(place.glob('*.gguf')))}"
    if "config.yaml" in names and names & {"status.json", "prompt", "checkpoints", "metrics.jsonl"}:
        return "is a run of ptune-dist, not a base: give the model.path of its config.yaml"
    if "latest" in names or has("global_step*") or place.name.startswith("global_step"):
        return "is a checkpoint of DeepSpeed: convert it with its zero_to_fp32.py and give a folder with config.json"
    if has("checkpoint-*/config.json"):
        found = sorted(place.glob("checkpoint-*/config.json"))[-1].parent
        return f"holds checkpoints of a trainer: give one of them, such as {found}"
    if "model_index.json" in names:
        return "is a diffusers pipeline, not a language model: give its text model's folder, if any"
    if has("snapshots/*/config.json"):
        return f"is a cache of the hub: give {next(place.glob('snapshots/*/config.json')).parent}"
    if has("*.incomplete", "**/*.incomplete"):
        return "is a download that was interrupted: finish it with: hf download NAME --local-dir FOLDER"
    if "params.json" in names or has("consolidated*"):
        return "is in the layout of its publisher (params.json): give the folder in the layout of Hugging Face"
    if has("*.onnx", "onnx/*.onnx"):
        return "is an ONNX export: give the folder of the PyTorch model that it was made from"
    if has("*.zip", "*.tar", "*.tar.gz", "*.tgz"):
        return "holds an archive: unpack it and give the folder that contains config.json"
    if names & {"tokenizer.json", "tokenizer_config.json"}:
        return "holds a tokenizer only: put the base's config.json and weights there"
    return "has no config.json: give the folder that contains it"


def describe_gguf(file: Path) -> str:
    """The command that makes a folder of safetensors of a GGUF file."""
    out = f"{file.stem}-safetensors"
    code = (
        f"import transformers as t; p, f, out = {str(file.parent)!r}, {file.name!r}, {out!r}; "
        "t.AutoModelForCausalLM.from_pretrained(p, gguf_file=f).save_pretrained(out); "
        "t.AutoTokenizer.from_pretrained(p, gguf_file=f).save_pretrained(out)"
    )
    return f"convert one with: pip install gguf && python -c {shlex.quote(code)}"


def describe_pointers(place: Path) -> str | None:
    """What to do where the weights are pointers of git-lfs instead of the files; None if they are not."""
    for file in sorted(place.glob("*.safetensors")):
        if file.stat().st_size < MAX_POINTER_BYTES and file.read_bytes().startswith(b"version https://git-lfs"):
            return f"holds a git-lfs pointer instead of {file.name}: run git lfs pull there"
    return None


def is_local_only(path: str) -> bool:
    """Whether not to ask the hub: the path is a folder, or the hub cannot be reached (its cache may have the name)."""
    return Path(path).is_dir() or not hub_answers()


def describe_load_error(path: str, what: str, error: Exception) -> str:
    """A message of transformers, which may have many lines, in one line."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if Path(path).is_dir():
        return f"model.path: cannot read the {what} of {path}: {first}"
    return (
        f"model.path: there is no folder {path} here, and no {what} of that name on the hub or no network to reach "
        "it: give a local folder, or download the base where there is a network"
    )


def fingerprint_base(path: str, *, random_init: bool, seed: int) -> str:
    """A short digest that identifies a base: of its config.json and of samples of its safetensors files."""
    found = cached_file(path, "config.json", local_files_only=is_local_only(path))
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
