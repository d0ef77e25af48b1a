"""The sections of what is done again and again as a run trains: evaluations, checkpoints, the selections of a sweep."""

from typing import Annotated

from pydantic import AfterValidator, Field

from ptune_dist.config.fields import Interval, NotNegative, Positive, Real, Section, refuse_twice
from ptune_dist.metrics import METRICS


def check_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric, use one of {', '.join(METRICS)}")
    return name


Metric = Annotated[str, AfterValidator(check_metric)]


class Repeated(Section):
    """What is done again and again as a run trains."""

    every: Interval = 0
    """Steps between two times, `epoch` or a share of all steps; 0: never."""

    @property
    def every_steps(self) -> int:
        """`every` in steps, once the rows are counted."""
        assert isinstance(self.every, int), "the run's length is settled"
        return self.every


class EvaluateConfig(Repeated):
    """Evaluations on the validation rows during training."""

    every: Interval = 200
    """Steps between evaluations; `epoch`: an evaluation after each epoch; below 1: a share of all steps; 0: only before
    and after training."""

    metrics: Annotated[list[Metric], AfterValidator(refuse_twice)] = ["loss"]
    """What is computed. The loss is always among the results."""

    best_metric: Metric | None = None
    """The metric by which the best prompt is kept; the first of `metrics` where left out."""

    patience: NotNegative = 0
    """Stop after this many evaluations without a better one; 0: never."""

    max_examples: NotNegative = 0
    """Evaluate on the first so many rows; 0: on all."""

    max_new_tokens: Positive | None = None
    """The most tokens of a generated answer. Where left out: the longest target of the rows, or 32 for answers that are
    only shown and after plain text."""

    num_samples: NotNegative = 5
    """Generated answers shown at each evaluation."""

    @property
    def best(self) -> str:
        return self.best_metric or (self.metrics[0] if self.metrics else "loss")


class CheckpointConfig(Repeated):
    """Checkpoints, from which a run resumes."""

    every: Interval = 100
    """Steps between checkpoints, `epoch` or a share of all steps; 0: only at the end."""

    keep: Positive = 2
    """How many checkpoints are kept."""


class HalvingConfig(Section):
    """Successive halving of a sweep (Jamieson and Talwalkar, 2016): the members that are worse on validation stop."""

    every: Positive
    """Steps between two selections."""

    keep: Annotated[Real, Field(gt=0, lt=1)]
    """The share of the members that continue."""
