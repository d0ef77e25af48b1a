"""What `evaluate` and `generate` do with a run's trained prompt, and where `export` gets its inputs."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.config.schema import Config, DataConfig, PromptConfig
from ptune_dist.data.build import build_choices, build_inputs, build_split, build_templates
from ptune_dist.data.candidates import Candidates
from ptune_dist.data.encode import TokenPair
from ptune_dist.data.json_values import dump_json
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.data.split_rows import csv_dialect
from ptune_dist.data.tasks import read_tasks, task_column
from ptune_dist.distributed.world import World, from_main, init_distributed, together
from ptune_dist.errors import UserError
from ptune_dist.evaluation.answer_plan import DEFAULT_NEW_TOKENS, Decoding
from ptune_dist.evaluation.baselines import evaluate_baselines, render_baselines
from ptune_dist.evaluation.evaluator import Evaluator, MemberAnswers, build_evaluator
from ptune_dist.evaluation.generate import generate_of_tasks, pad_id
from ptune_dist.evaluation.predictions import find_intervals, list_predictions, to_probabilities
from ptune_dist.evaluation.row_scores import add_scores, build_row_scores, keep_apart
from ptune_dist.evaluation.scoring import Scorer
from ptune_dist.evaluation.splits import check_inputs, check_lengths
from ptune_dist.export.runs import ExportRequest, export_prompts
from ptune_dist.metrics import METRICS
from ptune_dist.prompts.build import find_method
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.folder import write_json
from ptune_dist.run.job import Job
from ptune_dist.run.ownership import check_target
from ptune_dist.run.reading import Reading, build_reading
from ptune_dist.run.stored_prompt import build_trained_job

BASELINES = "baselines.json"
CHUNK_ROWS = 256  # rows of one rank that are answered before they are written

Answers = tuple[int, list[dict[str, Any]]]  # the number of a row, and what is added to it and to those that follow
Answer = Callable[[Job, Decoding], Iterator[Answers]]


def evaluate_run(config: Config, run_dir: Path, output: Path | None = None, *, is_shown: bool = True) -> dict[str, Any]:
    """Evaluate the prompt on `data.validation`; print the metrics, write evaluation.json and return it. Collective.

    `output`: a file for the validation rows with what was answered to each.
    """
    world = init_distributed()
    together(world, lambda: check_output(output, None, config))
    reading = together(world, lambda: build_reading(config))
    evaluator = together(world, lambda: build_run_evaluator(reading, run_dir))
    stream = together(world, lambda: open_output(output, world) if output else contextlib.nullcontext())
    engine = build_trained_job(reading, run_dir, world).engine
    (answers,) = evaluator.read(engine, engine.members).values()

    def report() -> dict[str, Any]:
        content = {"data": config.data.validation, "num_examples": len(evaluator.split.examples)}
        if skipped := evaluator.split.skipped.whole:
            content["num_skipped"] = len(skipped)
        content |= evaluator.compute(answers)
        content["intervals_95"] = find_intervals(evaluator, answers)
        if evaluator.signatures:
            content["signatures"] = evaluator.signatures
        if is_shown:
            print(json.dumps(content, indent=2), flush=True)  # first: a full disk must not cost the result
        with fault_on_failed_write(output) if output else contextlib.nullcontext(), stream as out:
            if out:
                print_predictions(evaluator, answers, out)
        content |= {"samples": evaluator.samples(answers)}
        write_json(run_dir / "evaluation.json", content)
        return content

    return from_main(world, report)


def compare_baselines(config: Config, run_dir: Path, num_shots: int, output: Path | None) -> None:
    """Print the table of the prompt beside its baselines and write baselines.json, and `output`. Collective."""
    world = init_distributed()
    together(world, lambda: check_output(output, None, config, is_own=holds_baselines))
    reading = together(world, lambda: build_reading(config))
    content = evaluate_baselines(reading, run_dir, num_shots, world)

    def report() -> None:
        for line in render_baselines(content):
            print(line, flush=True)
        for file in (run_dir / BASELINES, output):
            if file:
                write_json(file, content)

    together(world, lambda: report() if world.is_main else None)


def choose_labels(config: Config) -> Config:
    """The config of an evaluation whose answers are the likeliest of `data.labels`. Raises UserError."""
    if not config.data.labels:
        raise UserError("--labels: the run's config has no data.labels to choose among: name them, as yes,no")
    names = config.evaluate.metrics
    if any(METRICS[name].needs == "label_losses" for name in names):
        return config
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metrics": [*names, "accuracy"]})})


def print_predictions(evaluator: Evaluator, answers: MemberAnswers, out: TextIO) -> None:
    """Each validation row, with its own columns, and what was answered to it, as JSON lines."""
    predictions = list_predictions(evaluator, answers)
    names = {name for found in predictions for name in found}  # not all rows have all
    for number, found in enumerate(predictions):
        row = keep_apart(evaluator.split.rows.read(number, number + 1)[0], names)
        print(dump_json(row | found, ensure_ascii=False, default=str), file=out, flush=True)


def build_run_evaluator(reading: Reading, run_dir: Path) -> Evaluator:
    """Raises UserError."""
    config = reading.config
    encoding = reading.encoding(config)
    split = build_split(
        config.data, encoding, which="validation", max_examples=config.evaluate.max_examples, folder=run_dir
    )
    if split is None:
        raise UserError(f"{run_dir}/config.yaml: data.validation is missing: give data.validation=FILE")
    check_inputs(split.examples, config.prompt)
    return build_evaluator(config, split, reading)


@dataclass(frozen=True)
class GenerateRequest:
    """What `generate` is asked for: one text or a file of rows, and where the answers go.

    most_tokens: of an answer; None follows the config, then the longest target that was trained on. sampling: as in
    Decoding. chooses_label: the answer is the likeliest of data.labels. task: that of all rows; else their column's.
    """

    text: str | None
    file: str | None
    output: Path | None
    most_tokens: int | None = None
    sampling: dict[str, Any] | None = None
    seed: int = 0
    chooses_label: bool = False
    task: str | None = None


def generate_for_run(config: Config, run_dir: Path, request: GenerateRequest) -> None:
    """Answer one text or the rows of a file: JSON lines in the rows' order, written as they come. Collective."""
    world = init_distributed()
    together(world, lambda: check_output(request.output, request.file, config))
    reading = together(world, lambda: build_reading(config))
    rows = together(world, lambda: read_input_rows(config.data, config.prompt, request.text, request.file))
    prepare = prepare_labels if request.chooses_label else prepare_texts
    tasks = together(world, lambda: find_tasks(config, rows, request.task))
    answer = together(world, lambda: prepare(reading, rows, tasks))
    chooses = request.chooses_label
    scores = together(world, lambda: build_row_scores(config.data, config.evaluate, rows, chooses_label=chooses))
    stream = together(world, lambda: open_output(request.output, world))
    job = build_trained_job(reading, run_dir, world)
    decoding = from_main(world, lambda: build_decoding(job, run_dir, request))
    with fault_on_failed_write(request.output) if request.output else contextlib.nullcontext(), stream as out:
        for first, answers in answer(job, decoding):
            if out:
                for number, found in enumerate(answers, first):
                    row = add_scores(scores, rows, number, found)
                    print(dump_json(row, ensure_ascii=False, default=str), file=out, flush=True)


def find_tasks(config: Config, rows: Rows, task: str | None) -> np.ndarray | None:
    """The number of each row's task [N], where the run's prompt has several: `task`, or what its column names.

    Raises UserError.
    """
    tasks = list(config.data.tasks or [])
    if not tasks or not find_method(config.prompt).has_tasks:
        if task is not None:
            raise UserError("--task: the run's prompt is not of several tasks: leave it out")
        return None
    if task is not None:
        if task not in tasks:
            raise UserError(f"--task: {task} is none of {', '.join(tasks)}")
        return np.full(len(rows), tasks.index(task), np.int32)
    if task_column(config.data) not in rows.columns():
        raise UserError(f"--task: the run's prompt is of several tasks: name one of {', '.join(tasks)}")
    return read_tasks(config.data, rows)


def prepare_texts(reading: Reading, rows: Rows, tasks: np.ndarray | None) -> Answer:
    """Raises UserError."""
    return functools.partial(answer_with_texts, build_run_inputs(reading, rows), tasks)


def prepare_labels(reading: Reading, rows: Rows, tasks: np.ndarray | None) -> Answer:
    """Raises UserError."""
    return functools.partial(answer_with_labels, build_run_choices(reading, rows, tasks))


def answer_with_texts(
    inputs: list[TokenPair], tasks: np.ndarray | None, job: Job, decoding: Decoding
) -> Iterator[Answers]:
    """Yield generated answers, for some rows at a time. Collective."""
    chunk = CHUNK_ROWS * job.engine.world.size
    for first in range(0, len(inputs), chunk):
        some = inputs[first : first + chunk]
        own = None if tasks is None else tasks[first : first + chunk]
        answers = dict(generate_of_tasks(job.engine, job.tokenizer, some, decoding, own, first=first))
        yield first, [{"generated": answers[i]} for i in sorted(answers)]


def answer_with_labels(candidates: Candidates, job: Job, decoding: Decoding) -> Iterator[Answers]:
    """As `answer_with_texts`: the likeliest label, and the probability of each among the labels. Collective."""
    labels = job.config.data.labels or []
    scorer = Scorer(job.engine, [0], decoding.micro_batch_tokens, pad_id(job.tokenizer))
    (losses,) = scorer.label_losses(candidates, int(candidates.rows.max()) + 1)
    yield (
        0,
        [
            {"generated": labels[int(row.argmax())], "probabilities": dict(zip(labels, row.tolist(), strict=True))}
            for row in to_probabilities(losses)
        ],
    )


def build_decoding(job: Job, run_dir: Path, request: GenerateRequest) -> Decoding:
    """How many tokens an answer may have, in this order: asked for, configured, the longest that was trained on."""
    _, facts = load_prompt(run_dir / "prompt")
    asked = request.most_tokens or job.config.evaluate.max_new_tokens or facts.get("longest_target")
    return Decoding(asked or DEFAULT_NEW_TOKENS, job.config.train.most_positions, request.sampling, request.seed)


def check_output(
    path: Path | None, input_file: str | None, config: Config, is_own: Callable[[Path], bool] | None = None
) -> None:
    """Raise UserError where the answers would replace anything but earlier answers, which `is_own` knows."""
    if path is None or (path.exists() and not path.is_file()):  # a pipe, or a folder, which cannot be opened
        return
    check_target("--output", path, config, {"--input-file": input_file})
    if path.exists() and not (is_own or holds_answers)(path):
        raise UserError(f"--output: {path} exists and holds no answers of ours: choose another one")


def holds_answers(path: Path) -> bool:
    """Whether a file is empty or begins with an answer of `generate` or a prediction of `evaluate`."""
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline()
        row = dict(json.loads(line)) if line else {"generated": ""}
        return "generated" in row or row.keys() >= {"gold", "num_tokens"}
    except PermissionError:  # opening it for writing tells why
        return True
    except (OSError, ValueError, TypeError):
        return False


def holds_baselines(path: Path) -> bool:
    """Whether a file is empty or holds the result of an earlier `evaluate --baselines`."""
    try:
        text = path.read_text(encoding="utf-8")
        return not text or "baselines" in dict(json.loads(text))
    except PermissionError:  # opening it for writing tells why
        return True
    except (OSError, ValueError, TypeError):
        return False


def build_run_choices(reading: Reading, rows: Rows, tasks: np.ndarray | None) -> Candidates:
    """Each row's input with all labels. Raises UserError."""
    config = reading.config
    candidates = build_choices(config.data, rows, reading.encoding(config), config.train.most_positions // 2, tasks)
    check_inputs(candidates.examples, config.prompt)
    return candidates


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


def read_input_rows(data: DataConfig, prompt: PromptConfig, text: str | None, file: str | None) -> Rows:
    """The rows of a file, or the one row that a text makes for a template of one column. Raises UserError.

    Where the training data is plain text, rows are texts to continue. A column that rows may lack is left out.
    """
    if file:
        return load_rows(file, key="--input-file", default_split="test", csv=csv_dialect(data))
    if data.messages is not None:
        import datasets

        messages = [{"role": "user", "content": text}]
        return Rows("--input", datasets.Dataset.from_list([{data.messages: messages}]), "rows")
    columns = ["text"]  # of plain text
    if data.template is not None:
        template, _ = build_templates(data, prompt.placement, prompt.around)
        needed = [column for column in template.columns if column not in template.guarded | template.empty]
        columns = needed if len(needed) == 1 else list(template.columns)
    if len(columns) != 1:
        raise UserError(f"--input: data.template takes {', '.join(columns) or 'none'}: give rows with --input-file")
    import datasets  # takes half a second, and files of text need none of it

    return Rows("--input", datasets.Dataset.from_list([{columns[0]: text}]), "rows")


def export_runs(runs: list[tuple[Config, Path]], request: ExportRequest) -> list[str]:
    """Write what the prompts of runs become; returns lines for people. Raises UserError."""
    config, _ = runs[0]
    read_rows = functools.partial(read_input_rows, config.data, config.prompt, request.text, request.file)
    return export_prompts(runs, request, read_rows)
