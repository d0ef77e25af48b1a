"""How long a run is and when it evaluates and saves, in steps: settled once, when its rows are counted.

A run's config.yaml has the steps, so that a resumed run has them too.
"""

import math
from dataclasses import replace

from ptune_dist.config.fields import EPOCH
from ptune_dist.config.schema import Config
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.errors import UserError
from ptune_dist.run.reading import Reading
from ptune_dist.run.training_defaults import fill_training

SECTIONS = ("evaluate", "checkpoint")  # which have a key `every`


def settle_length(reading: Reading, rows: TrainingRows) -> tuple[Reading, list[str]]:
    """The reading with every length of its configs in steps, and a line about each that was not. Raises UserError."""
    config = reading.config
    if not is_open(config):
        return reading, []
    counts = {name: rows.count_rows(name) for name in reading.members}
    needs_rows = [key for key in describe_open(config) if not key.endswith("share")]
    if needs_rows and len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:3])
        raise UserError(
            f"{needs_rows[0]}: the members' training rows differ in number ({shown}), and all train for the same "
            "steps: give steps"
        )
    num_rows = next(iter(counts.values()))
    settled, lines = settle(config, num_rows)
    members = {name: settle(member, num_rows)[0] for name, member in reading.members.items()}
    settled, members = fill_training(settled, members, reading.family)  # a warm-up that is a share of the steps
    return replace(reading, config=settled, members=members), lines


def is_open(config: Config) -> bool:
    """Whether a length is given in epochs or as a share of the run."""
    return bool(describe_open(config))


def describe_open(config: Config) -> list[str]:
    """The keys that are not in steps; those of a share of the run end in `share`."""
    found = ["train.epochs"] if config.train.epochs is not None else []
    for name in SECTIONS:
        every = getattr(config, name).every
        if every == EPOCH:
            found.append(f"{name}.every")
        elif isinstance(every, float):
            found.append(f"{name}.every share")
    return found


def settle(config: Config, num_rows: int) -> tuple[Config, list[str]]:
    """A config with its lengths in steps, and a line about each that was not. Raises UserError."""
    train = config.train
    lines = []
    batch = f"{num_rows:,} training rows in batches of {train.batch_size:,}"
    updates = {}
    max_steps = train.max_steps
    if train.epochs is not None:
        max_steps = max(1, math.ceil(round(train.epochs * num_rows / train.batch_size, 9)))
        if (train.warmup_steps or 0) >= max_steps:
            raise UserError(
                f"train.warmup_steps: {train.warmup_steps} must be less than the steps: train.epochs {train.epochs:g} "
                f"of {batch} are {max_steps:,}"
            )
        updates["train"] = train.model_copy(update={"epochs": None, "max_steps": max_steps})
        lines.append(f"train.epochs {train.epochs:g} of {batch}: train.max_steps {max_steps:,}")
    epochs = train.epochs or max_steps * train.batch_size / num_rows
    for name in SECTIONS:
        section = getattr(config, name)
        if isinstance(section.every, int):
            continue
        steps = max_steps / epochs if section.every == EPOCH else max_steps * section.every
        every = max(1, math.ceil(round(steps, 9)))
        updates[name] = section.model_copy(update={"every": every})
        lines.append(f"{name}.every {section.every}: every {every:,} of {max_steps:,} steps")
    return config.model_copy(update=updates), lines
