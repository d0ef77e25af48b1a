"""How much memory training takes on a rank, before any weight is read, and the largest micro-batch that fits.

What a pass keeps is measured on a sample of the training rows, with tensors that have no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.layers import hidden_size, layers_of
from ptune_dist.base.memory_check import GIB, Room
from ptune_dist.base.recompute import SECTION, read_settings
from ptune_dist.data.batches import Unit, collate, plan_micro_batches
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.errors import UserError
from ptune_dist.model.head import CHUNK_BYTES
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.model.saved_bytes import SavedBytes, measure_pass

SAMPLE_TOKENS = 2048
STATES = 6  # a parameter of a prompt, its gradient, the sum over ranks, two moments, and a copy for a step taken back
LOGITS = 3  # of a chunk: in the base's precision and in float32, and their gradient
TRANSIENTS = 3  # tensors as large as the largest of a layer that backward makes beside what was kept
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

    def longest_units(self) -> list[Unit]:
        """As many of the longest examples as a step has, each read by all members."""
        longest = np.argsort(-self.rows.examples.lengths)[: self.batch_size]
        return [(int(example), tuple(range(len(self.members)))) for example in longest]


def fit_micro_batch(
    asked: int | None, work: Workload, room: Room, content: dict[str, Any], fixed: dict[str, int]
) -> int:
    """The positions of a micro-batch: those that are asked for, if they fit, or with None the most that fit.

    `fixed` are bytes that do not depend on them, the base's own included. Raises UserError.
    """
    model = work.build_model(work.base)
    units = work.longest_units()
    examples = work.rows.examples
    alone = max(model.count_positions([unit], examples) for unit in units)
    in_step = max(alone, -(-model.count_positions(units, examples) // work.world_size))
    wanted = min(asked or max(in_step, LEAST_CAP), max(in_step, alone))
    base = sum(fixed.values())
    if asked and base + wanted * guess_per_position(work.base, int(examples.lengths.max())) < SMALL_SHARE * room.free:
        return asked
    need = TrainingNeed(fixed | {"logits": logits_bytes(work.base, wanted)}, bytes_per_position(work, model, content))
    if asked is None:
        found = min(need.largest(SAFE_SHARE * room.free), max(in_step, LEAST_CAP))
        if found >= alone:
            return found
    elif TOLERANCE * need.total(wanted) <= room.free:
        return asked
    raise UserError(describe_shortage(asked, wanted, alone, need, room, recomputes=bool(content.get(SECTION))))


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
    others = "use more ranks with ZeRO-3, model.quantization=int8 or a smaller data.max_length"
    return text + (
        "none fits: " + others if recomputes else f"none fits: add {SECTION} to DeepSpeed's JSON, or {others}"
    )


def bytes_per_position(work: Workload, model: PromptedModel, content: dict[str, Any]) -> float:
    """What a rank holds of each position of a micro-batch at the peak, in backward."""
    saved, positions = measure_sample(work, model)
    settings = read_settings(content, len(saved.of_layers), "deepspeed")
    layers = sum(saved.of_layers)
    if settings:
        layers = max(saved.of_layers) + (0 if settings["cpu_checkpointing"] else saved.inputs)
    return (layers + saved.outside + saved.contexts + TRANSIENTS * saved.largest) / positions


def measure_sample(work: Workload, model: PromptedModel) -> tuple[SavedBytes, int]:
    """What a micro-batch of the first step's rows keeps, and how many positions it has."""
    rows = work.rows
    units = rows.units(rows.of_step(1, work.members), work.members)
    plan = plan_micro_batches(
        units,
        lambda some: model.count_positions(some, rows.examples),
        world_size=1,
        micro_batch_tokens=SAMPLE_TOKENS,
    )
    shares = max(plan, key=lambda shares: model.count_positions(shares[0], rows.examples))
    positions = model.count_positions(shares[0], rows.examples)
    try:
        return measure_pass(work.build_model, work.base, collate(rows.examples, shares, 0, pad_id=0)), positions
    except Exception:  # an architecture that looks at numbers
        width = hidden_size(work.base) * positions * next(work.base.parameters()).element_size()
        num_layers = len(layers_of(work.base))
        return SavedBytes([20 * width] * num_layers, inputs=width * num_layers, largest=4 * width), positions


def guess_per_position(base: PreTrainedModel, longest: int) -> int:
    """More bytes than a position takes in any architecture, for texts of `longest` tokens."""
    text = base.config.get_text_config()
    width = hidden_size(base)
    inner = getattr(text, "intermediate_size", None) or 4 * width
    heads = getattr(text, "num_attention_heads", None) or 1
    return 4 * len(layers_of(base)) * (60 * width + 12 * inner + 12 * heads * longest)


def logits_bytes(base: PreTrainedModel, positions: int) -> int:
    """Of one chunk of targets."""
    vocabulary = getattr(base.config.get_text_config(decoder=True), "vocab_size", 0)
    return LOGITS * min(CHUNK_BYTES, 4 * vocabulary * positions)


def prompt_bytes(prompts: list[nn.Module]) -> int:
    """Of all prompts with what training keeps of them."""
    return STATES * 4 * sum(p.numel() for prompt in prompts for p in prompt.parameters())
