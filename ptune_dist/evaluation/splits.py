"""The rows of a run: what its members train on, and what evaluates them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptune_dist.common.files import fault_on_failed_write, replace_file
from ptune_dist.config.schema import Config, PromptConfig
from ptune_dist.config.sweep import naming_member
from ptune_dist.data.build import Split, build_split
from ptune_dist.data.encode import Encoding
from ptune_dist.data.examples import Examples
from ptune_dist.data.held_out import FILE
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.errors import UserError
from ptune_dist.evaluation.evaluator import Evaluator, build_evaluator
from ptune_dist.model.value_head import TargetScale, measure_scale
from ptune_dist.prompts.build import find_method
from ptune_dist.run.folder import write_json
from ptune_dist.run.reading import Reading

SKIPPED = "skipped_rows.jsonl"


@dataclass(frozen=True)
class RunRows:
    """What a run reads: the members' training rows, each member's own, and what evaluates it, if anything does."""

    training: TrainingRows
    splits: dict[str, Split]
    evaluators: dict[str, Evaluator]

    def distinct(self) -> dict[str, Split]:
        """Splits by a name for people, those that several members share once."""
        found: dict[str, Split] = {}
        for name, split in self.splits.items():
            label = f" ({name})" if len(self.splits) > 1 else ""
            evaluator = self.evaluators.get(name)
            for which, own in (("train", split), ("validation", evaluator.split if evaluator else None)):
                if own is not None and not any(own is known for known in found.values()):
                    found[which + label] = own
        return found

    def digests(self) -> dict[str, str]:
        """Of `distinct`."""
        return {name: split.digest() for name, split in self.distinct().items()}


def build_splits(reading: Reading) -> RunRows:
    """The members' training rows, and the evaluator of each member that has validation rows. Raises UserError.

    What several members share is read once.
    """
    config = reading.config
    splits: dict[str, Split] = {}
    evaluators: dict[str, Evaluator] = {}
    known: dict[Any, tuple[Split, Evaluator | None]] = {}
    for name, member in reading.members.items():
        encoding = reading.encoding(member)
        key = member.data.model_dump_json(), encoding.needs_rest, member.prompt.around
        if key not in known:
            with naming_member(reading.members, name, "data"):
                known[key] = read_member(member, encoding, reading)
        splits[name], evaluator = known[key]
        with naming_member(reading.members, name, "data", "prompt"):
            check_inputs(splits[name].examples, member.prompt)
            if evaluator:
                check_inputs(evaluator.split.examples, member.prompt)
        if evaluator:
            evaluators[name] = evaluator
    seeds = {name: member.seed for name, member in reading.members.items()}
    training = TrainingRows(splits, batch_size=config.train.batch_size, seeds=seeds)
    return RunRows(training, splits, evaluators)


def read_member(member: Config, encoding: Encoding, reading: Reading) -> tuple[Split, Evaluator | None]:
    """A member's training rows, and what evaluates it where it has validation rows. Raises UserError."""
    folder = Path(member.output_dir)
    most = reading.config.evaluate.max_examples
    held_out = build_split(member.data, encoding, which="validation", max_examples=most, folder=folder)
    evaluator = build_evaluator(member, held_out, reading) if held_out else None
    split = build_split(member.data, encoding, which="train", folder=folder)
    assert split is not None, "data.train is required"
    return split, evaluator


def write_rows(reading: Reading, read: RunRows) -> None:
    """Store in the folder of each member which rows validate it, where they are drawn. One rank calls."""
    for name, member in reading.members.items():
        held_out = read.splits[name].held_out
        if held_out is not None:
            write_json(Path(member.output_dir) / FILE, held_out.content())
    write_skipped(reading.config, read)


def describe_skipped(config: Config, read: RunRows) -> list[str]:
    """A line about each split with rows that cannot be used."""
    found = []
    for which, split in read.distinct().items():
        whole, in_part = split.skipped.whole, split.skipped.in_part
        if whole or in_part:
            total = len(whole) + split.num_rows
            more = f", {len(in_part):,} more lose an answer" if in_part else ""
            found.append(
                f"data.on_error: {len(whole):,} of {total:,} rows of {which} are skipped{more}, see "
                f"{Path(config.output_dir) / SKIPPED}; the first: {[*whole, *in_part][0]}"
            )
    return found


def write_skipped(config: Config, read: RunRows) -> None:
    """Name the skipped rows in a file of the run. One rank calls."""
    lines = [
        json.dumps({"split": which, "error": line, **kind}, ensure_ascii=False) + "\n"
        for which, split in read.distinct().items()
        for found, kind in ((split.skipped.whole, {}), (split.skipped.in_part, {"in_part": True}))
        for line in found
    ]
    if lines:
        file = Path(config.output_dir) / SKIPPED
        with fault_on_failed_write(file):
            replace_file(file, "".join(lines).encode())


def check_inputs(examples: Examples, prompt: PromptConfig) -> None:
    """Raise UserError for an empty input where a method has no virtual token to predict the target from."""
    first = examples.known.first_empty
    if first is not None and not find_method(prompt).stands_in_sequence:
        raise UserError(describe_empty_input(examples.where(first), prompt))


def check_lengths(lengths: np.ndarray, prompt: PromptConfig, where: Callable[[int], str]) -> None:
    """As `check_inputs`, of the lengths of inputs [N]."""
    empty = np.flatnonzero(lengths == 0)
    if len(empty) and not find_method(prompt).stands_in_sequence:
        raise UserError(describe_empty_input(where(int(empty[0])), prompt))


def describe_empty_input(where: str, prompt: PromptConfig) -> str:
    return f"{where}: the input is empty, but {prompt.method} needs at least one token"


def measure_scales(reading: Reading, rows: TrainingRows) -> dict[str, TargetScale] | None:
    """Mean and standard deviation of each member's targets, where they are numbers."""
    if rows.examples.numbers is None:
        return None
    if not reading.config.train.standardize_targets:
        return dict.fromkeys(reading.members, TargetScale())
    return {name: measure_scale(rows.examples.numbers[rows.slice_of(name)]) for name in reading.members}


def find_lead(examples: Examples) -> tuple[np.ndarray, bool]:
    """What the contexts of all examples begin with, and whether they end with it."""
    return np.array(examples.known.lead, np.int32), examples.known.is_lead_whole
