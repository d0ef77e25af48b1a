"""How certain a metric is, by the bootstrap over rows (Efron, 1979): 95% intervals, and p values of differences."""

import random
from collections.abc import Sequence
from typing import Any

from ptune_dist.metrics.metric import Interval, Metric, References, mean

NUM_RESAMPLES = 1000
SHARE = 0.95


def bootstrap(
    metric: Metric, answers: Sequence[Any], references: References, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """The interval that holds 95% of the metric's values over sets of rows drawn with replacement."""
    if metric.interval is not None:
        return metric.interval(answers, references, num_resamples)
    rng = random.Random(seed)
    values = of_rows(metric, answers, references)
    found = []
    for _ in range(num_resamples):
        rows = rng.choices(range(len(answers)), k=len(answers))
        if values is not None:
            found.append(mean(values[i] for i in rows))
        else:
            chosen = [references[i] for i in rows] if references else ()
            found.append(float(metric.compute([answers[i] for i in rows], chosen)))
    found.sort()
    outside = round(num_resamples * (1 - SHARE) / 2)
    return found[outside], found[-1 - outside]


def paired_p_value(
    metric: Metric,
    first: Sequence[Any],
    second: Sequence[Any],
    references: References,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> float:
    """How often chance alone gives a difference as large as that of two answers to the same rows.

    The share of resampled differences that are as far from their mean as the difference itself is from zero, as
    sacrebleu computes it (Koehn, 2004).
    """
    if list(first) == list(second):
        return 1.0
    if metric.p_value is not None:
        return metric.p_value(first, second, references, num_resamples)
    rng = random.Random(seed)
    every = range(len(first))
    own = [of_rows(metric, answers, references) for answers in (first, second)]

    def difference(rows: Sequence[int]) -> float:
        if own[0] is not None and own[1] is not None:
            return mean(own[1][i] - own[0][i] for i in rows)
        chosen = [references[i] for i in rows] if references else ()
        found = [float(metric.compute([answers[i] for i in rows], chosen)) for answers in (first, second)]
        return found[1] - found[0]

    actual = abs(difference(every))
    drawn = [difference(rng.choices(every, k=len(first))) for _ in range(num_resamples)]
    middle = mean(drawn)
    count = sum(abs(value - middle) >= actual for value in drawn)
    return (count + 1) / (num_resamples + 1)


def of_rows(metric: Metric, answers: Sequence[Any], references: References) -> list[float] | None:
    """What each row alone gives; None of a metric that is not the mean of these."""
    if not metric.is_mean:
        return None
    return [float(metric.compute([answers[i]], [references[i]])) for i in range(len(answers))]
