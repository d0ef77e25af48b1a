"""A base and its prompts under the engine: everything that a command needs before it can compute.

What is read from files is read first, on every rank, and a mistake found by any rank ends all of them.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptune_dist.base.fused import fuse
from ptune_dist.base.load import fill_whole
from ptune_dist.base.memory_check import GIB, find_room
from ptune_dist.base.open import OpenedBase
from ptune_dist.base.quantized_ops import describe_fallback
from ptune_dist.base.slow_dtype import describe_slow_dtype
from ptune_dist.base.source import fingerprint_base
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.config.deepspeed_json import zero_stage
from ptune_dist.config.schema import Config
from ptune_dist.data.examples import longest_answer
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, from_main, max_over_ranks, together
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.model.value_head import TargetScale
from ptune_dist.prompts.method import Method
from ptune_dist.run.base_check import check_base, draw_probe
from ptune_dist.run.memory_need import Workload, fit_micro_batch, prompt_bytes
from ptune_dist.run.micro_batch import MicroBatchSize, read_stored
from ptune_dist.run.parts import Parts, build_parts
from ptune_dist.run.reading import Reading
from ptune_dist.zero.engine import Engine, build_engine
from ptune_dist.zero.residency import gathered_bytes
from ptune_dist.zero.shard import Sharder, fill_sharded


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
    def prompts(self) -> dict[str, Method]:
        """Of each member."""
        return {name: self.engine.model.prompt(number) for number, name in enumerate(self.members)}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.reading.tokenizer


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
    if with_start:
        reading = reading.with_file_options(parts.prompts)
    config = reading.config
    if parts.opened.note and world.is_main:
        print(f"model.path: {path}: {parts.opened.note}", flush=True)
    if world.is_main:
        print_slower_ways(config, parts.opened, world.device)
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


def print_slower_ways(config: Config, opened: OpenedBase, device: torch.device) -> None:
    """A line for each way in which this machine computes the base more slowly than the config suggests."""
    fallback = describe_fallback(device) if config.model.quantization != "none" else None
    for line in (fallback, describe_slow_dtype(opened, device)):
        if line:
            print(line, flush=True)


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
