"""`export`: which format a run's prompt is written in, or several runs' prompts in one model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptune_dist.base.layers import name_first_layers
from ptune_dist.base.source import fingerprint_base, load_shape
from ptune_dist.config.schema import Config
from ptune_dist.data.build import build_inputs
from ptune_dist.data.sources import Rows
from ptune_dist.errors import UserError
from ptune_dist.evaluation.generate import pad_id
from ptune_dist.export.kv import export_kv
from ptune_dist.export.model import export_tokens
from ptune_dist.export.token_prompts import TrainedPrompt, name_prompts
from ptune_dist.families import FAMILIES
from ptune_dist.prompts import METHODS
from ptune_dist.prompts.export import (
    CARTRIDGE,
    check_export_folder,
    check_for_peft,
    check_for_vectors,
    export_peft,
    export_prompt_embeds,
    export_vectors,
)
from ptune_dist.prompts.late_prompt import choose_layer
from ptune_dist.prompts.multitask import select_task
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.ownership import check_target
from ptune_dist.run.parts import base_facts, open_base_of
from ptune_dist.run.reading import Reading, build_reading
from ptune_dist.run.stored_prompt import check_base, check_text, describe_text
from ptune_dist.run.whole_model import export_model

ReadRows = Callable[[], Rows]  # the inputs that are exported with a prompt


@dataclass(frozen=True)
class ExportRequest:
    """What `export` is asked for: the format and the folder, and what some formats take.

    text and file: inputs for prompt-embeds. names: of the prompts in a model, the folders' where there are none.
    """

    to: str
    out: Path
    text: str | None = None
    file: str | None = None
    task: str | None = None
    names: tuple[str, ...] = ()
    uses_reserved: bool = False
    by_name: bool = False


def export_prompts(runs: list[tuple[Config, Path]], request: ExportRequest, read_rows: ReadRows) -> list[str]:
    """Write what a run's prompt, or several runs' prompts in one model, becomes; returns lines for people.

    Of one task or all. Raises UserError.
    """
    config, run_dir = runs[0]
    check_request(request, len(runs))
    check_export_folder(request.out, request.to)
    for each, _ in runs:
        check_target("--out", request.out, each, {"--input-file": request.file}, makes_folder=True)
    notes = [line for each, folder in runs for line in describe_texts(each, folder)]
    if request.to == "model":
        return export_to_model(runs, request) + notes
    export_one(config, run_dir, request, read_rows)
    return notes


def describe_texts(config: Config, run_dir: Path) -> list[str]:
    """A line about the texts around a row that no export has. Raises UserError for others than those of training."""
    _, facts = load_prompt(run_dir / "prompt")
    check_text(config.prompt, facts, run_dir)
    texts = describe_text(config.prompt)
    if not any(texts.values()):
        return []
    found = " and ".join(f"{text!r} {where}" for where, text in texts.items() if text)
    return [f"prompt.text: {run_dir} was trained with {found} data.template: write it around an input there too"]


def check_request(request: ExportRequest, num_runs: int) -> None:
    """Raise UserError for what the format does not take."""
    given = {
        "--names": request.names,
        "--reserved": request.uses_reserved,
        "--by-name": request.by_name,
        "several runs": num_runs > 1,
    }
    for flag, value in given.items():
        if value and request.to != "model":
            raise UserError(f"{flag}: only for --to model")
    for flag, value in {"--input": request.text, "--input-file": request.file}.items():
        if value is not None and request.to != "prompt-embeds":
            raise UserError(f"{flag}: only for --to prompt-embeds")


def export_to_model(runs: list[tuple[Config, Path]], request: ExportRequest) -> list[str]:
    """Raises UserError."""
    names = name_prompts([run_dir.resolve().name for _, run_dir in runs], request.names)
    prompts = []
    for name, (config, run_dir) in zip(names, runs, strict=True):
        stored = load_prompt(run_dir / "prompt")
        reading = read_checked(config, stored[1], run_dir)
        tasks = [request.task] if request.task is not None else stored[1].get("tasks") or [None]
        for task in tasks:
            own = name if len(tasks) == 1 else name_prompts([f"{name}_{task}"], ())[0]
            prompts.append(TrainedPrompt(own, *select_task(*stored, task), reading))
    (first, *others) = prompts
    if not others and METHODS[first.facts.get("method", "prompt_tuning")].changes_base:
        if request.uses_reserved or request.by_name:
            raise UserError("--to model: this run trained tensors of the base and no prompt: it takes no such option")
        export_model(first.reading, first.tensors, request.out)
        return []
    return export_tokens(prompts, request.out, uses_reserved=request.uses_reserved, by_name=request.by_name)


def read_checked(config: Config, facts: dict[str, Any], run_dir: Path) -> Reading:
    """How a run's base reads examples. Raises UserError where it is not the one of the run's prompt."""
    model = config.model
    reading = build_reading(config)  # which says in one line that a base is gone
    fingerprint = fingerprint_base(model.path, random_init=model.random_init, seed=config.seed)
    check_base(config, facts, fingerprint, run_dir)
    return reading


def export_one(config: Config, run_dir: Path, request: ExportRequest, read_rows: ReadRows) -> None:
    """Write a PEFT adapter (`peft`, `cartridge`), embeddings, keys and values, or a late prompt's vectors.

    Raises UserError.
    """
    to = request.to
    out = request.out
    tensors, facts = select_task(*load_prompt(run_dir / "prompt"), request.task)
    if to in ("peft", CARTRIDGE):
        export_adapter(config, tensors, facts, request)
        return
    if to == "kv":
        export_kv(tensors, facts, getattr(torch, config.model.dtype), out)
        return
    reading = read_checked(config, facts, run_dir)
    if to == "vectors":
        check_for_vectors(tensors, facts)
        base = open_base_of(reading).model
        layer = choose_layer(facts["options"]["start_layer"], base_facts(base))
        export_vectors(tensors, facts, name_first_layers(base)[layer], out)
        return
    inputs = []
    if request.text is not None or request.file is not None:
        inputs = build_inputs(config.data, read_rows(), reading.encoding(config))
    dtype = getattr(torch, config.model.dtype)
    export_prompt_embeds(tensors, open_base_of(reading).embed, inputs, dtype, out, pad_id(reading.tokenizer), facts)


def export_adapter(
    config: Config, tensors: dict[str, torch.Tensor], facts: dict[str, Any], request: ExportRequest
) -> None:
    """Write a PEFT adapter. Raises UserError."""
    check_for_peft(tensors, facts, request.to)
    family = FAMILIES[facts["base"]["family"]]
    shape = None
    if family.trains_head:  # the base's own config.json does not know the labels
        with_labels = load_shape(config.model.path)
        family.prepare_shape(with_labels, config.data.labels)
        shape = with_labels.to_json_string()
    export_peft(tensors, facts, family.peft_task, request.out, shape, request.to)
