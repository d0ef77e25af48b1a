"""Compare the default learning rates with the best of a sweep, on a real base: scores, intervals, a table.

    python -m ptune_dist.bench.learning_rates --base DIR --data DIR --out docs/benchmarks/learning_rates.json \
        --document docs/methods.md [--cell NAME ...] [--minutes 60]

A cell is a task, a method and a start. It trains one sweep over learning rates, the default among them, and nothing
else is set that has a default, so the member with the default rate is a run of the default config. The difference of
each member from the best one has a 95% interval, from a bootstrap over the validation rows, both on the same rows.

A cell that --out has is not run again. A run that was stopped is resumed, so the same command continues; --minutes ends
before a cell that would not fit. To be feasible on a CPU, only short rows are used.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptune_dist.bench.cells import measure_cells
from ptune_dist.bench.quality import measurement_parser, render_rows
from ptune_dist.cluster.outcome import STOPPED, Outcome
from ptune_dist.commands import build_run_evaluator
from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.distributed.world import init_distributed
from ptune_dist.errors import UserError
from ptune_dist.evaluation.evaluator import Evaluator
from ptune_dist.evaluation.generate import pad_id
from ptune_dist.evaluation.scoring import Scorer
from ptune_dist.loop import train
from ptune_dist.metrics import METRICS
from ptune_dist.prompts import METHODS
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.job import Job, build_job
from ptune_dist.run.reading import build_reading
from ptune_dist.run.resolve import resolve

FAMILY = "causal"
RATES = {
    "prefix_tuning": (0.0005, 0.002, 0.005, 0.01, 0.03, 0.1),
    "prompt_tuning": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
}
WORK = Path("runs/bench/learning_rates")
MARK = "learning rates"
WORST_POINTS = -2.0  # an interval must not lie wholly below
NUM_RESAMPLES = 500


@dataclass(frozen=True)
class Task:
    """What is trained and scored. most_characters: of an input, so that a step is affordable on a CPU."""

    metric: str
    instruction: str
    data: dict[str, Any]
    column: str
    most_characters: int
    max_steps: int
    batch_size: int
    num_validation: int
    max_new_tokens: int = 1


TASKS = {
    "sentiment": Task(
        metric="accuracy",
        instruction="Decide whether the movie review is positive or negative.",
        data={
            "template": "Review: {{ text }}\nSentiment:",
            "target": " {{ label }}",
            "labels": ["positive", "negative"],
        },
        column="text",
        most_characters=60,
        max_steps=32,
        batch_size=8,
        num_validation=80,
    ),
    "data_to_text": Task(
        metric="bleu",
        instruction="Describe the restaurant in one sentence, from these facts.",
        data={
            "template": "{{ mr }}\nDescription:",
            "target": " {{ references[0] }}",
            "references": "references",
        },
        column="mr",
        most_characters=110,
        max_steps=24,
        batch_size=4,
        num_validation=20,
        max_new_tokens=40,
    ),
}


@dataclass(frozen=True)
class Cell:
    """A task, a method and whether the prompt starts from the task's instruction or from the method's default."""

    task: str
    method: str
    with_text: bool
    max_steps: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}/{'text' if self.with_text else 'default start'}"

    @property
    def rates(self) -> list[float]:
        """The sweep's rates, with the default among them."""
        return sorted({*RATES[self.method], default_rate(self.method)})

    def config(self, base: str) -> dict[str, Any]:
        """Everything but paths: what has a default is left out, but for what makes a short run on a CPU."""
        own = TASKS[self.task]
        prompt = {"method": self.method}
        if self.with_text:
            prompt["init_text"] = own.instruction
        return {
            "model": {"path": base, "dtype": "bfloat16", "check": False},
            "prompt": prompt,
            "data": {**own.data, "cache_dir": "off"},
            "train": {"max_steps": self.max_steps, "batch_size": own.batch_size},
            "checkpoint": {"every": 5, "keep": 1},
            "sweep": {"train.learning_rate": self.rates},
        }

    @property
    def digest(self) -> str:
        """Of the config and the choice of rows, without the place of the base: other results do not count."""
        own = TASKS[self.task]
        text = json.dumps([self.config(""), own.most_characters, own.num_validation, own.max_new_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def list_cells(max_steps: int | None = None) -> list[Cell]:
    """All cells, with the tasks' own numbers of steps or with `max_steps`."""
    return [
        Cell(task, method, with_text, max_steps or TASKS[task].max_steps)
        for with_text in (True, False)
        for task in TASKS
        for method in RATES
    ]


def default_rate(method: str) -> float:
    return METHODS[method].default_training_of.get(FAMILY, METHODS[method].default_training).learning_rate


def write_rows(task: str, data: Path, folder: Path) -> tuple[Path, Path]:
    """The short rows of a task; returns the files of training and validation rows. Raises UserError."""
    own = TASKS[task]
    files = []
    for which in ("train", "validation"):
        source = data / f"{task}_{which}.jsonl"
        if not source.is_file():
            raise UserError(f"--data: {source} is missing")
        lines = source.read_text(encoding="utf-8").splitlines()
        short = [line for line in lines if len(json.loads(line)[own.column]) <= own.most_characters]
        file = folder / f"{which}.jsonl"
        chosen = short if which == "train" else short[: own.num_validation]
        file.write_text("".join(line + "\n" for line in chosen), encoding="utf-8")
        files.append(file)
    return files[0], files[1]


def run_cell(cell: Cell, base: str, data: Path, work: Path) -> dict[str, Any] | None:
    """Train or resume a cell's sweep and score its members; None where it was asked to stop."""
    folder = work / cell.digest
    folder.mkdir(parents=True, exist_ok=True)
    rows, held_out = write_rows(cell.task, data, folder)
    content = cell.config(base)
    content["output_dir"] = str(folder / "run")
    content["data"]["train"] = str(rows)
    file = folder / "config.json"
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    config = load_config(file, resolve=resolve)
    status = train(config)
    if status == Outcome(STOPPED).exit_status:
        return None
    if status:
        raise UserError(f"{cell.name}: the training ended with status {status}")
    found = score_members(config, held_out, cell)
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return {"steps": summary["steps"], "wall_s": summary["wall_s"], **found}


def score_members(config: Config, held_out: Path, cell: Cell) -> dict[str, Any]:
    """Each member's score and loss on the held-out rows, and the interval of its difference from the best one."""
    own = TASKS[cell.task]
    overrides = {"validation": str(held_out)}
    evaluate = {"metrics": [own.metric], "num_samples": own.num_validation, "max_new_tokens": own.max_new_tokens}
    scored = config.model_copy(
        update={
            "data": config.data.model_copy(update=overrides),
            "evaluate": config.evaluate.model_copy(update=evaluate),
        }
    )
    reading = build_reading(scored)
    world = init_distributed()
    evaluator = build_run_evaluator(reading, Path(config.output_dir))
    job = build_job(reading, world, with_start=False)
    folders = {name: Path(member.output_dir) for name, member in expand_sweep(config, resolve).items()}
    job.engine.load_prompts({name: load_prompt(folder / "prompt")[0] for name, folder in folders.items()})
    rows = score_rows(job, evaluator)
    scores = {name: of_rows.score(range(of_rows.number)) for name, of_rows in rows.items()}
    best = max(scores, key=lambda name: scores[name])
    members = {}
    for rate, name in zip(cell.rates, folders, strict=True):
        low, high = bootstrap(rows[name], rows[best])
        members[str(rate)] = {
            "score": scores[name],
            "loss": rows[name].loss,
            "difference": scores[name] - scores[best],
            "interval": [low, high],
        }
    return {"num_rows": rows[best].number, "best": str(cell.rates[list(folders).index(best)]), "members": members}


@dataclass(frozen=True)
class RowScores:
    """A member's answers to the held-out rows. score: of some rows by their numbers, in points."""

    number: int
    loss: float
    score: Callable[[Sequence[int]], float]


def score_rows(job: Job, evaluator: Evaluator) -> dict[str, RowScores]:
    """Each member's answers to all rows."""
    engine = job.engine
    names = engine.members
    number = len(evaluator.split.examples)
    if evaluator.candidates is None:
        found = evaluator(engine, names)
        references = evaluator.references["answers"]
        return {
            name: RowScores(number, of.metrics["loss"], text_score([s["answer"] for s in of.samples], references))
            for name, of in found.items()
        }
    places = list(range(len(names)))
    scorer = Scorer(engine, places, evaluator.decoding.micro_batch_tokens, pad_id(evaluator.tokenizer))
    of_labels = scorer.label_losses(evaluator.candidates, number)
    of_right = of_labels[:, np.arange(number), evaluator.right]
    num_tokens = evaluator.split.examples.num_targets.sum()
    is_right = of_labels.argmin(axis=2) == np.array(evaluator.right)
    return {
        name: RowScores(number, float(of_right[place].sum() / num_tokens), share_score(is_right[place]))
        for place, name in enumerate(names)
    }


def share_score(is_right: np.ndarray) -> Callable[[Sequence[int]], float]:
    return lambda rows: float(100 * is_right[list(rows)].mean())


def text_score(answers: list[str], references: Sequence[Sequence[str]]) -> Callable[[Sequence[int]], float]:
    bleu = METRICS["bleu"].compute
    return lambda rows: bleu([answers[i] for i in rows], [references[i] for i in rows])


def bootstrap(member: RowScores, best: RowScores) -> tuple[float, float]:
    """The 95% interval of the difference in points, over the same draws of rows for both."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(NUM_RESAMPLES):
        rows = generator.integers(0, member.number, member.number).tolist()
        found.append(member.score(rows) - best.score(rows))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def render_table(content: dict[str, Any]) -> str:
    """A Markdown table with a row for each cell that has been run."""
    header = [
        "task, method, start",
        "steps",
        "default rate",
        "its score",
        "best of the sweep",
        "its score",
        "difference",
    ]
    lines = [header]
    for cell in list_cells():
        found = content["cells"].get(cell.name)
        if not found:
            continue
        default = str(default_rate(cell.method))
        own = found["members"][default]
        best = found["members"][found["best"]]
        low, high = own["interval"]
        start = "`init_text`" if cell.with_text else "the default"
        lines.append(
            [
                f"{cell.task.replace('_', '-')}, `{cell.method}`, {start}",
                str(found["steps"]),
                default,
                f"{own['score']:.1f} (loss {own['loss']:.3f})",
                found["best"],
                f"{best['score']:.1f} (loss {best['loss']:.3f})",
                f"{own['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
            ]
        )
    return render_rows(lines)


def list_failed(content: dict[str, Any]) -> list[str]:
    """The cells whose default is worse than it may be: the whole interval lies below WORST_POINTS."""
    failed = []
    for cell in list_cells():
        found = content["cells"].get(cell.name)
        if found and found["members"][str(default_rate(cell.method))]["interval"][1] < WORST_POINTS:
            failed.append(cell.name)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = measurement_parser(__doc__, WORK)
    parser.add_argument("--cell", action="append", help="only this cell; may be repeated")
    parser.add_argument("--steps", type=int, help="of every training, in place of the tasks' own")
    args = parser.parse_args(arguments)
    cells = list_cells(args.steps)
    try:
        status, content = measure_cells(
            args,
            "learning_rates",
            cells,
            lambda cell: run_cell(cell, args.base, args.data, args.work),
            MARK,
            render_table,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in list_failed(content):
        print(f"worse than the best of the sweep by more than {-WORST_POINTS:g} points: {name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
