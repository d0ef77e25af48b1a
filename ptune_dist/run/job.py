"""A base and its prompts under the engine: everything that a command needs before it can compute.

What is read from files is read first, on every rank, and a mistake found by any rank ends all of them.
"""

import functools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptune_dist.base.fp8 import check_device
from ptune_dist.base.fused import fuse
from ptune_dist.base.layers import (
    embedding_width,
    heads_of_half,
    hidden_size,
    key_value_heads,
    layer_stacks,
    layers_of,
    max_positions,
    num_first_layers,
)
from ptune_dist.base.load import fill_whole
from ptune_dist.base.memory_check import GIB, check_memory, find_room
from ptune_dist.base.open import OpenedBase, open_base
from ptune_dist.base.quantized_ops import describe_fallback
from ptune_dist.base.recompute import read_settings
from ptune_dist.base.rotary import fixed_positions
from ptune_dist.base.source import fingerprint_base
from ptune_dist.base.trained import parameters_of_head
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.config.deepspeed_json import fill_deepspeed_json, show_source, zero_stage
from ptune_dist.config.schema import Config
from ptune_dist.data.examples import longest_answer
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, from_main, max_over_ranks, together
from ptune_dist.errors import UserError
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.model.given_cache import layer_heads
from ptune_dist.model.value_head import TargetScale
from ptune_dist.prompts.build import build_prompt, choose_trained, source_files
from ptune_dist.prompts.method import BaseFacts, Method, Stack
from ptune_dist.run.base_check import check_base, draw_probe
from ptune_dist.run.memory_need import Workload, fit_micro_batch, prompt_bytes
from ptune_dist.run.micro_batch import MicroBatchSize, is_out_of_memory, read_stored
from ptune_dist.run.reading import Reading
from ptune_dist.zero.engine import Engine, build_engine, check_with_deepspeed
from ptune_dist.zero.offload import settle_offload, without_autos
from ptune_dist.zero.prefetch import settle_prefetch
from ptune_dist.zero.residency import gathered_bytes, settle_residency
from ptune_dist.zero.shard import Sharder, fill_sharded

FIRST_WITH_BFLOAT16 = 8  # major compute capability


@dataclass
class Job:
    """A base and its prompts under the engine, ready to train or to answer.

    longest_target: tokens of the longest target that is trained on, where targets are texts that follow an input.
    sources: the prompts that a member may start from, by file, where there are several.
    """

    reading: Reading
    engine: Engine
    fingerprint: str  # of the base
    loading: dict[str, float]  # this rank's seconds and bytes of reading the base
    micro_batch: MicroBatchSize
    longest_target: int | None = None
    sources: dict[str, dict[str, Method]] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.reading.config

    @property
    def members(self) -> dict[str, Config]:
        return self.reading.members

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.reading.tokenizer


@dataclass(frozen=True)
class Parts:
    """What is known before any weight is read."""

    opened: OpenedBase
    prompts: dict[str, Method]  # of each member, at its start
    deepspeed_json: dict[str, Any]  # filled
    sources: dict[str, dict[str, Method]]  # of each member that has several to start from


def build_parts(reading: Reading, world: World | None, *, with_start: bool, rows: TrainingRows | None = None) -> Parts:
    """Raises UserError for everything that can be wrong with base, prompts and DeepSpeed's JSON.

    Without `with_start` the prompts' numbers are not read: those of a trained prompt follow, and what it started from
    may be gone. Without a `world` nothing is asked of the machine. `rows` are those to train on, if any.
    """
    config = reading.config
    check_precision(config)
    if world is not None and config.model.quantization == "fp8":
        check_device(world.device)
    opened = open_base_of(reading)
    content = build_deepspeed_json(config, opened.model, world)
    reading.family.check_contexts(opened.model, config.prompt.placement)
    build = functools.partial(
        build_prompt,
        base=base_facts(opened.model),
        tokenizer=reading.tokenizer,
        lookup=opened.embed,
        with_start=with_start,
        num_embeddings=reading.num_embeddings,
        read_stored=opened.read_rows,
    )
    prompts = {}
    sources = {}
    for name, member in reading.members.items():
        check_positions(member, opened.model)
        # An encoder's targets are numbers of labels.
        has_texts = not reading.family.trains_head
        tokens = None if rows is None else functools.partial(rows.tokens_of, name, with_targets=has_texts)
        examples = None if rows is None else functools.partial(rows.examples_of, name)
        try:
            prompts[name] = build(member, rows=tokens, read_examples=examples)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            size = f"{member.prompt.num_virtual_tokens} virtual tokens of {member.prompt.method}"
            raise UserError(f"prompt: {size}, with its options, do not fit in this machine's memory") from None
        files = source_files(member.prompt)
        if with_start and len(files) > 1:
            sources[name] = {file: build(member, rows=tokens, file=file) for file in files}
            check_sources(sources[name])
    if world is not None:
        check_memory(opened.model, content, config.model.path, world.size, world.device)
    return Parts(opened, prompts, content, sources)


def check_sources(sources: dict[str, Method]) -> None:
    """Raise UserError for prompts that are more than what their files hold as a prompt, or of unlike shapes."""
    if any(prompt.start_tokens or not prompt.state_dict() for prompt in sources.values()):
        raise UserError(
            f"prompt.init_file: {', '.join(sources)}: several sources are scored of prompts that are whole in their "
            "files: name one"
        )
    shapes = [{key: tensor.shape for key, tensor in prompt.state_dict().items()} for prompt in sources.values()]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(
            f"prompt.init_file: {', '.join(sources)}: these differ in the number of positions that stay: set "
            "prompt.num_frozen"
        )


def open_base_of(reading: Reading) -> OpenedBase:
    """The base without its weights. Raises UserError."""
    model = reading.config.model
    int8 = {"include": model.int8_include, "threshold": model.int8_threshold if model.int8_activations else None}
    return open_base(
        model.path,
        reading.family,
        dtype=getattr(torch, model.dtype),
        random_init=model.random_init,
        seed=reading.config.seed,
        int8=int8 if model.quantization == "int8" else None,
        fp8={"include": model.int8_include} if model.quantization == "fp8" else None,
        labels=reading.config.data.labels,
        choose_trained=functools.partial(choose_trained_of, reading),
    )


def choose_trained_of(reading: Reading, base: PreTrainedModel) -> set[str]:
    """Names of the base's parameters that the job trains. Raises UserError.

    The head over the vocabulary is not among them where a new head answers numbers.
    """
    chosen = choose_trained(next(iter(reading.members.values())).prompt, base)
    if reading.objective.target == "number":
        chosen -= parameters_of_head(base)
    return chosen


def base_facts(base: PreTrainedModel) -> BaseFacts:
    """What methods may need to know of a base."""
    text = base.config.get_text_config(decoder=True)
    num_heads, of_keys, of_values = key_value_heads(base.config)
    own = layer_heads(base)
    is_uniform = own is not None and len(set(own)) == 1
    num_layers = getattr(text, "num_hidden_layers", None)
    encoder = None
    if base.config.is_encoder_decoder:
        encoder, decoder = stacks_of_base(base) or (None, None)
        num_layers, num_heads, of_keys = decoder or (None, None, None)
        of_values = of_keys
        is_uniform = True
    return BaseFacts(
        width=embedding_width(base),
        num_layers=num_layers,
        num_key_value_heads=num_heads if is_uniform else None,
        head_width=of_keys,
        value_width=of_values,
        layer_heads=None if is_uniform else own,
        model_type=base.config.model_type,
        num_embeddings=getattr(base.get_input_embeddings(), "num_embeddings", None),
        hidden_size=hidden_size(base),
        num_first_layers=num_first_layers(base),
        encoder=encoder,
    )


def stacks_of_base(base: PreTrainedModel) -> tuple[Stack, Stack] | None:
    """The attention of an encoder-decoder's encoder and of its decoder; None where they are of an unknown shape."""
    stacks = layer_stacks(base)
    (of_encoder, width), (of_decoder, decoder_width) = (heads_of_half(base, h) for h in ("encoder", "decoder"))
    if len(stacks) != 2 or not (of_encoder and width and of_decoder and decoder_width):
        return None
    return Stack(len(stacks[0]), of_encoder, width), Stack(len(stacks[1]), of_decoder, decoder_width)


def check_precision(config: Config) -> None:
    """Raise UserError for what this machine cannot compute in."""
    if config.model.dtype == "float16" and not torch.cuda.is_available():
        raise UserError("model.dtype: float16 needs a GPU: use bfloat16 or float32 on a CPU")
    if config.model.dtype == "bfloat16" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < FIRST_WITH_BFLOAT16:
            name = torch.cuda.get_device_name()
            raise UserError(
                f"model.dtype: bfloat16 needs a GPU of compute capability {FIRST_WITH_BFLOAT16}.0 or newer, and this "
                f"{name} has {major}.{minor}: use float16"
            )


def build_deepspeed_json(config: Config, base: PreTrainedModel, world: World | None) -> dict[str, Any]:
    """DeepSpeed's JSON filled in and accepted by DeepSpeed. Raises UserError."""
    file = show_source(config.deepspeed)
    content = fill_deepspeed_json(config, hidden_size=hidden_size(base))
    check_with_deepspeed(without_autos(content), config.deepspeed)
    settle_offload(content, base, world.size if world else None, file)
    settle_prefetch(content, base)
    settle_residency(content, base)
    read_settings(content, len(layers_of(base)), file)
    return content


def check_positions(config: Config, base: PreTrainedModel) -> None:
    """Raise UserError where rows could be longer than a base's learned positions or fixed rotary frequencies."""
    most = max_positions(base)
    fixed = fixed_positions(base.config)
    num_virtual = config.prompt.num_virtual_tokens
    length = config.data.max_length
    assert length is not None, "the reading has settled it"
    needed = num_virtual + length
    if most is not None and needed > most:
        raise UserError(
            f"data.max_length: {length} with {num_virtual} virtual tokens needs "
            f"{needed} positions, the base has {most}: set data.max_length={most - num_virtual}"
        )
    if fixed is not None and needed > fixed:
        raise UserError(
            f"data.max_length: {length} with {num_virtual} virtual tokens needs {needed} positions, and the base's "
            f"rotary frequencies are fixed for the first {fixed} only: beyond, the longest row would change the "
            f"others: set data.max_length={fixed - num_virtual}"
        )


def settle_micro_batch(reading: Reading, parts: Parts, rows: TrainingRows, world: World) -> MicroBatchSize:
    """How large the micro-batches of a training are: what is asked for, where it fits, or what `auto` is.

    Collective: every rank must call. Raises UserError where nothing fits.
    """
    config = reading.config
    asked = config.train.micro_batch_tokens
    if asked == "auto":
        stored = from_main(world, lambda: read_stored(Path(config.output_dir)))
        if stored is not None:
            return stored
    base = parts.opened.model
    prompts = list(parts.prompts.values())
    room = find_room(base, parts.deepspeed_json, world.size, world.device)
    fixed = {
        "base": room.base,
        "gathered layers": gathered_bytes(parts.deepspeed_json, base),
        "prompts": prompt_bytes([*prompts, base]),
    }
    if world.device.type != "cuda":
        fixed["context cache"] = int(config.train.context_cache_gib * GIB)
    work = Workload(
        base=base,
        build_model=lambda own: reading.family.model_class(own, prompts, reading.objective, config.prompt.placement),
        rows=rows,
        members=list(reading.members),
        batch_size=config.train.batch_size,
        world_size=world.size,
        on_host=world.device.type != "cuda",
    )
    number = None if asked == "auto" else asked
    found = together(world, lambda: fit_micro_batch(number, work, room, parts.deepspeed_json, fixed))
    if number is not None:
        return MicroBatchSize(number)
    size = MicroBatchSize(-int(max_over_ranks(-found, world)), may_halve=True)
    if world.is_main:
        print(f"train.micro_batch_tokens: auto is {size.tokens}: {room.free / GIB:.1f} GiB {room.where} are free")
    return size


def build_job(
    reading: Reading,
    world: World,
    *,
    with_start: bool = True,
    scales: dict[str, TargetScale] | None = None,
    rows: TrainingRows | None = None,
) -> Job:
    """Load everything and put it under the engine. Collective: every rank must call. Raises UserError.

    `scales`: of the members' targets, where they are numbers. `rows` are those to train on, if any.
    """
    path = reading.config.model.path
    with BusyLine(f"opening the base {path}"):
        parts = together(world, lambda: build_parts(reading, world, with_start=with_start, rows=rows))
    size = MicroBatchSize(reading.config.train.most_positions)
    if rows is not None:
        size = settle_micro_batch(reading, parts, rows, world)
    reading = reading.with_micro_batch(size.tokens)
    config = reading.config
    if parts.opened.note and world.is_main:
        print(f"model.path: {path}: {parts.opened.note}", flush=True)
    slower = describe_fallback(world.device) if config.model.quantization != "none" else None
    if slower and world.is_main:
        print(slower, flush=True)
    if config.model.compile == "auto":
        fuse(parts.opened.model, parts.opened.trained, lambda line: print(line, flush=True) if world.is_main else None)
    probe = None
    if config.model.check:
        probe = together(world, lambda: draw_probe(reading, parts.opened, parts.prompts.values()))
    began = time.perf_counter()
    base = fill_base(parts, config, world)
    loading = {"load_s": time.perf_counter() - began, "bytes_read": parts.opened.weights.bytes_read}
    fingerprint = fingerprint_base(path, random_init=config.model.random_init, seed=config.seed)
    cache = together(world, lambda: build_context_cache(config, fingerprint, world.device))
    model = reading.family.model_class(
        base,
        list(parts.prompts.values()),
        reading.objective,
        config.prompt.placement,
        [scales[name] for name in parts.prompts] if scales else None,
    )
    with BusyLine("starting DeepSpeed"):
        engine = build_engine(model, reading.members, parts.deepspeed_json, world, cache=cache)
    if probe is not None:
        with BusyLine("comparing the base's outputs with its own (model.check)"):
            check_base(engine, probe, config, world)
    together(world, engine.read_starts)
    longest = longest_answer(rows.examples) if rows is not None else None
    return Job(reading, engine, fingerprint, loading, size, longest, parts.sources)


def fill_base(parts: Parts, config: Config, world: World) -> PreTrainedModel:
    """The base with its weights: whole, or this rank's part of them. Collective."""
    if zero_stage(parts.deepspeed_json) != 3:
        return together(world, lambda: fill_whole(parts.opened, world.device))
    swapped_dtype = parts.opened.dtype if config.model.quantization == "none" else torch.int8
    sharder = Sharder(parts.deepspeed_json, swapped_dtype)
    return together(world, lambda: fill_sharded(parts.opened, sharder))


def build_context_cache(config: Config, fingerprint: str, device: torch.device) -> ContextCache | None:
    """The cache that config section `train` asks for. Raises UserError."""
    gib = config.train.context_cache_gib
    on_gpu_gib = config.train.context_cache_gpu_gib if device.type == "cuda" else 0
    folder = config.train.context_cache_dir
    if not (gib or on_gpu_gib or folder):
        return None
    numbers = config.model.model_dump(exclude={"path", "family", "random_init", "check"})  # precision and quantization
    identity = json.dumps({"base": fingerprint, "cuda": torch.cuda.is_available(), **numbers}, sort_keys=True)
    return ContextCache(
        max_bytes=int(gib * 2**30),
        folder=Path(folder) if folder else None,
        identity=identity,
        device=device,
        device_bytes=int(on_gpu_gib * 2**30),
    )
