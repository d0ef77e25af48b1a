"""What a prompt answers to each held-out row, and how certain its metrics are."""

from pathlib import Path
from typing import Any

import numpy as np

from ptune_dist.common.files import fault_on_failed_write, replace_file
from ptune_dist.data.json_values import dump_json
from ptune_dist.evaluation.evaluator import Evaluator, MemberAnswers
from ptune_dist.metrics.intervals import bootstrap, of_rows
from ptune_dist.metrics.metric import Interval

PREDICTIONS = "predictions.jsonl"


def find_intervals(evaluator: Evaluator, answers: MemberAnswers) -> dict[str, Interval]:
    """The 95% interval of each metric over all rows."""
    found = {}
    for metric in evaluator.metrics:
        references = evaluator.references.get(metric.needs, ())
        found[metric.name] = bootstrap(metric, answers.given[metric.needs], references)
    return found


def list_predictions(evaluator: Evaluator, answers: MemberAnswers) -> list[dict[str, Any]]:
    """For each row: what was right, what was answered, and the scores of the metrics that one row has a score in.

    gold: the acceptable texts, or the right number; gold_label: the right one of the labels that are scored. loss: per
    token of the target.
    """
    found: list[dict[str, Any]] = [{} for _ in evaluator.split.examples.num_targets]
    for need in ("answers", "values"):
        for row, accepted in zip(found, evaluator.references.get(need, ()), strict=False):
            row["gold"] = accepted[0] if len(accepted) == 1 else list(accepted)
    for row, text in zip(found, answers.texts, strict=False):  # some rows only, where no metric needs them
        row["generated"] = text
    if answers.label_losses is not None:
        shares = to_probabilities(answers.label_losses)
        for number, row in enumerate(found):
            row["gold_label"] = evaluator.references["label_losses"][number][0]
            row["label"] = answers.given["label_losses"][number]
            row["probabilities"] = dict(zip(evaluator.labels, shares[number].tolist(), strict=True))
    for row, number in zip(found, answers.given.get("values", ()), strict=False):
        row["predicted"] = number
    for row, (loss, num_tokens) in zip(found, answers.given["losses"], strict=True):
        row["loss"] = loss / num_tokens
        row["num_tokens"] = num_tokens
    for metric in evaluator.metrics:
        values = of_rows(metric, answers.given[metric.needs], evaluator.references.get(metric.needs, ()))
        for row, value in zip(found, values or (), strict=False):
            row[metric.name] = value
    return found


def write_predictions(folder: Path, evaluator: Evaluator, answers: MemberAnswers) -> None:
    """Write a run's predictions.jsonl: each validation row's input as text, and its prediction. Raises RunFault.

    A block of plain text has its beginning for an input, and what follows as `continuation`.
    """
    lines = []
    for number, found in enumerate(list_predictions(evaluator, answers)):
        if evaluator.split.rows.kind == "text":
            shown = dict(zip(("input", "continuation"), evaluator.show_halves(number), strict=True))
        else:
            shown = {"input": evaluator.show_input(number)}
        row = {"row": number} | shown | found
        lines.append(dump_json(row, ensure_ascii=False, default=str) + "\n")
    with fault_on_failed_write(folder / PREDICTIONS):
        replace_file(folder / PREDICTIONS, "".join(lines).encode())


def to_probabilities(losses: np.ndarray) -> np.ndarray:
    """Among the labels alone, of their losses: both [rows, labels]."""
    shares = np.exp(losses.min(axis=1, keepdims=True) - losses)
    return shares / shares.sum(axis=1, keepdims=True)
