"""What `evaluate`, `generate` and `export` do with a run's trained prompt.

Floor 6.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any, TextIO

import datasets
import torch

from ptune_dist.base.source import fingerprint_base
from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.config.schema import Config
from ptune_dist.data.build import build_inputs, build_split, build_templates
from ptune_dist.data.encode import TokenPair
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.distributed.world import World, init_distributed
from ptune_dist.errors import UserError
from ptune_dist.evaluation.evaluator import Evaluator, build_evaluator
from ptune_dist.evaluation.generate import generate_texts
from ptune_dist.prompts.export import check_for_peft, export_peft, export_prompt_embeds
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.folder import write_json
from ptune_dist.run.job import (
    build_family,
    build_opened_base,
    build_tokenizer,
    build_trained_job,
    check_base,
    together,
)

CHUNK_ROWS = 256  # rows of one rank that are answered before they are written


def evaluate_run(config: Config, run_dir: Path) -> None:
    """Evaluate the prompt on `data.validation`; print the metrics and write evaluation.json. Collective."""
    world = init_distributed()
    evaluator = together(world, lambda: build_run_evaluator(config, run_dir))
    engine = build_trained_job(config, run_dir, world).engine
    ((metrics, samples),) = evaluator(engine, engine.members).values()
    content = {"data": config.data.validation, "num_examples": len(evaluator.split.examples), **metrics}
    if evaluator.signatures:
        content["signatures"] = evaluator.signatures
    file = run_dir / "evaluation.json"
    together(world, lambda: write_json(file, content | {"samples": samples}) if world.is_main else None)
    if world.is_main:
        print(json.dumps(content, indent=2))


def build_run_evaluator(config: Config, run_dir: Path) -> Evaluator:
    tokenizer, family = build_tokenizer(config), build_family(config)
    split = build_split(
        config.data, tokenizer, which="validation", family=family, max_examples=config.evaluate.max_examples,
        placement=config.prompt.placement,
    )  # fmt: skip
    if split is None:
        raise UserError(f"{run_dir}/config.yaml: data.validation is missing: give data.validation=FILE")
    return build_evaluator(config, split, tokenizer, family)


def generate_for_run(
    config: Config, run_dir: Path, *, text: str | None, file: str | None, output: Path | None, max_new_tokens: int,
    sampling: dict[str, Any] | None, seed: int,
) -> None:  # fmt: skip
    """Answer one text or the rows of a file: JSON lines in the rows' order, written as they come. Collective."""
    world = init_distributed()
    rows = together(world, lambda: read_input_rows(config, text, file))
    inputs = together(world, lambda: build_run_inputs(config, rows))
    stream = together(world, lambda: open_output(output, world))
    job = build_trained_job(config, run_dir, world)
    chunk = CHUNK_ROWS * world.size
    with fault_on_failed_write(output) if output else contextlib.nullcontext(), stream as out:
        for first in range(0, len(inputs), chunk):
            answers = dict(
                generate_texts(
                    job.engine, job.tokenizer, inputs[first : first + chunk], max_new_tokens=max_new_tokens,
                    micro_batch_tokens=config.train.micro_batch_tokens, sampling=sampling, seed=seed + first,
                )
            )  # fmt: skip
            for i in sorted(answers) if out else ():
                row = rows.dataset[first + i] | {"generated": answers[i]}
                print(json.dumps(row, ensure_ascii=False, default=str), file=out, flush=True)


def build_run_inputs(config: Config, rows: Rows) -> list[TokenPair]:
    return build_inputs(config.data, rows, build_tokenizer(config), build_family(config), config.prompt.placement)


def open_output(path: Path | None, world: World) -> contextlib.AbstractContextManager[TextIO | None]:
    """Where rank 0 writes: a file or standard output; None on the other ranks. Raises UserError."""
    if not world.is_main:
        return contextlib.nullcontext()
    try:
        return open(path, "w", encoding="utf-8") if path else contextlib.nullcontext(sys.stdout)
    except OSError as error:
        raise UserError(f"--output: {path}: {error.strerror}") from None


def read_input_rows(config: Config, text: str | None, file: str | None) -> Rows:
    """The rows of a file, or the one row that a text makes for a template of one column. Raises UserError."""
    if file:
        return load_rows(file, key="--input-file", default_split="test")
    template, _ = build_templates(config.data, config.prompt.placement)
    if len(template.columns) != 1:
        columns = ", ".join(template.columns) or "none"
        raise UserError(f"--input: data.template takes {columns}: give rows with --input-file")
    return Rows("--input", datasets.Dataset.from_list([{template.columns[0]: text}]), "rows")


def export_run(config: Config, run_dir: Path, *, to: str, out: Path, text: str | None, file: str | None) -> None:
    """Write a PEFT adapter, or prompt embeddings of the given inputs, to folder `out`. Raises UserError."""
    tensors, facts = load_prompt(run_dir / "prompt")
    if to == "peft":
        check_for_peft(facts)
        export_peft(tensors, facts, out)
        return
    model = config.model
    fingerprint = fingerprint_base(model.path, random_init=model.random_init, seed=config.seed)
    check_base(config, facts, fingerprint, run_dir)
    dtype = getattr(torch, model.dtype)
    is_given = text is not None or file is not None
    rows = read_input_rows(config, text, file) if is_given else None
    inputs = build_run_inputs(config, rows) if is_given else []
    export_prompt_embeds(tensors, build_opened_base(config).embed, inputs, dtype, out)
