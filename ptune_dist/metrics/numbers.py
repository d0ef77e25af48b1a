"""Predicted numbers against the right ones: squared errors, and correlations by scipy.

A correlation that is not defined, because all predictions are equal for instance, is 0: such predictions tell nothing
about the right numbers, and a prompt that gives them must not rank as the best.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ptune_dist.metrics.metric import Metric, References, mean


def mse(values: Sequence[float], references: References) -> float:
    """The mean of the squared errors, in the unit of the data squared."""
    errors = [value - right for value, (right,) in zip(values, references, strict=True)]
    return mean(error * error for error in errors)


def pearson(values: Sequence[float], references: References) -> float:
    """How linear the relation is, from -1 to 1."""
    from scipy.stats import pearsonr

    return correlate(pearsonr, values, references)


def spearman(values: Sequence[float], references: References) -> float:
    """How alike the two orders are, from -1 to 1."""
    from scipy.stats import spearmanr

    return correlate(spearmanr, values, references)


def correlate(function: Callable[..., Any], values: Sequence[float], references: References) -> float:
    """The statistic of scipy's `function`, 0 where it is not defined."""
    right = [number for (number,) in references]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about numbers that are all equal
        found = float(function(list(values), right).statistic)
    return found if math.isfinite(found) else 0.0


MSE = Metric("mse", "values", mse, higher_is_better=False, is_mean=True)
PEARSON = Metric("pearson", "values", pearson, package="scipy", module="scipy")
SPEARMAN = Metric("spearman", "values", spearman, package="scipy", module="scipy")
