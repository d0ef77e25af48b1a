"""How certain a metric is: 95% intervals by the bootstrap, over rows (Efron, 1979)."""

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


def of_rows(metric: Metric, answers: Sequence[Any], references: References) -> list[float] | None:
    """What each row alone gives; None of a metric that is not the mean of these."""
    if not metric.is_mean:
        return None
    return [float(metric.compute([answers[i]], [references[i]])) for i in range(len(answers))]
