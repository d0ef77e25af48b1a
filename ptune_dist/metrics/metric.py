"""What a metric is: one number from the answers and the references of all rows.

A metric says what it needs, and the evaluator computes that once for all metrics that need it. Nothing heavy is
imported here, so that a config can be checked without torch; a metric imports its library where it calls it.

| needs | an answer | its references |
|---|---|---|
| losses | a RowLoss: how likely the row's own target is | none |
| label_losses | the label that is likeliest of data.labels | the right label |
| answers | the generated text | one text or several, any of which will do |
| values | the predicted number | the right number |

Texts are given without whitespace at either end.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ptune_dist.errors import UserError

Need = Literal["losses", "label_losses", "answers", "values"]
Interval = tuple[float, float]
References = Sequence[Sequence[Any]]  # one or several for each row


class RowLoss(NamedTuple):
    """Summed negative log-likelihood of a row's target, and how many tokens it has."""

    loss: float
    num_tokens: int


@dataclass(frozen=True)
class Metric:
    """One number over a set of rows.

    compute: answers and references, one entry for each row, to the number. package: the library on PyPI that computes
    it; module: the name that it is imported by. signature: from the references to a text that says exactly how the
    number is computed, to be quoted with it. is_mean: the number is the mean over rows of what one row alone gives.
    interval, p_value: as `bootstrap` and `paired_p_value` of `metrics.intervals`, where the library resamples faster.
    """

    name: str
    needs: Need
    compute: Callable[[Sequence[Any], References], float]
    higher_is_better: bool = True
    package: str | None = None
    module: str | None = None
    signature: Callable[[References], str] | None = None
    is_mean: bool = False
    interval: Callable[[Sequence[Any], References, int], Interval] | None = None
    p_value: Callable[[Sequence[Any], Sequence[Any], References, int], float] | None = None

    def check_available(self) -> None:
        """Raise UserError where the library is not installed."""
        if self.module and importlib.util.find_spec(self.module) is None:
            raise UserError(f"evaluate.metrics: {self.name} needs {self.package}: pip install 'ptune_dist[metrics]'")


def mean(values: Iterable[float]) -> float:
    """The mean over rows; there is at least one."""
    listed = list(values)
    return sum(listed) / len(listed)
