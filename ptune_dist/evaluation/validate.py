"""`validate`: what a config will do, before anything is trained.

Reads the data, the base's shape, the headers of its weights and a few embeddings; nothing that depends on the machine
that it will run on (memory, NVMe, the number of ranks).
"""

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptune_dist.base.open import OpenedBase
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.common.visible import show_controls
from ptune_dist.config.load import render_config
from ptune_dist.config.schema import Config
from ptune_dist.data.build import Split
from ptune_dist.data.encode import Encoding
from ptune_dist.data.examples import token_statistics
from ptune_dist.errors import UserError
from ptune_dist.evaluation.placement_costs import describe_cache, describe_choice, render_costs
from ptune_dist.evaluation.row_warnings import find_warnings
from ptune_dist.evaluation.seam import describe_seams
from ptune_dist.evaluation.splits import build_splits, describe_skipped
from ptune_dist.run.folder import check_run_dir, list_checkpoints
from ptune_dist.run.length import settle_length
from ptune_dist.run.parts import Parts, build_parts
from ptune_dist.run.reading import Reading, build_reading
from ptune_dist.run.trained_tokens import describe_trained_tokens
from ptune_dist.run.training_defaults import describe_rates, describe_warm_ups
from ptune_dist.zero.unused_sections import describe_unused

NUM_EXAMPLES = 5


def validate(config: Config) -> None:
    """Print the resolved config, token statistics and five examples. Raises UserError for anything that is wrong."""
    console = Console(highlight=False, soft_wrap=True)
    check_run_dir(config)
    reading = build_reading(config)
    # as `train`: the rows first, and a run that is resumed needs no longer what its prompt started from
    read = build_splits(reading)
    reading, lengths = settle_length(reading, read.training)
    config = reading.config
    is_new = not list_checkpoints(Path(config.output_dir) / "checkpoints")
    with BusyLine(f"opening the base {config.model.path}"):
        parts = build_parts(reading, None, with_start=is_new, rows=read.training)
    splits = read.distinct()
    train = next(iter(splits.values()))

    console.rule("config")
    console.print(render_config(reading.config), markup=False)
    console.rule("DeepSpeed's JSON, filled in")
    console.print(json.dumps(parts.deepspeed_json, indent=2), markup=False)
    console.rule("tokens")
    console.print(render_statistics(splits))
    console.print(f"base: {describe_base(parts.opened, reading)}; {describe_epochs(config, train)}")
    for line in lengths + describe_skipped(config, read):
        console.print(line, markup=False)
    for line in find_warnings(reading, read):
        console.print(f"warning: {line}", markup=False)
    for line in describe_seams(reading, read):
        console.print(line, markup=False)
    for line in notes_of(parts, config):
        console.print(line, markup=False)
    for line in describe_trained_tokens(parts.prompts, read.splits, reading):
        console.print(line, markup=False)
    if config.sweep:
        console.print(f"members: {len(reading.members)}: {', '.join(reading.members)}", markup=False)
        console.print(describe_rates(reading.members), markup=False)
        console.print(describe_warm_ups(reading.members), markup=False)
    if train.rows.kind != "text" and takes_contexts(reading, parts.opened):
        console.rule("placement")
        print_placements(console, reading, parts.opened, train)
    console.rule(Text("examples, the supervised part in [brackets]"))
    encoding = reading.encoding(next(iter(reading.members.values())))
    for index in spread(len(train.examples), NUM_EXAMPLES):
        console.print(render_example(train, index, encoding))


def notes_of(parts: Parts, config: Config) -> list[str]:
    """What `train` prints about the base's format and about DeepSpeed's JSON."""
    found = [describe_unused(parts.deepspeed_json)]
    if parts.opened.note:
        found.append(f"model.path: {config.model.path}: {parts.opened.note}")
    return [line for line in found if line]


def takes_contexts(reading: Reading, opened: OpenedBase) -> bool:
    """Whether there is a choice of placements: some bases keep nothing of a context that could be given back."""
    try:
        reading.family.check_contexts(opened.model, "infix")
    except UserError:
        return False
    return reading.family.has_contexts


def print_placements(console: Console, reading: Reading, opened: OpenedBase, train: Split) -> None:
    """What each placement would cost, and what a cache of contexts would hold."""
    config = reading.config
    if reading.family.shares_leads:
        console.print(render_costs(train.examples, config))
    console.print(describe_cache(train.examples, config, opened.model.config, reading.family))
    console.print(describe_choice(config.prompt.placement))


def spread(num: int, most: int) -> list[int]:
    """At most `most` of `num` indices, the first and the last among them and the others evenly between."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(int)).tolist()


def describe_base(opened: OpenedBase, reading: Reading) -> str:
    parameters = list(opened.model.parameters())
    num_bytes = sum(p.numel() * p.element_size() for p in parameters)
    size = f"{sum(p.numel() for p in parameters):,} parameters in {num_bytes / (1 << 20):,.1f} MiB"
    return f"{opened.model.config.model_type} ({reading.family.name}), {size}"


def render_statistics(splits: dict[str, Split]) -> Table:
    table = Table("split", "examples", "input p50/p90/max", "target p50/p90/max", "tokens", "truncated")
    for which, split in splits.items():
        found = token_statistics(split.examples)
        spreads = ["{p50} / {p90} / {max}".format(**found[part]) for part in ("input_tokens", "target_tokens")]
        total = found["input_tokens"]["total"] + found["target_tokens"]["total"]
        truncated = f"{found['num_truncated']:,} ({found['truncated_share']:.1%})"
        table.add_row(which, f"{found['num_examples']:,}", *spreads, f"{total:,}", truncated)
    return table


def describe_epochs(config: Config, split: Split) -> str:
    epochs = config.train.max_steps * config.train.batch_size / split.num_rows
    return f"{config.train.max_steps:,} steps of {config.train.batch_size} are {epochs:.1f} epochs"


def render_example(split: Split, index: int, encoding: Encoding) -> Text:
    """One example as the base reads it: context, virtual tokens, rest, [target]; escaped as in a YAML text."""
    examples = split.examples
    parts = [
        encoding.tokenizer.decode(examples.context_ids(index)),
        encoding.tokenizer.decode(examples.rest_ids(index)),
        encoding.targets.render(examples.target_ids(index), examples.number(index)),
    ]
    before, after, target = (show_controls(text.replace("\\", "\\\\")) for text in parts)
    return Text.assemble(before, ("<virtual tokens>", "dim"), after, ("[" + target + "]", "bold green"))
