"""How good results are, how certain that is, and how certain their differences are."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptune_dist.errors import UserError
from ptune_dist.metrics import METRICS
from ptune_dist.metrics.intervals import bootstrap, paired_p_value
from ptune_dist.metrics.metric import Interval
from ptune_dist.reports.results import Result, common_metrics


@dataclass(frozen=True)
class Score:
    """A metric of one result. p_value: of the difference from the first result; None where rows are not comparable."""

    value: float
    interval: Interval | None = None
    p_value: float | None = None


Scores = dict[str, list[Score]]  # of each metric, one for each result


def score(results: Sequence[Result]) -> Scores:
    """Each metric that all results have. Raises UserError where there is none."""
    if not results:
        return {}
    names = common_metrics(results)
    if not names and any(result.validation for result in results):
        raise UserError("these runs have no metric in common: evaluate them with the same evaluate.metrics")
    found: Scores = {}
    for name in names:
        found[name] = [score_one(name, result, results[0]) for result in results]
    return found


def list_values(results: Sequence[Result]) -> Scores:
    """Each metric that all results have, without what takes a bootstrap: a finished run does not wait for it."""
    names = common_metrics(results) if results else []
    return {name: [Score(result.validation[name]) for result in results] for name in names}


def score_one(name: str, result: Result, first: Result) -> Score:
    """A metric of one result beside the first one."""
    value = result.validation[name]
    metric = METRICS.get(name)  # none has the name of one for a task's rows
    answers = result.answers(metric) if metric else None
    if metric is None or not answers:
        return Score(value)
    interval = bootstrap(metric, answers, result.references(metric))
    others = first.answers(metric)
    if result is first or others is None or not has_same_rows(result, first):
        return Score(value, interval)
    return Score(value, interval, paired_p_value(metric, others, answers, result.references(metric)))


def has_same_rows(result: Result, other: Result) -> bool:
    """Whether two results answer the same validation rows: as many, with the same right answers."""
    keys = ("gold", "gold_label")
    mine, theirs = ([[row.get(key) for key in keys] for row in each.predictions] for each in (result, other))
    return mine == theirs
