"""How much memory training takes on a rank, before any weight is read, and the largest micro-batch that fits.

What a pass takes is measured on a sample of the training rows, with tensors that have no memory.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.layers import hidden_size, layers_of, shapes_of_layers
from ptune_dist.base.memory_check import GIB, Room
from ptune_dist.base.recompute import SECTION, read_settings
from ptune_dist.data.batches import Unit, collate, plan_micro_batches
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.errors import UserError
from ptune_dist.model.peak_bytes import measure_pass
from ptune_dist.model.prompted_model import PromptedModel

SAMPLE_TOKENS = 2048
FACTOR_OF_WIDTH = 20  # of what a layer keeps of a position, where it cannot be measured
# Of what tensors take, on a host: glibc's allocator leaves holes between them. Measured for causal bases.
HOST_OVERHEAD = 1.5
STATES = 6  # a parameter of a prompt, its gradient, the sum over ranks, two moments, and a copy for a step taken back
SAFE_SHARE = 0.9  # of the free memory that `auto` takes
TOLERANCE = 0.8  # an estimate that is not larger than the free memory divided by this is not refused
SMALL_SHARE = 0.25  # of the free memory: what is surely less is not measured
LEAST_CAP = 8192  # `auto` need not be less than this where it fits, however small a step is
ROUNDED_TO = 128


@dataclass(frozen=True)
class TrainingNeed:
    """Bytes of one rank: `fixed` ones by what they are for, and those of each position of a micro-batch."""

    fixed: dict[str, int]
    per_position: float

    def total(self, positions: int) -> float:
        return sum(self.fixed.values()) + positions * self.per_position

    def largest(self, num_bytes: float) -> int:
        """The most positions that fit in so many bytes, a multiple of 128 where it is more; 0 or less: none."""
        found = int((num_bytes - sum(self.fixed.values())) / max(self.per_position, 1))
        return found - found % ROUNDED_TO if found > ROUNDED_TO else found


@dataclass(frozen=True)
class Workload:
    """What is trained over which rows, as far as memory depends on it. `model` has the prompts over the base."""

    base: PreTrainedModel
    build_model: Callable[[PreTrainedModel], PromptedModel]
    rows: TrainingRows
    members: list[str]
    batch_size: int
    world_size: int
    on_host: bool  # computed on CPUs

    def longest_units(self) -> list[Unit]:
        """As many of the longest examples as a step has, each read by all members."""
        longest = self.rows.examples.longest_rows(self.batch_size)
        return [(example, tuple(range(len(self.members)))) for example in longest]


def fit_micro_batch(
    asked: int | None, work: Workload, room: Room, content: dict[str, Any], fixed: dict[str, int]
) -> int:
    """The positions of a micro-batch: those that are asked for, if they fit, or with None the most that fit.

    `fixed` are bytes that do not depend on them, the base's own included. Raises UserError.
    """
    model = work.build_model(copy.deepcopy(work.base))  # the base itself gets the head's hooks later
    units = work.longest_units()
    examples = work.rows.examples
    alone = max(model.count_positions([unit], examples) for unit in units)
    in_step = max(alone, -(-model.count_positions(units, examples) // work.world_size))
    wanted = min(asked or max(in_step, LEAST_CAP), max(in_step, alone))
    base = sum(fixed.values())
    if asked and base + wanted * guess_per_position(work.base, examples.known.longest) < SMALL_SHARE * room.free:
        return asked
    need = TrainingNeed(fixed, bytes_per_position(work, model, content))
    if asked is None:
        found = min(need.largest(SAFE_SHARE * room.free), max(in_step, LEAST_CAP))
        if found >= alone:
            return found
    elif TOLERANCE * need.total(wanted) <= room.free:
        return asked
    raise UserError(describe_shortage(asked, wanted, alone, need, room, recomputes=content.get(SECTION) is not None))


def describe_shortage(
    asked: int | None, wanted: int, alone: int, need: TrainingNeed, room: Room, *, recomputes: bool
) -> str:
    """What is needed and free, and what would fit."""
    tokens = wanted if asked else alone
    parts = [f"{name} {size / GIB:.1f}" for name, size in need.fixed.items() if size / GIB >= 0.05]
    parts.append(f"activations {tokens * need.per_position / GIB:.1f}")
    text = (
        f"train.micro_batch_tokens: {asked or 'auto'} needs about {need.total(tokens) / GIB:.1f} GiB {room.where} "
        f"({', '.join(parts)}) for {tokens} positions, but {room.free / GIB:.1f} GiB are free: "
    )
    fitting = need.largest(SAFE_SHARE * room.free)
    if fitting >= alone and asked:
        return text + f"the largest that fits is {fitting}"
    recomputing = "" if recomputes else f"add {SECTION} to DeepSpeed's JSON, "
    others = "use more ranks with ZeRO-3, model.quantization=int8 or a smaller data.max_length"
    return f"{text}none fits: {recomputing}{others}"


def bytes_per_position(work: Workload, model: PromptedModel, content: dict[str, Any]) -> float:
    """What a rank holds of each position of a micro-batch at most, found with a sample of the first step's rows."""
    rows = work.rows
    base = work.base
    units = rows.units(rows.of_step(1, work.members), work.members)

    def count(some: list[Unit]) -> int:
        return model.count_positions(some, rows.examples)

    plan = plan_micro_batches(units, count, world_size=1, micro_batch_tokens=SAMPLE_TOKENS)
    shares = max(plan, key=lambda shares: count(shares[0]))
    batch = collate(rows.examples, shares, 0, pad_id=0)
    layers = layers_of(base)
    settings = read_settings(content, len(layers), "deepspeed")
    width = hidden_size(base) * next(base.parameters()).element_size()
    try:
        found = measure_pass(work.build_model, base, batch, settings) / count(shares[0])
    except Exception:  # an architecture that looks at numbers; Korthikanti et al. 2022 (arXiv:2205.05198), equation 2
        return FACTOR_OF_WIDTH * width * len(layers)
    if work.on_host:
        return HOST_OVERHEAD * found
    kept_on_host = width * len(layers) if settings and settings["cpu_checkpointing"] else 0
    return found - kept_on_host


def guess_per_position(base: PreTrainedModel, longest: int) -> int:
    """More bytes than a position takes in any architecture, for texts of `longest` tokens."""
    width = hidden_size(base)
    shapes = shapes_of_layers(base.config.get_text_config())
    inner = max(getattr(shape, "intermediate_size", None) or 4 * width for shape in shapes)
    heads = max(getattr(shape, "num_attention_heads", None) or 1 for shape in shapes)
    return 4 * len(layers_of(base)) * (60 * width + 12 * inner + 12 * heads * longest)


def prompt_bytes(modules: Sequence[nn.Module]) -> int:
    """Of all that is trained in prompts, or in a base, with what training keeps of it."""
    return STATES * 4 * sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
