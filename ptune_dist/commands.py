"""What `evaluate`, `generate` and `export` do with a run's trained prompt."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TextIO

import datasets
import numpy as np
import torch

from ptune_dist.base.source import fingerprint_base, load_shape
from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.config.schema import Config, DataConfig
from ptune_dist.data.build import build_inputs, build_split, build_templates
from ptune_dist.data.encode import TokenPair
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.distributed.world import World, init_distributed, together
from ptune_dist.errors import UserError
from ptune_dist.evaluation.answer_plan import Decoding
from ptune_dist.evaluation.evaluator import Evaluator, build_evaluator
from ptune_dist.evaluation.generate import generate_texts
from ptune_dist.evaluation.splits import check_inputs, check_lengths
from ptune_dist.families import FAMILIES
from ptune_dist.prompts.export import check_for_peft, export_peft, export_prompt_embeds
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.folder import write_json
from ptune_dist.run.job import open_base_of
from ptune_dist.run.reading import Reading, build_reading
from ptune_dist.run.stored_prompt import build_trained_job, check_base

CHUNK_ROWS = 256  # rows of one rank that are answered before they are written


def evaluate_run(config: Config, run_dir: Path) -> None:
    """Evaluate the prompt on `data.validation`; print the metrics and write evaluation.json. Collective."""
    world = init_distributed()
    reading = together(world, lambda: build_reading(config))
    evaluator = together(world, lambda: build_run_evaluator(reading, run_dir))
    engine = build_trained_job(reading, run_dir, world).engine
    ((metrics, samples),) = evaluator(engine, engine.members).values()
    content = {"data": config.data.validation, "num_examples": len(evaluator.split.examples), **metrics}
    if evaluator.signatures:
        content["signatures"] = evaluator.signatures
    file = run_dir / "evaluation.json"
    together(world, lambda: write_json(file, content | {"samples": samples}) if world.is_main else None)
    if world.is_main:
        print(json.dumps(content, indent=2))


def build_run_evaluator(reading: Reading, run_dir: Path) -> Evaluator:
    """Raises UserError."""
    config = reading.config
    encoding = reading.encoding(config)
    split = build_split(config.data, encoding, which="validation", max_examples=config.evaluate.max_examples)
    if split is None:
        raise UserError(f"{run_dir}/config.yaml: data.validation is missing: give data.validation=FILE")
    check_inputs(split.examples, config.prompt)
    return build_evaluator(config, split, reading)


def generate_for_run(
    config: Config, run_dir: Path, *, text: str | None, file: str | None, output: Path | None, decoding: Decoding
) -> None:
    """Answer one text or the rows of a file: JSON lines in the rows' order, written as they come. Collective."""
    world = init_distributed()
    reading = together(world, lambda: build_reading(config))
    rows = together(world, lambda: read_input_rows(config.data, config.prompt.placement, text, file))
    inputs = together(world, lambda: build_run_inputs(reading, rows))
    stream = together(world, lambda: open_output(output, world))
    job = build_trained_job(reading, run_dir, world)
    chunk = CHUNK_ROWS * world.size
    with fault_on_failed_write(output) if output else contextlib.nullcontext(), stream as out:
        for first in range(0, len(inputs), chunk):
            some = inputs[first : first + chunk]
            answers = dict(generate_texts(job.engine, job.tokenizer, some, decoding, first=first))
            if out:
                for i in sorted(answers):
                    row = rows.dataset[i] | {"generated": answers[i]}
                    print(json.dumps(row, ensure_ascii=False, default=str), file=out, flush=True)


def build_run_inputs(reading: Reading, rows: Rows) -> list[TokenPair]:
    """The inputs of rows that are to be answered. Raises UserError."""
    config = reading.config
    inputs = build_inputs(config.data, rows, reading.encoding(config))
    lengths = np.array([len(context) + len(rest) for context, rest in inputs])
    check_lengths(lengths, config.prompt, rows.where)
    return inputs


def open_output(path: Path | None, world: World) -> contextlib.AbstractContextManager[TextIO | None]:
    """Where rank 0 writes: a file or standard output; None on the other ranks. Raises UserError."""
    if not world.is_main:
        return contextlib.nullcontext()
    try:
        return open(path, "w", encoding="utf-8") if path else contextlib.nullcontext(sys.stdout)
    except OSError as error:
        raise UserError(f"--output: {path}: {error.strerror}") from None


def read_input_rows(data: DataConfig, placement: str, text: str | None, file: str | None) -> Rows:
    """The rows of a file, or the one row that a text makes for a template of one column. Raises UserError."""
    if file:
        return load_rows(file, key="--input-file", default_split="test")
    template, _ = build_templates(data, placement)
    if len(template.columns) != 1:
        columns = ", ".join(template.columns) or "none"
        raise UserError(f"--input: data.template takes {columns}: give rows with --input-file")
    return Rows("--input", datasets.Dataset.from_list([{template.columns[0]: text}]), "rows")


def export_run(config: Config, run_dir: Path, *, to: str, out: Path, text: str | None, file: str | None) -> None:
    """Write a PEFT adapter, or prompt embeddings of the given inputs, to folder `out`. Raises UserError."""
    tensors, facts = load_prompt(run_dir / "prompt")
    if to == "peft":
        check_for_peft(tensors, facts)
        family = FAMILIES[facts["base"]["family"]]
        shape = None
        if family.trains_head:  # the base's own config.json does not know the labels
            with_labels = load_shape(config.model.path)
            family.prepare_shape(with_labels, config.data.labels)
            shape = with_labels.to_json_string()
        export_peft(tensors, facts, family.peft_task, out, shape)
        return
    model = config.model
    fingerprint = fingerprint_base(model.path, random_init=model.random_init, seed=config.seed)
    check_base(config, facts, fingerprint, run_dir)
    reading = build_reading(config)
    inputs = []
    if text is not None or file is not None:
        rows = read_input_rows(config.data, config.prompt.placement, text, file)
        inputs = build_inputs(config.data, rows, reading.encoding(config))
    export_prompt_embeds(tensors, open_base_of(reading).embed, inputs, getattr(torch, model.dtype), out)
