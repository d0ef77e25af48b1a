"""Train the recipes' offline twins and compare each with baselines; the table of the recipes' page.

    python -m ptune_dist.bench.twins --out docs/benchmarks/twins.json --document docs/recipes.md

A cell is a twin. --out keeps the cells that have been run, with a digest of the recipe, its rows and its base.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptune_dist.bench.cells import measure_cells
from ptune_dist.bench.quality import render_rows, resumable_parser
from ptune_dist.cluster.outcome import STOPPED, Outcome
from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.config.shipped import RECIPES, recipe_names
from ptune_dist.data.template import compile_template
from ptune_dist.errors import UserError
from ptune_dist.loop import train
from ptune_dist.metrics import METRICS
from ptune_dist.run.resolve import resolve

MARK = "twins"
WORK = Path("runs/bench/twins")
FOLDER = "tiny/"
BASELINES = ("no learning", "base alone", "untrained prompt")
# How far a trained prompt has to be beyond a baseline.
MARGIN = 0.05  # of metrics between 0 and 1
MARGINS = {"chrf": 10.0, "bleu": 10.0}  # of 100
SHARES = {"mse": 0.1, "loss": 0.05, "perplexity": 0.05}  # of the baseline's number

Numbers = dict[str, float]  # of BASELINES, where there is such a number, and of "trained"


@dataclass(frozen=True)
class Cell:
    """A twin. name: of its recipe."""

    name: str

    @property
    def recipe(self) -> str:
        return f"{FOLDER}{self.name}"

    @property
    def digest(self) -> str:
        """Of the recipe, its rows and its base."""
        config = load_config(self.recipe, resolve=resolve)
        sources = [*config.data.train_sources, *config.data.validation_sources]
        files = [RECIPES / f"{self.recipe}.yaml", *sources, *sorted(Path(config.model.path).iterdir())]
        return hashlib.sha256(b"\n".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def list_cells() -> list[Cell]:
    return [Cell(name.removeprefix(FOLDER)) for name in recipe_names() if name.startswith(FOLDER)]


def compare(config: Config, summary: dict[str, Any]) -> dict[str, Numbers]:
    """The numbers of each metric that a twin is judged by, from the summary of its run.

    That is the recipe's first metric, and with labels also the loss of the whole answer: a base that would answer
    something else may rank the labels well.
    """
    first = config.evaluate.metrics[0]
    needs = METRICS[first].needs
    stages = {
        "base alone": summary["base_without_prompt"],
        "untrained prompt": summary["before"],
        "trained": summary["validation"],
    }
    found = {}
    for metric in (first, "loss") if needs == "label_losses" else (first,):
        found[metric] = {stage: numbers[metric] for stage, numbers in stages.items() if metric in numbers}
    if needs != "losses":
        found[first]["no learning"] = score_without_learning(config, first)
    return found


def score_without_learning(config: Config, metric: str) -> float:
    """What a copy of the input scores, or one answer to all rows (the commonest target, the mean) if it is better."""
    inputs, targets = render_validation(config)
    needs = METRICS[metric].needs
    references: list[Any] = [[target] for target in targets]
    if needs == "values":
        numbers = [float(target) for target in targets]
        references = [[number] for number in numbers]
        candidates: list[Sequence[Any]] = [[sum(numbers) / len(numbers)] * len(numbers)]
    else:
        candidates = [[Counter(targets).most_common(1)[0][0]] * len(targets)]
        candidates += [inputs] if needs == "answers" else []
    scores = [METRICS[metric].compute(answers, references) for answers in candidates]
    return max(scores) if METRICS[metric].higher_is_better else min(scores)


def render_validation(config: Config) -> tuple[list[str], list[str]]:
    """Inputs and targets of the validation rows that are evaluated."""
    assert config.data.template and config.data.target  # free text is judged without answers
    lines = Path(config.data.validation_sources[0]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: config.evaluate.max_examples or None]]
    inputs = compile_template(config.data.template, key="data.template")
    targets = compile_template(config.data.target, key="data.target")
    return [inputs.render(row).strip() for row in rows], [targets.render(row).strip() for row in rows]


def list_judged(metrics: dict[str, Numbers]) -> list[tuple[str, str]]:
    """Each metric and baseline that a trained prompt has to beat.

    The accuracy of the base and of the untrained prompt is not among them, because the loss is.
    """
    return [
        (metric, baseline)
        for metric, numbers in metrics.items()
        for baseline in BASELINES
        if baseline in numbers and (METRICS[metric].needs != "label_losses" or baseline == "no learning")
    ]


def is_beyond(metric: str, value: float, baseline: float) -> bool:
    margin = abs(baseline) * SHARES[metric] if metric in SHARES else MARGINS.get(metric, MARGIN)
    return value > baseline + margin if METRICS[metric].higher_is_better else value < baseline - margin


def judge(metrics: dict[str, Numbers]) -> dict[tuple[str, str], bool]:
    """Whether the trained prompt is beyond each baseline."""
    return {
        (metric, baseline): is_beyond(metric, metrics[metric]["trained"], metrics[metric][baseline])
        for metric, baseline in list_judged(metrics)
    }


def run_cell(cell: Cell, work: Path) -> dict[str, Any] | None:
    """Numbers of a twin's metrics and its steps; None where the run was asked to stop. Raises UserError."""
    out = work / cell.digest
    config = load_config(cell.recipe, [f"output_dir={out}"], resolve=resolve)
    status = train(config)
    if status == Outcome(STOPPED).exit_status:
        return None
    if status:
        raise UserError(f"{cell.name}: the training ended with status {status}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return {"steps": summary["steps"], "metrics": compare(config, summary)}


def render_table(content: dict[str, Any]) -> str:
    """A Markdown table with a row for each metric of each twin that has been run."""
    rows = [["twin", "metric", *BASELINES, "trained"]]
    for cell in list_cells():
        for metric, numbers in content["cells"].get(cell.name, {"metrics": {}})["metrics"].items():
            shown = [render_number(numbers.get(column)) for column in (*BASELINES, "trained")]
            rows.append([f"`{cell.recipe}`", metric, *shown])
    return render_rows(rows)


def render_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def main(arguments: list[str] | None = None) -> int:
    parser = resumable_parser(__doc__, WORK)
    parser.add_argument("--cell", action="append", help="only this twin; may be repeated")
    args = parser.parse_args(arguments)
    try:
        status, content = measure_cells(
            args, "twins", list_cells(), lambda cell: run_cell(cell, args.work), MARK, render_table
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, found in content["cells"].items():
        for (metric, baseline), beyond in judge(found["metrics"]).items():
            if not beyond:
                print(f"{name}: the trained prompt's {metric} is not beyond that of: {baseline}")
    return status


if __name__ == "__main__":
    sys.exit(main())
