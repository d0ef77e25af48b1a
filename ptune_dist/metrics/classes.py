"""Classification beyond accuracy, by scikit-learn: the answers are the likeliest of `data.labels`."""

import warnings
from collections.abc import Sequence
from typing import Any, cast

from ptune_dist.metrics.metric import Metric, References


def macro_f1(labels: Sequence[str], references: References) -> float:
    """The mean of the F1 of every class that is answered or right somewhere; 0 for a class that is never both."""
    from sklearn.metrics import f1_score

    zero = cast(Any, 0.0)  # scikit-learn's default "warn" is taken for the type, a number is documented
    return f1_score(right_labels(references), list(labels), average="macro", zero_division=zero)


def matthews(labels: Sequence[str], references: References) -> float:
    """Matthews' correlation, from -1 to 1; 0 where all answers, or all right labels, are the same."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rows that have one class only
        return matthews_corrcoef(right_labels(references), list(labels))


def right_labels(references: References) -> list[str]:
    return [right for (right,) in references]


MACRO_F1 = Metric("macro_f1", "label_losses", macro_f1, package="scikit-learn", module="sklearn")
MATTHEWS = Metric("matthews", "label_losses", matthews, package="scikit-learn", module="sklearn")
