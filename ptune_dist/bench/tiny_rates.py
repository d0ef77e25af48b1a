"""Try the default learning rates whose source is the tiny bases: each method's loss at five rates around its default.

    python -m ptune_dist.bench.tiny_rates --out docs/benchmarks/tiny_rates.json --document docs/methods.md

A cell is a method in a family of bases. Its runs are those of an offline recipe, shorter and with the method in place
of the recipe's own, one for each rate; --work keeps the runs of a cell that was stopped.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptune_dist.bench.cells import measure_cells
from ptune_dist.bench.quality import render_rows, resumable_parser
from ptune_dist.cluster.outcome import STOPPED, Outcome
from ptune_dist.config.load import load_config
from ptune_dist.config.shipped import RECIPES, find_shipped
from ptune_dist.errors import UserError
from ptune_dist.loop import train
from ptune_dist.prompts import METHODS
from ptune_dist.run.resolve import resolve

SOURCE = "tried on tiny bases"  # as `TrainingDefaults.source` has it
MARK = "tiny rates"
WORK = Path("runs/bench/tiny_rates")
FACTORS = (0.1, 0.3, 1, 3, 10)  # of the default rate
NUM_STEPS = 60
BATCH_SIZE = 16
NUM_VALIDATION = 100
CLEARLY = 1.05  # times the lowest loss: a default above it is named


@dataclass(frozen=True)
class Twin:
    """A family's recipe and base. tokens: stand in each of its rows, for `trainable_tokens`."""

    recipe: str
    base: str
    tokens: tuple[str, ...]


TWINS = {
    "causal": Twin("tiny/question_answering_gpt2", "tiny-gpt2", (":",)),
    "seq2seq": Twin("tiny/translation_t5", "tiny-t5", ("<eos>",)),
    "encoder": Twin("tiny/sentiment_bert", "tiny-bert", ("[CLS]", "[SEP]")),
}


@dataclass(frozen=True)
class Cell:
    """A method in a family whose default rate was tried on tiny bases."""

    method: str
    family: str
    num_steps: int = NUM_STEPS

    @property
    def name(self) -> str:
        return f"{self.method}/{self.family}"

    @property
    def default(self) -> float:
        return defaults_of(self.method, self.family).learning_rate

    @property
    def rates(self) -> list[float]:
        return [float(f"{factor * self.default:.1g}") for factor in FACTORS]

    @property
    def overrides(self) -> list[str]:
        """What differs from the recipe, but for the rate and the folder."""
        found = [f"train.max_steps={self.num_steps}", f"train.batch_size={BATCH_SIZE}", "checkpoint.every=0"]
        found += [f"evaluate={{every: 0, metrics: [loss], max_examples: {NUM_VALIDATION}, num_samples: 0}}"]
        prompt: dict[str, Any] = {"method": self.method}
        if self.method == "trainable_tokens":
            prompt["tokens"] = list(TWINS[self.family].tokens)
        elif not METHODS[self.method].trains_base:
            prompt["num_virtual_tokens"] = 16
        return [*found, f"prompt={json.dumps(prompt)}"]

    @property
    def digest(self) -> str:
        """Of the config, the rates and the base."""
        twin = TWINS[self.family]
        parts = [*self.overrides, str(self.rates), (RECIPES / f"{twin.recipe}.yaml").read_text(encoding="utf-8")]
        weights = Path(find_shipped(twin.base), "model.safetensors").read_bytes()
        return hashlib.sha256("\n".join(parts).encode() + weights).hexdigest()[:12]


def defaults_of(method: str, family: str) -> Any:
    found = METHODS[method]
    return found.default_training_of.get(family, found.default_training)


def list_cells(num_steps: int = NUM_STEPS) -> list[Cell]:
    """Every method and family whose default names the tiny bases as its source."""
    return [
        Cell(name, family, num_steps)
        for name, method in METHODS.items()
        for family in TWINS
        if family in (method.families or TWINS) and defaults_of(name, family).source.startswith(SOURCE)
    ]


def run_cell(cell: Cell, work: Path) -> dict[str, Any] | None:
    """The validation loss at each rate; None where a run was asked to stop. Raises UserError."""
    folder = work / cell.digest
    losses = {}
    before = None
    for rate in cell.rates:
        out = folder / str(rate)
        overrides = [*cell.overrides, f"train.learning_rate={rate}", f"output_dir={out}"]
        status = train(load_config(RECIPES / f"{TWINS[cell.family].recipe}.yaml", overrides, resolve=resolve))
        if status == Outcome(STOPPED).exit_status:
            return None
        if status:
            raise UserError(f"{cell.name}: the training at {rate} ended with status {status}")
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        losses[str(rate)] = summary["validation"]["loss"]
        before = summary["before"]["loss"]  # the same at every rate
    shutil.rmtree(folder)
    return {"steps": cell.num_steps, "default": str(cell.default), "before": before, "losses": losses}


def render_table(content: dict[str, Any]) -> str:
    """A Markdown table with a row for each cell that has been run; the lowest loss is bold."""
    rows = [["method, family", "default rate", "untrained", *(f"{factor:g} x" for factor in FACTORS)]]
    for cell in list_cells():
        found = content["cells"].get(cell.name)
        if found:
            lowest = min(found["losses"].values())
            shown = [f"**{loss:.3f}**" if loss == lowest else f"{loss:.3f}" for loss in found["losses"].values()]
            rows.append([f"`{cell.method}`, {cell.family}", found["default"], f"{found['before']:.3f}", *shown])
    return render_rows(rows)


def list_worse(content: dict[str, Any]) -> list[str]:
    """The cells whose default leaves a clearly higher loss than another rate."""
    worse = []
    for name, found in content["cells"].items():
        best = min(found["losses"], key=lambda rate: found["losses"][rate])
        own, lowest = (found["losses"][rate] for rate in (found["default"], best))
        if own > CLEARLY * lowest:
            worse.append(f"{name}: {own:.3f} at {found['default']}, {lowest:.3f} at {best}")
    return worse


def main(arguments: list[str] | None = None) -> int:
    parser = resumable_parser(__doc__, WORK)
    parser.add_argument("--cell", action="append", help="only this cell; may be repeated")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of every training")
    args = parser.parse_args(arguments)
    cells = list_cells(args.steps)
    try:
        status, content = measure_cells(
            args, "tiny_rates", cells, lambda cell: run_cell(cell, args.work), MARK, render_table
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in list_worse(content):
        print(f"another rate is clearly better: {line}")
    return status


if __name__ == "__main__":
    sys.exit(main())
