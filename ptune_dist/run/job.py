"""Everything that a command needs before it can compute: tokenizer, base, prompt, engine.

Floor 5. What is read from files is read first, on every rank, and a mistake found by any rank ends all of them.
"""

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptune_dist.base.layers import embedding_width, hidden_size, layers_of, max_positions
from ptune_dist.base.load import fill_sharded, fill_whole
from ptune_dist.base.memory_check import check_memory
from ptune_dist.base.open import OpenedBase, open_base
from ptune_dist.base.recompute import read_settings
from ptune_dist.base.source import fingerprint_base, load_shape, load_tokenizer
from ptune_dist.config.deepspeed_json import fill_deepspeed_json, zero_stage
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import ONLY_MEMBER, expand_sweep
from ptune_dist.distributed.world import World, broadcast_from_main, raise_together
from ptune_dist.errors import UserError
from ptune_dist.families.find import find_family
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.prompts.initialise import build_initial_vectors
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.store import load_prompt
from ptune_dist.zero.engine import Engine, build_engine, check_with_deepspeed
from ptune_dist.zero.offload import settle_offload, without_autos
from ptune_dist.zero.shard import Sharder

T = TypeVar("T")


@dataclass
class Job:
    """A base and its bank of prompts under the engine, ready to train or to answer."""

    config: Config
    members: dict[str, Config]  # each member's own config; one where there is no sweep
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    fingerprint: str  # of the base
    loading: dict[str, float]  # this rank's seconds and bytes of reading the base


def together(world: World, function: Callable[[], T]) -> T:
    """Call `function`, which must not communicate, on every rank; where it raises on one, raise on all. Collective."""
    error, result = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    raise_together(error, world)
    return result


def from_main(world: World, function: Callable[[], T]) -> T:
    """What `function` finds on rank 0, on every rank; where it raises, all raise. Collective.

    For what is read from the run: on a shared disk another node may still see what stood there before.
    """
    return broadcast_from_main(together(world, lambda: function() if world.is_main else None), world)


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    shape = load_shape(config.model.path)
    return load_tokenizer(config.model.path, shape, with_eos=build_family(config) != "encoder")


def build_family(config: Config) -> str:
    """The base's family. Raises UserError, also for what the config asks of it that it has not."""
    model, prompt = config.model, config.prompt
    family = find_family(load_shape(model.path), model.family, model.path)
    needed = {"infix": "causal", "template": "causal", "encoder": "seq2seq", "decoder": "seq2seq"}.get(prompt.placement)
    if needed not in (None, family):
        raise UserError(
            f"prompt.placement: {prompt.placement} is for {needed} bases; {model.path} is {family}: use prefix"
        )
    if config.sweep and family == "encoder":
        raise UserError(f"sweep: a prompt over an encoder trains the base's head too, of which {model.path} has one")
    if config.sweep and model.random_init and len({member.seed for member in expand_sweep(config).values()}) > 1:
        raise UserError("sweep.seed: with model.random_init each seed makes a base of its own: set it to false")
    if family == "encoder" and not config.data.labels:
        raise UserError("data.labels is missing: an encoder's head needs the labels that it tells apart")
    return family


def build_opened_base(config: Config) -> OpenedBase:
    """The base without its weights: everything that can be wrong with it is said here. Raises UserError."""
    model = config.model
    int8 = {"include": model.int8_include, "threshold": model.int8_threshold if model.int8_activations else None}
    return open_base(
        model.path, family=build_family(config), dtype=getattr(torch, model.dtype), random_init=model.random_init,
        seed=config.seed, int8=int8 if model.quantization == "int8" else None, labels=config.data.labels,
    )  # fmt: skip


def build_parts(
    config: Config, world: World | None, *, with_start: bool
) -> tuple[OpenedBase, PreTrainedTokenizerBase, dict[str, torch.Tensor], dict[str, Any]]:
    """Opened base, tokenizer, each member's starting vectors [P, D], and DeepSpeed's JSON. Raises UserError.

    Without `with_start` the vectors are zeros: a trained prompt follows, and what it started from may be gone. Without
    a `world` nothing is asked of the machine.
    """
    check_precision(config)
    tokenizer = build_tokenizer(config)
    opened = build_opened_base(config)
    content = build_deepspeed_json(config, opened.model, world)
    check_contexts(config, opened)
    width, vectors = embedding_width(opened.model), {}
    for name, member in expand_sweep(config).items():
        check_positions(member, opened.model)
        vectors[name] = torch.zeros(member.prompt.num_virtual_tokens, width)
        if with_start:
            vectors[name] = build_initial_vectors(
                member.prompt, member.data, seed=member.seed, width=width, tokenizer=tokenizer, lookup=opened.embed
            )
    if world is not None:
        check_memory(opened.model, content, config.model.path, world.size, world.device)
    return opened, tokenizer, vectors, content


def check_contexts(config: Config, opened: OpenedBase) -> None:
    """Raise UserError where a placement needs keys/values of a base that has none (a state-space model)."""
    inner = getattr(opened.model, opened.model.base_model_prefix, opened.model)
    has_cache = "past_key_values" in inspect.signature(inner.forward).parameters
    if config.prompt.placement in ("infix", "template") and not has_cache:
        kind = opened.model.config.model_type
        raise UserError(f"prompt.placement: {kind} models keep no keys and values: use prefix")


def check_precision(config: Config) -> None:
    """Raise UserError for what this machine cannot compute in."""
    if config.model.dtype == "float16" and not torch.cuda.is_available():
        raise UserError("model.dtype: float16 needs a GPU: use bfloat16 or float32 on a CPU")


def build_deepspeed_json(config: Config, base: PreTrainedModel, world: World | None) -> dict[str, Any]:
    """DeepSpeed's JSON filled in and accepted by DeepSpeed. Raises UserError."""
    file = config.deepspeed if isinstance(config.deepspeed, str) else "deepspeed"
    content = fill_deepspeed_json(config, hidden_size=hidden_size(base))
    check_with_deepspeed(without_autos(content), config.deepspeed)
    settle_offload(content, base, world.size if world else None, file)
    read_settings(content, len(layers_of(base)), file)
    return content


def check_positions(config: Config, base: PreTrainedModel) -> None:
    """Raise UserError where a base with learned positions has too few of them."""
    most, needed = max_positions(base), config.prompt.num_virtual_tokens + config.data.max_length
    if most is not None and needed > most:
        raise UserError(
            f"data.max_length: {config.data.max_length} with {config.prompt.num_virtual_tokens} virtual tokens needs "
            f"{needed} positions, the base has {most}: set data.max_length={most - config.prompt.num_virtual_tokens}"
        )


def build_job(config: Config, world: World, *, with_start: bool = True) -> Job:
    """Load everything and put it under the engine. Collective: every rank must call. Raises UserError."""
    opened, tokenizer, vectors, content = together(world, lambda: build_parts(config, world, with_start=with_start))
    if opened.note and world.is_main:
        print(f"model.path: {config.model.path}: {opened.note}", flush=True)
    began = time.perf_counter()
    if zero_stage(content) == 3:
        sharder = Sharder(content, torch.int8 if config.model.quantization == "int8" else opened.dtype)
        base = together(world, lambda: fill_sharded(opened, sharder))
    else:
        base = together(world, lambda: fill_whole(opened, world.device))
    loading = {"load_s": time.perf_counter() - began, "bytes_read": opened.weights.bytes_read}
    fingerprint = fingerprint_base(config.model.path, random_init=config.model.random_init, seed=config.seed)
    members, cache = expand_sweep(config), together(world, lambda: build_context_cache(config, fingerprint))
    engine = build_engine(
        members, base, {name: PromptTuning(start) for name, start in vectors.items()}, content, world,
        family=opened.family, cache=cache,
    )  # fmt: skip
    return Job(config, members, tokenizer, engine, fingerprint, loading)


def build_context_cache(config: Config, fingerprint: str) -> ContextCache | None:
    """The cache that config section `train` asks for. Raises UserError."""
    gib, folder = config.train.context_cache_gib, config.train.context_cache_dir
    if not (gib or folder):
        return None
    numbers = config.model.model_dump(exclude={"path", "family", "random_init"})  # precision and quantization
    identity = json.dumps({"base": fingerprint, "cuda": torch.cuda.is_available(), **numbers}, sort_keys=True)
    return ContextCache(max_bytes=int(gib * 2**30), folder=Path(folder) if folder else None, identity=identity)


def build_trained_job(config: Config, run_dir: Path, world: World) -> Job:
    """The job of a run with its trained prompt. Collective: every rank must call. Raises UserError."""
    tensors, facts = together(world, lambda: load_prompt(run_dir / "prompt"))
    check_prompt(config, facts, run_dir)
    job = build_job(config, world, with_start=False)
    check_base(config, facts, job.fingerprint, run_dir)
    job.engine.load_prompts({ONLY_MEMBER: tensors})
    return job


def check_base(config: Config, facts: dict, fingerprint: str, run_dir: Path) -> None:
    """Raise UserError where the base is not the one that a prompt was trained on."""
    trained_on = facts["base"]["fingerprint"]
    if trained_on != fingerprint:
        raise UserError(
            f"model.path: {config.model.path} is not the base that the prompt of {run_dir} was trained on "
            f"(fingerprint {fingerprint}, not {trained_on})"
        )


def check_prompt(config: Config, facts: dict, run_dir: Path) -> None:
    """Raise UserError where the config has come to describe another prompt than the trained one."""
    for key in ("method", "num_virtual_tokens", "placement"):
        asked = getattr(config.prompt, key)
        if asked != facts[key]:
            raise UserError(f"prompt.{key}: the prompt of {run_dir} was trained with {facts[key]!r}, not {asked!r}")
    if facts.get("labels") not in (None, config.data.labels):
        raise UserError(f"data.labels: the head of {run_dir} was trained to tell {facts['labels']} apart")


def prompt_facts(job: Job, member: str, *, step: int, metrics: dict[str, float]) -> dict:
    """What is stored beside a prompt's tensors."""
    config, base = job.members[member], job.engine.model.base
    return {
        "method": config.prompt.method,
        "num_virtual_tokens": config.prompt.num_virtual_tokens,
        "width": embedding_width(base),
        "placement": config.prompt.placement,
        "step": step,
        "validation": metrics,
        "labels": config.data.labels if job.engine.model.family == "encoder" else None,
        "base": {
            "path": config.model.path,
            "family": job.engine.model.family,
            "model_type": base.config.model_type,
            "fingerprint": job.fingerprint,
            # for PEFT's adapter_config.json; a state-space model has no heads
            "num_layers": getattr(base.config.get_text_config(), "num_hidden_layers", None),
            "num_attention_heads": getattr(base.config.get_text_config(), "num_attention_heads", None),
        },
    }
