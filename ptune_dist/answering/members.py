"""`generate` with many members of a sweep over one base: every row by all of them, or each row by the one it names."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ptune_dist.commands import (
    CHUNK_ROWS,
    GenerateRequest,
    build_decoding,
    build_run_inputs,
    check_output,
    find_tasks,
    open_output,
    read_input_rows,
)
from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.config.schema import Config
from ptune_dist.data.json_values import dump_json
from ptune_dist.data.sources import Rows
from ptune_dist.data.views import PickedRows
from ptune_dist.distributed.world import from_main, init_distributed, together
from ptune_dist.errors import UserError
from ptune_dist.evaluation.answer_plan import Decoding
from ptune_dist.evaluation.generate import generate_of_tasks, generate_with_bank
from ptune_dist.evaluation.row_scores import RowScores, add_scores, build_row_scores
from ptune_dist.run.job import Job
from ptune_dist.run.reading import Reading, build_reading
from ptune_dist.run.stored_prompt import build_members_job

COLUMN = "member"  # of the answers


@dataclass(frozen=True)
class Asked:
    """What one member answers: the numbers of rows, int64 [N], those rows' inputs, and their tasks, if any."""

    numbers: np.ndarray
    inputs: list[Any]
    tasks: np.ndarray | None


def generate_for_members(config: Config, run_dir: Path, request: GenerateRequest, column: str | None) -> None:
    """Answer rows with members of the sweep `run_dir`: those that `column` names, or all of them without one.

    JSON lines in the rows' order, each with the member that answered it; written as they come. Collective.
    Raises UserError.
    """
    world = init_distributed()
    together(world, lambda: check_output(request.output, request.file, config))
    reading = together(world, lambda: build_reading(config))
    rows = together(world, lambda: read_member_rows(reading, request))
    asked = together(world, lambda: prepare(reading, rows, request, column))
    reading = replace(reading, members={name: reading.members[name] for name in asked})
    scores = together(world, lambda: build_scores(reading.members, rows))
    stream = together(world, lambda: open_output(request.output, world))
    folders = {name: run_dir / "members" / Path(member.output_dir).name for name, member in reading.members.items()}
    job = build_members_job(reading, folders, world)
    decodings = from_main(world, lambda: {name: build_decoding(job, own, request) for name, own in folders.items()})
    with fault_on_failed_write(request.output) if request.output else contextlib.nullcontext(), stream as out:
        chunk = CHUNK_ROWS * world.size
        for first in range(0, len(rows), chunk):
            found = answer_chunk(job, asked, decodings, range(first, min(first + chunk, len(rows))))
            for number, name, text in found if out else []:
                line = add_scores(scores[name], rows, number, {COLUMN: name, "generated": text})
                print(dump_json(line, ensure_ascii=False, default=str), file=out, flush=True)


def build_scores(members: dict[str, Config], rows: Rows) -> dict[str, RowScores | None]:
    """How each member's answers are scored, where the rows say what is right. Raises UserError."""
    return {name: build_row_scores(own.data, own.evaluate, rows, chooses_label=False) for name, own in members.items()}


def read_member_rows(reading: Reading, request: GenerateRequest) -> Rows:
    """Raises UserError. A text is a row for the first member's template."""
    if request.chooses_label:
        raise UserError("--labels: with several members, answers are texts: name one member")
    first = next(iter(reading.members.values()))
    return read_input_rows(first.data, first.prompt, request.text, request.file)


def prepare(reading: Reading, rows: Rows, request: GenerateRequest, column: str | None) -> dict[str, Asked]:
    """What each member that has rows answers, in the order of the sweep. Raises UserError."""
    readers = read_readers(rows, list(reading.members), column)
    asked = {}
    for name, numbers in readers.items():
        own = replace(reading, config=reading.members[name])
        chosen = PickedRows.of(rows, numbers)
        asked[name] = Asked(numbers, build_run_inputs(own, chosen), find_tasks(own.config, chosen, request.task))
    return asked


def read_readers(rows: Rows, names: list[str], column: str | None) -> dict[str, np.ndarray]:
    """The numbers of the rows that each member answers. Raises UserError for a row that names no member."""
    if column is None:
        return {name: np.arange(len(rows)) for name in names}
    if column not in rows.columns():
        known = ", ".join(rows.columns())
        raise UserError(f"--member-column: {column!r} is no column of {rows.name}; its columns: {known}")
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows.read(0, len(rows))):
        if row[column] not in names:
            raise UserError(f"{rows.where(number)}: {column}: {row[column]!r} is none of {', '.join(names)}")
        found.setdefault(row[column], []).append(number)
    return {name: np.array(found[name], np.int64) for name in names if name in found}


def answer_chunk(
    job: Job, asked: dict[str, Asked], decodings: dict[str, Decoding], rows: range
) -> list[tuple[int, str, str]]:
    """(row, member, answer) of some rows, in their order, then in the members'. Collective."""
    some = {name: cut(own, rows) for name, own in asked.items()}
    places = sorted((row, member, name) for member, (name, (own, _)) in enumerate(some.items()) for row in own.numbers)
    texts = answer_together(job, some, decodings)
    if texts is None:
        texts = {}
        for member, (name, (own, first)) in enumerate(some.items()):
            answers = generate_of_tasks(
                job.engine, job.tokenizer, own.inputs, decodings[name], own.tasks, member=member, first=first
            )
            texts |= {(int(own.numbers[number - first]), name): text for number, text in answers if own.inputs}
    return [(int(row), name, texts[int(row), name]) for row, _, name in places]


def cut(asked: Asked, rows: range) -> tuple[Asked, int]:
    """What a member answers of some rows, and how many rows of its own precede them."""
    first, last = np.searchsorted(asked.numbers, [rows.start, rows.stop]).tolist()
    tasks = None if asked.tasks is None else asked.tasks[first:last]
    return Asked(asked.numbers[first:last], asked.inputs[first:last], tasks), first


def answer_together(
    job: Job, some: dict[str, tuple[Asked, int]], decodings: dict[str, Decoding]
) -> dict[tuple[int, str], str] | None:
    """Answers by row and member, all in the same passes; None where these cannot be: see `generate_with_bank`."""
    if any(decoding.sampling for decoding in decodings.values()):  # a row draws as it does alone
        return None
    keys = [(int(number), name) for name, (own, _) in some.items() for number in own.numbers]
    inputs = [row for own, _ in some.values() for row in own.inputs]
    members = [member for member, (own, _) in enumerate(some.values()) for _ in own.inputs]
    answers = generate_with_bank(job.engine, job.tokenizer, inputs, members, [decodings[name] for _, name in keys])
    return None if answers is None else dict(zip(keys, answers, strict=True))
