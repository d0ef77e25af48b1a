"""What each placement learns on the shipped base, at equal steps and at equal training time.

    python -m ptune_dist.bench.quality --out docs/benchmarks/placement_quality.json

Tasks are two of the skills that the shipped base has; words are those of the quickstart's data, which the base was
never shown with a skill. Time is training time of this machine, evaluations left out; what a placement saves shows
where rows are long, not here, where an input is nine letters.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from ptune_dist.bench.machine import describe_commit, describe_hardware, describe_versions
from ptune_dist.bench.probe import write_result
from ptune_dist.config import load_config
from ptune_dist.metrics import read_metrics
from ptune_dist.tiny.text import SKILLS
from ptune_dist.train import train

TASKS = ("upper", "reverse")
# placement -> the template's text
PLACEMENTS = {
    "prefix": "{{ word }} =",
    "infix": "{{ word }} =",
    "infix, cached": "{{ word }} =",
    "template": "{{ word }}{{ prompt }} =",
}
CONFIG = Path("configs/quickstart.yaml")
SHORTEST_STEPS = 20


def write_task(folder: Path, task: str) -> tuple[Path, Path]:
    """Training and validation rows of a skill over the quickstart's words."""
    files = []
    for which in ("train", "validation"):
        words = [json.loads(line)["word"] for line in Path(f"configs/tiny/data/{which}.jsonl").read_text().splitlines()]
        files.append(folder / f"{task}-{which}.jsonl")
        files[-1].write_text("".join(json.dumps({"word": w, "answer": SKILLS[task][0](w)}) + "\n" for w in words))
    return files[0], files[1]


def run(folder: Path, task: str, placement: str, num_steps: int, seed: int) -> dict[str, float]:
    """Train once; exact match on held-out words and seconds of training."""
    rows, held_out = write_task(folder, task)
    out = folder / f"{task}-{placement}-{num_steps}-{seed}"
    overrides = [
        f"output_dir={out}", f"seed={seed}", f"data.train={rows}", f"data.validation={held_out}",
        f"train.max_steps={num_steps}", "evaluate.every=0", "evaluate.num_samples=0", "checkpoint.every=0",
        f"prompt.placement={placement.partition(',')[0]}", f"data.template={PLACEMENTS[placement]}",
        "deepspeed=configs/deepspeed/zero0_fp32.json",
    ]  # fmt: skip
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tasks = {task: compare(Path(folder), task, args.steps, range(args.seeds)) for task in TASKS}
    write_result(
        args.out,
        {
            "name": "placement_quality", "code": describe_commit(), "versions": describe_versions(),
            "hardware": describe_hardware(), "steps": args.steps, "tasks": tasks,
        },
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
