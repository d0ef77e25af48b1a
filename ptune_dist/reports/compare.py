"""Compare runs: the keys in which they differ, their metrics with intervals, and how certain the differences are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ptune_dist.errors import UserError
from ptune_dist.reports.page import write_page
from ptune_dist.reports.plots import write_plots
from ptune_dist.reports.results import Result, differing_keys, is_higher_better, read_results
from ptune_dist.reports.scores import Score, Scores, has_same_rows, score


def compare_runs(folders: Sequence[Path], out: Path | None) -> None:
    """Print the comparison of runs and sweep members; with `out`, write report.html, PNGs and comparison.json there.

    Raises UserError.
    """
    results = read_results(folders)
    scores = score(results)
    console = Console()
    print_tables(results, scores, console)
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(json.dumps(describe(results, scores), indent=2) + "\n", encoding="utf-8")
        write_page(out / "report.html", results, scores)
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from None
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    for file in write_plots(out, results):
        console.print(f"chart: {file}", highlight=False, soft_wrap=True)


def print_tables(results: Sequence[Result], scores: Scores, console: Console) -> None:
    """The differing keys, then the metrics."""
    keys = differing_keys(results)
    if keys:
        table = new_table("key", results, "what differs")
        for key, values in keys.items():
            table.add_row(key, *(show_value(value) for value in values))
        console.print(table)
    title = "validation: value, 95% interval"
    if len(results) > 1:
        title += f", p value of the difference from {results[0].name}"
    table = new_table("metric", results, title)
    for name, own in scores.items():
        best = (max if is_higher_better(name) else min)(score.value for score in own)
        table.add_row(name, *(show_score(each, is_best=each.value == best and len(own) > 1) for each in own))
    counts = [str(len(result.predictions)) for result in results]
    table.add_row("rows", *counts)
    console.print(table)
    others = [result.name for result in results[1:] if not has_same_rows(result, results[0])]
    if others:
        why = f"evaluated on other rows than {results[0].name}, or by an older version"
        console.print(f"no p values for {', '.join(others)}: {why}", highlight=False, soft_wrap=True, markup=False)


def new_table(first: str, results: Sequence[Result], title: str) -> Table:
    """A table with a column for each result. Long names are folded: cut off, two members would look the same."""
    columns = (Column(name, overflow="fold") for name in (first, *(escape(result.name) for result in results)))
    return Table(*columns, title=title, title_justify="left")


def show_value(value: Any) -> str:
    return "" if value is None else escape(str(value))


def show_score(score: Score, *, is_best: bool) -> str:
    shown = f"{score.value:.4f}"
    if score.interval is not None:
        shown += escape(f" [{score.interval[0]:.4f}, {score.interval[1]:.4f}]")
    if score.p_value is not None:
        shown += f" p={score.p_value:.3f}"
    return f"[bold]{shown}[/bold]" if is_best else shown


def describe(results: Sequence[Result], scores: Scores) -> dict[str, Any]:
    """The comparison as JSON."""
    return {
        "results": [{"name": result.name, "folder": str(result.folder)} for result in results],
        "differing_keys": differing_keys(results),
        "metrics": {
            name: [
                {"value": each.value, "interval_95": each.interval, "p_value_of_difference_from_first": each.p_value}
                for each in own
            ]
            for name, own in scores.items()
        },
    }
