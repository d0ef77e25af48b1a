"""A comparison as one page that opens without a network: tables, charts, and the held-out rows with all answers."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ptune_dist import __version__
from ptune_dist.common.files import replace_file
from ptune_dist.reports.charts import list_charts
from ptune_dist.reports.results import Result, differing_keys, is_higher_better
from ptune_dist.reports.scores import Scores
from ptune_dist.reports.svg import render_svg

MOST_ROWS = 1000  # of the table of answers
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(file: Path, results: Sequence[Result], scores: Scores) -> None:
    """Write the page of one result or several."""
    rows = list_rows(results)
    content = load_template().render(
        title=" / ".join(result.name for result in results[:3]) + (" / ..." if len(results) > 3 else ""),
        version=__version__,
        results=results,
        differing=differing_keys(results),
        scores=scores,
        has_intervals=any(score.interval for own in scores.values() for score in own),
        best={name: (max if is_higher_better(name) else min)(s.value for s in own) for name, own in scores.items()},
        before=list_before(results),
        charts=[Markup(render_svg(chart)) for chart in list_charts(results)],
        num_rows=max((len(result.predictions) for result in results), default=0),
        most_rows=MOST_ROWS,
        rows=Markup(as_script(rows)),
    )
    replace_file(file, content.encode())


@functools.cache
def load_template() -> jinja2.Template:
    """Compiled once: that takes longer than rendering the report of a small run."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def list_before(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """What one run's trained prompt stands beside: the metrics of the base alone, and those before training."""
    if len(results) != 1:
        return {}
    summary = results[0].summary
    found = {"base without prompt": summary.get("base_without_prompt"), "before training": summary.get("before")}
    return {name: values for name, values in found.items() if values}


def list_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The held-out rows: input, what is right, and each result's answer and whether it is right.

    An answer is null where a result has another row there.
    """
    if not results:
        return []
    longest = max(results, key=lambda result: len(result.predictions)).predictions
    found = []
    for number, row in enumerate(longest[:MOST_ROWS]):
        others = [result.predictions[number] if number < len(result.predictions) else None for result in results]
        gold = right_of(row)
        same = [other if other and right_of(other) == gold else None for other in others]
        answers = [answer_of(other) if other else None for other in same]
        right = [is_right(other) if other else None for other in same]
        found.append({"input": row["input"], "gold": gold, "answers": answers, "right": right})
    return found


def right_of(row: dict[str, Any]) -> str:
    """What is right, as one text."""
    gold = row.get("gold_label", row.get("gold", row.get("continuation", "")))
    return " | ".join(map(str, gold)) if isinstance(gold, list) else str(gold)


def is_right(row: dict[str, Any]) -> bool | None:
    """Whether the label or the text is what is right; None of numbers, and without an answer or anything right."""
    answer = row.get("label", row.get("generated"))
    gold = row.get("gold_label", row.get("gold"))
    if answer is None or gold is None:
        return None
    return str(answer).strip() in map(str, gold if isinstance(gold, list) else [gold])


def answer_of(row: dict[str, Any]) -> str:
    """What was answered: the label, the text or the number; without one the loss."""
    for key in ("label", "generated", "predicted"):
        if key in row:
            return str(row[key])
    return f"loss {row['loss']:.4f}"


def as_script(rows: list[dict[str, Any]]) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
