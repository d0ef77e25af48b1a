"""Measure what each placement learns on the shipped base, at equal steps and at equal training time.

    python -m ptune_dist.bench.quality --out docs/benchmarks/placement_quality.json --document docs/concepts.md

`--document` puts the table between the document's quality marks; with `--again`, that of an earlier --out.

The tasks are two of the skills of the shipped base; the words are those of the quickstart's data, which the base has
never seen with a skill. Time is training time on this machine, without evaluations. What a placement saves is visible
with long rows, not here, where an input is at most nine letters.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptune_dist.bench.machine import describe_machine
from ptune_dist.bench.probe import write_result
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.loop import train
from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.tiny.text import SKILLS

Result = dict[str, Any]
TASKS = ("upper", "reverse")
# placement -> template
PLACEMENTS = {
    "prefix": "{{ word }} =",
    "infix": "{{ word }} =",
    "infix, cached": "{{ word }} =",
    "template": "{{ word }}{{ prompt }} =",
}
CONFIG = Path("configs/quickstart.yaml")
SHORTEST_STEPS = 20


def write_task(folder: Path, task: str) -> tuple[Path, Path]:
    """Write the training and the validation rows of a skill on the quickstart's words; returns their files."""
    answer, _ = SKILLS[task]
    files = []
    for which in ("train", "validation"):
        lines = Path(f"configs/tiny/data/{which}.jsonl").read_text().splitlines()
        words = [json.loads(line)["word"] for line in lines]
        file = folder / f"{task}-{which}.jsonl"
        file.write_text("".join(json.dumps({"word": word, "answer": answer(word)}) + "\n" for word in words))
        files.append(file)
    return files[0], files[1]


def run(folder: Path, task: str, placement: str, num_steps: int, seed: int) -> dict[str, float]:
    """Train once; returns exact match on held-out words, and seconds of training."""
    rows, held_out = write_task(folder, task)
    out = folder / f"{task}-{placement}-{num_steps}-{seed}"
    overrides = [
        f"output_dir={out}",
        f"seed={seed}",
        f"data.train={rows}",
        f"data.validation={held_out}",
        f"data.template={PLACEMENTS[placement]}",
        f"prompt.placement={placement.partition(',')[0]}",
        f"train.max_steps={num_steps}",
        "evaluate.every=0",
        "evaluate.num_samples=0",
        "checkpoint.every=0",
        "deepspeed=configs/deepspeed/zero0_fp32.json",
    ]
    if "cached" in placement:
        overrides.append("train.context_cache_gib=1")
    assert train(load_config(CONFIG, overrides)) == 0
    summary = json.loads((out / "summary.json").read_text())
    seconds = read_metrics(out)[-1]["time_s"]
    return {"exact_match": summary["validation"]["exact_match"], "train_s": seconds, "steps": num_steps}


def compare(folder: Path, task: str, num_steps: int, seeds: range) -> dict[str, list[dict[str, dict[str, float]]]]:
    """For each placement and seed: a run of `num_steps`, and one for as long as `prefix` took."""
    found: dict[str, list] = {placement: [] for placement in PLACEMENTS}
    for seed in seeds:
        equal_steps = {placement: run(folder, task, placement, num_steps, seed) for placement in PLACEMENTS}
        for placement, at_steps in equal_steps.items():
            steps = max(SHORTEST_STEPS, round(num_steps * equal_steps["prefix"]["train_s"] / at_steps["train_s"]))
            at_time = at_steps if placement == "prefix" else run(folder, task, placement, steps, seed)
            found[placement].append({"equal_steps": at_steps, "equal_time": at_time})
    return found


def render_table(content: dict) -> str:
    """A Markdown table of mean exact match, steps and seconds over seeds, at equal steps and at equal time."""
    header = ["", *(f"`{task}`, {which}" for task in TASKS for which in ("equal steps", "equal time"))]
    rows = [header]
    for placement in PLACEMENTS:
        cells = []
        for task in TASKS:
            runs = content["tasks"][task][placement]
            for which in ("equal_steps", "equal_time"):
                names = ("exact_match", "train_s", "steps")
                mean = {name: statistics.mean(run[which][name] for run in runs) for name in names}
                cells.append(f"{mean['exact_match']:.2f} ({mean['steps']:.0f} steps, {mean['train_s']:.0f} s)")
        rows.append([f"`{placement}`", *cells])
    return render_rows(rows)


def render_rows(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header, the first column is text."""
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def resumable_parser(text: str | None, work: Path) -> argparse.ArgumentParser:
    """What the resumable measurements have in common. `work`: the folder of unfinished runs."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results, a JSON file")
    parser.add_argument("--document", type=Path, help="the page with the tables")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--again", action="store_true", help="run nothing: fill the document")
    parser.add_argument("--work", type=Path, default=work, help="the folder of unfinished runs")
    return parser


def measurement_parser(text: str | None, work: Path) -> argparse.ArgumentParser:
    """As `resumable_parser`, on a real base."""
    parser = resumable_parser(text, work)
    parser.add_argument("--base", required=True, help="the base: a folder or a name on the hub")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks' rows")
    return parser


def fill_block(path: Path, mark: str, block: str) -> None:
    """Replace what stands in a document between the comments `MARK` and `end MARK`. Raises UserError."""
    text = path.read_text(encoding="utf-8")
    begin = f"<!-- {mark} -->"
    end = f"<!-- end {mark} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{path}: no block between {begin} and {end}")
    path.write_text(f"{before}{begin}\n{block}\n{end}{after}", encoding="utf-8")


def document_parser(text: str | None) -> argparse.ArgumentParser:
    """Of a measurement that is run as a whole, with the table of a document."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--document", type=Path)
    parser.add_argument("--again", action="store_true", help="only fill the document, from an existing --out")
    return parser


def measure_and_fill(
    args: argparse.Namespace, mark: str, measure: Callable[[Path], Result], render: Callable[[Result], str]
) -> int:
    """Write what is measured and where, and its table into the document. Returns the exit status.

    args: of `document_parser`. measure: is given an empty folder to work in.
    """
    try:
        if not args.again:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(Path(folder))
            write_result(str(args.out), found | describe_machine())
        if args.document:
            fill_block(args.document, mark, render(json.loads(args.out.read_text(encoding="utf-8"))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    parser = document_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()

    def measure(folder: Path) -> Result:
        tasks = {task: compare(folder, task, args.steps, range(args.seeds)) for task in TASKS}
        return {"name": "placement_quality", "steps": args.steps, "tasks": tasks}

    return measure_and_fill(args, "quality", measure, render_table)


if __name__ == "__main__":
    sys.exit(main())
