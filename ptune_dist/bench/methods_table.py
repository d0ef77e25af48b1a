"""The tables of `methods_quality`, and the text between a document's marks."""

import math
import statistics
from pathlib import Path
from typing import Any

from ptune_dist.bench.methods_plan import AT_EQUAL_TIME, Plan
from ptune_dist.bench.quality import fill_block, render_rows
from ptune_dist.bench.report import show_mib
from ptune_dist.errors import UserError

OUT_OF_100 = ("bleu", "chrf")  # other scores are between 0 and 1
BARE = {"bare": "the base with the template alone", "hard prompt": "the base with the instruction as text"}
MISSING = "-"
Curve = list[dict[str, float]]


def curves_of(content: dict[str, Any], task: str, method: str) -> dict[int, Curve]:
    """A method's evaluations on a task, by seed."""
    found = {}
    for name, cell in content["cells"].items():
        *which, seed = name.split("/")
        if "/".join(which) == f"{task}/{method}":
            found[int(seed)] = cell["curve"]
    return found


def clock(content: dict[str, Any]) -> str:
    """What a step is timed by: on a CPU all threads' seconds, which other work on the machine changes little."""
    return "step_s" if content.get("hardware", {}).get("gpus") else "cpu_s"


def show_clock(content: dict[str, Any]) -> str:
    return {"step_s": "s/step", "cpu_s": "CPU s/step"}[clock(content)]


def step_s(content: dict[str, Any], task: str, method: str) -> float | None:
    return content["times"].get(f"{task}/{method}", {}).get(clock(content))


def steps_in_time(content: dict[str, Any], plan: Plan, task: str, method: str, methods: list[str]) -> int:
    """The steps that a method makes in the seconds that the fastest of some methods takes for all of its steps.

    Raises UserError where one of them was not timed.
    """
    seconds = {name: step_s(content, task, name) for name in {method, *methods}}
    missing = [name for name, value in seconds.items() if value is None]
    if missing:
        raise UserError(f"equal time is not known yet: a step of {task} has not been timed with {missing[0]}")
    known = {name: value for name, value in seconds.items() if value is not None}
    return math.floor(plan.num_steps(task) * min(known[name] for name in methods) / known[method] * (1 + 1e-9))


def scores_at(curves: dict[int, Curve], metric: str, most_steps: float) -> list[float]:
    """Each seed's score at its last evaluation up to a number of steps."""
    return [[at[metric] for at in curve if at["step"] <= most_steps][-1] for curve in curves.values()]


def show(metric: str, scores: list[float]) -> str:
    """The mean, with the lowest and the highest where there are several."""
    digits = 1 if metric in OUT_OF_100 else 3
    if not scores:
        return MISSING
    mean = f"{statistics.mean(scores):.{digits}f}"
    return mean if len(scores) == 1 else f"{mean} ({min(scores):.{digits}f}-{max(scores):.{digits}f})"


def main_table(content: dict[str, Any], plan: Plan, tasks: list[str], methods: list[str]) -> str:
    """Scores of methods at equal steps and at equal time, with the base alone above them."""
    header = [""]
    for task in tasks:
        header += [f"{task}: {plan.tasks[task].metric}, equal steps", "equal time", show_clock(content), "seeds"]
    rows = [header]
    for name, what in BARE.items():
        row = [what]
        for task in tasks:
            scores = scores_at(curves_of(content, task, name), plan.tasks[task].metric, 0)
            row += [show(plan.tasks[task].metric, scores), "", "", ""]
        rows.append(row)
    untrained = ["the instruction as an untrained `prompt_tuning`"]
    for task in tasks:
        scores = scores_at(curves_of(content, task, "prompt_tuning"), plan.tasks[task].metric, 0)
        untrained += [show(plan.tasks[task].metric, scores[:1]), "", "", ""]
    rows.append(untrained)
    for method in methods:
        row = [f"`{method}`"]
        for task in tasks:
            row += score_columns(content, plan, task, method, methods)
        rows.append(row)
    return leave_out_empty(rows)


def score_columns(content: dict[str, Any], plan: Plan, task: str, method: str, methods: list[str]) -> list[str]:
    """Of one method on one task: equal steps, equal time, seconds a step, the number of seeds."""
    metric = plan.tasks[task].metric
    curves = curves_of(content, task, method)
    own = step_s(content, task, method)
    at_time = MISSING
    compared = [name for name in methods if curves_of(content, task, name)]
    if curves and all(step_s(content, task, name) for name in compared):
        num_steps = steps_in_time(content, plan, task, method, compared)
        is_fastest = num_steps == plan.num_steps(task)
        shorter = curves if is_fastest else curves_of(content, task, method + AT_EQUAL_TIME)
        if shorter:
            at_time = f"{show(metric, scores_at(shorter, metric, float('inf')))}, {num_steps} steps"
    seconds = MISSING if own is None else f"{own:.2f}"
    at_steps = show(metric, scores_at(curves, metric, float("inf")))
    return [at_steps + mark_unfinished(content, task, method), at_time, seconds, str(len(curves))]


def mark_unfinished(content: dict[str, Any], task: str, method: str) -> str:
    """The step of the last evaluation of a run that was stopped; empty where all runs are finished."""
    curves = curves_of(content, task, method)
    last = [curves[seed][-1]["step"] for seed in curves if is_unfinished(content["cells"][f"{task}/{method}/{seed}"])]
    return f" (unfinished, step {min(last):g})" if last else ""


def is_unfinished(cell: dict[str, Any]) -> bool:
    return cell.get("config", "") is None


def others_table(content: dict[str, Any], plan: Plan, tasks: list[str]) -> str:
    """What was run of the other tasks."""
    rows = [["", *(f"{task}: {plan.tasks[task].metric}" for task in tasks)]]
    names = [*BARE.items(), *((name, f"`{name}`") for name in plan.methods)]
    for name, what in names:
        row = [what]
        for task in tasks:
            metric = plan.tasks[task].metric
            shown = show(metric, scores_at(curves_of(content, task, name), metric, float("inf")))
            row.append(shown + mark_unfinished(content, task, name))
        rows.append(row)
    return leave_out_empty(rows)


def layers_table(content: dict[str, Any], plan: Plan, task: str, methods: list[str]) -> str:
    """A prefix by the first layer that is trained."""
    metric = plan.tasks[task].metric
    timed = show_clock(content)
    rows = [["", metric, timed, "peak MiB", f"{timed}, cached", "peak MiB, cached"]]
    for method in methods:
        first = {seed: curve for seed, curve in curves_of(content, task, method).items() if seed == 0}
        shown = show(metric, scores_at(first, metric, float("inf")))
        row = [f"`{method}`", shown + mark_unfinished(content, task, method)]
        for suffix in ("", ", cached"):
            seconds = step_s(content, task, f"{method}{suffix}")
            memory = content["times"].get(f"{task}/{method}{suffix}", {}).get("peak_memory_bytes")
            row += [MISSING, MISSING] if seconds is None else [f"{seconds:.2f}", show_mib(memory)]
        rows.append(row)
    return leave_out_empty(rows)


def leave_out_empty(rows: list[list[str]]) -> str:
    """The table of the rows that have some figure; a line where none has."""
    measured = [row for row in rows[1:] if any(cell not in ("", MISSING, "0") for cell in row[1:])]
    return render_rows([rows[0], *measured]) if measured else "Not measured yet."


def render_blocks(content: dict[str, Any], plan: Plan) -> dict[str, str]:
    """Each mark's text."""
    parts = plan.parts
    first = next(iter(parts.values()))
    methods = [*first.methods, *(parts["partial"].methods if "partial" in parts else [])]
    blocks = {"methods quality": main_table(content, plan, first.tasks, methods)}
    if "layers_time" in parts:
        layers = parts["layers_time"]
        blocks["layers quality"] = layers_table(content, plan, layers.tasks[0], layers.methods)
    if "others" in parts:
        blocks["others quality"] = others_table(content, plan, parts["others"].tasks)
    return blocks


def fill_tables(path: Path, content: dict[str, Any], plan: Plan) -> None:
    """Raises UserError where the document lacks a mark."""
    for mark, text in render_blocks(content, plan).items():
        fill_block(path, mark, text)
