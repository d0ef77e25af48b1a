"""What a prompt answers to each held-out row, and how certain its metrics are."""

from typing import Any

import numpy as np

from ptune_dist.evaluation.evaluator import Evaluator, MemberAnswers
from ptune_dist.metrics.intervals import bootstrap, of_rows
from ptune_dist.metrics.metric import Interval


def find_intervals(evaluator: Evaluator, answers: MemberAnswers) -> dict[str, Interval]:
    """The 95% interval of each metric over all rows."""
    found = {}
    for metric in evaluator.metrics:
        references = evaluator.references.get(metric.needs, ())
        found[metric.name] = bootstrap(metric, answers.given[metric.needs], references)
    return found


def list_predictions(evaluator: Evaluator, answers: MemberAnswers) -> list[dict[str, Any]]:
    """For each row: what was right, what was answered, and the scores of the metrics that one row has a score in.

    gold: the right label, the acceptable texts or the right number. loss: per token of the target.
    """
    found: list[dict[str, Any]] = [{} for _ in evaluator.split.examples.num_targets]
    for need in ("label_losses", "answers", "values"):
        for row, accepted in zip(found, evaluator.references.get(need, ()), strict=False):
            row.setdefault("gold", accepted[0] if len(accepted) == 1 else list(accepted))
    for row, text in zip(found, answers.texts, strict=False):  # some rows only, where no metric needs them
        row["generated"] = text
    if answers.label_losses is not None:
        shares = to_probabilities(answers.label_losses)
        for row, label, probabilities in zip(found, answers.given["label_losses"], shares.tolist(), strict=True):
            row["label"] = label
            row["probabilities"] = dict(zip(evaluator.labels, probabilities, strict=True))
    for row, number in zip(found, answers.given.get("values", ()), strict=False):
        row["predicted"] = number
    for row, (loss, num_tokens) in zip(found, answers.given["losses"], strict=True):
        row["loss"] = loss / num_tokens
    for metric in evaluator.metrics:
        values = of_rows(metric, answers.given[metric.needs], evaluator.references.get(metric.needs, ()))
        for row, value in zip(found, values or (), strict=False):
            row[metric.name] = value
    return found


def to_probabilities(losses: np.ndarray) -> np.ndarray:
    """Among the labels alone, of their losses: both [rows, labels]."""
    shares = np.exp(losses.min(axis=1, keepdims=True) - losses)
    return shares / shares.sum(axis=1, keepdims=True)
