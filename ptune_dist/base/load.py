"""Load a frozen causal language model and its tokenizer from a folder or a hub, or build one from its shape alone.

Everything that can be wrong with `model.path` is said here, in one line.
"""

import difflib
import hashlib
import inspect
import logging
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

from ptune_dist.errors import UserError
from ptune_dist.hub import hub_answers

SAMPLE_BYTES = 1 << 20


def load_base(path: str, *, dtype: torch.dtype, random_init: bool, seed: int) -> PreTrainedModel:
    """The frozen base in eval mode, without gradients. Raises UserError."""
    shape = load_shape(path)
    check_is_causal(shape, path)
    if random_init:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    else:
        base = read_weights(path, dtype)
    if "inputs_embeds" not in inspect.signature(base.prepare_inputs_for_generation).parameters:
        raise UserError(f"model.path: {path}: transformers' {shape.model_type} models cannot go on from input vectors")
    base.config.use_cache = False
    base.generation_config = GenerationConfig()  # answers depend on our settings, not on what a base's folder suggests
    return base.eval().requires_grad_(False)


def load_shape(path: str) -> transformers.PretrainedConfig:
    """The architecture's configuration, without weights. Raises UserError."""
    check_folder(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=is_local_only(path))
    except Exception as error:  # the hub, JSON, and transformers' own checks each raise their own
        raise UserError(describe_load_error(path, "config.json", error)) from None


def load_tokenizer(path: str, shape: transformers.PretrainedConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, checked against its embeddings. Raises UserError."""
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
    if tokenizer.eos_token_id is None:
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


def check_is_causal(shape: transformers.PretrainedConfig, path: str) -> None:
    """Raise UserError unless the architecture is a decoder-only language model."""
    kind = shape.model_type
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(shape, "is_decoder", False)
    if shape.is_encoder_decoder or is_encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"model.path: {path} is a {kind} model: a decoder-only language model is needed")


def read_weights(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights. Raises UserError for missing or mis-shaped tensors and damaged files."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        base, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            local_files_only=is_local_only(path),
        )  # fmt: skip
    except Exception as error:  # safetensors, hub and transformers each raise their own
        raise UserError(describe_load_error(path, "weights", error)) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    for problem in ("missing", "mismatched"):
        found = report[f"{problem}_keys"]
        if found:
            names = ", ".join(sorted(key if isinstance(key, str) else f"{key[0]} {tuple(key[1])}" for key in found)[:5])
            raise UserError(f"model.path: the weights of {path} do not fit its config.json: {problem} tensors: {names}")
    return base


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
