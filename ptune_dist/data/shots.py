"""Examples in the prompt: training rows, written out with their answers before the row that is asked."""

import random

import numpy as np

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.build import Split, build_templates, label_column
from ptune_dist.data.encode import Encoding
from ptune_dist.data.json_values import text_of
from ptune_dist.data.template import MARKER, TARGET_KEY, TEMPLATE_KEY, render_batches
from ptune_dist.data.views import PickedRows

MOST_READ = 1000  # rows whose labels are looked at

Shot = tuple[str, str]  # input and target


def draw_shots(data: DataConfig, split: Split, encoding: Encoding, count: int, seed: int) -> list[Shot]:
    """The inputs and targets of drawn training rows, as `encoding` writes them; the same for the same seed and rows.

    Of rows with labels, about as many of each. Fewer than `count` where there are fewer rows. Raises UserError.
    """
    rng = random.Random(seed)
    rows = PickedRows.of(split.rows, np.array(sorted(choose_rows(data, split, count, rng)), np.int64))
    template, target = build_templates(data, encoding.placement, encoding.around)
    shots: list[Shot] = []
    for _, inputs, targets in render_batches(rows, {TEMPLATE_KEY: template, TARGET_KEY: target}, max(1, count)):
        shots += zip([text.replace(MARKER, "") for text in inputs], targets, strict=True)
    rng.shuffle(shots)
    return shots


def choose_rows(data: DataConfig, split: Split, count: int, rng: random.Random) -> list[int]:
    """The numbers of `count` rows; of a row that makes several examples, that of the first."""
    ends = np.arange(1, len(split.rows) + 1) if split.ends is None else split.ends
    order = [int(end) for end in np.diff(ends, prepend=0).nonzero()[0]]
    rng.shuffle(order)
    firsts = [int(ends[row - 1]) if row else 0 for row in order]
    if not data.labels:
        return firsts[:count]
    column = label_column(data)
    waiting: dict[str, list[int]] = {label: [] for label in data.labels}
    for first in firsts[:MOST_READ]:
        of_label = waiting.get(text_of(split.rows.read(first, first + 1)[0].get(column)), [])
        of_label.append(first)
        if all(len(found) >= count for found in waiting.values()):
            break
    names = list(waiting)
    rng.shuffle(names)
    found = [waiting[name][turn] for turn in range(count) for name in names if turn < len(waiting[name])]
    return found[:count]


def write_shots(shots: list[Shot], task: str, *, on_new_line: bool) -> str:
    """The text before a row: the task, if any, and the examples, with blank lines between.

    on_new_line: a target stands on a line of its own, where it is no continuation of the input.
    """
    examples = [f"{text}\n{target.strip()}" if on_new_line else text + target for text, target in shots]
    return "".join(part.rstrip() + "\n\n" for part in ([task] if task else []) + examples)


def write_turns(shots: list[Shot], task: str) -> tuple[Shot, ...]:
    """The examples as turns of a chat; the task stands in the first one."""
    turns = [(text, target.strip()) for text, target in shots]
    if task and turns:
        turns[0] = (f"{task}\n{turns[0][0]}", turns[0][1])
    return tuple(turns)
