"""Loss, perplexity and accuracy, against numbers worked out by hand."""

import math

import pytest

from ptune_dist.metrics import METRICS
from ptune_dist.metrics.metric import RowLoss

ROWS = [RowLoss(3.0, 2), RowLoss(1.0, 6)]


def test_the_loss_is_per_token_and_not_per_row():
    assert METRICS["loss"].compute(ROWS, ()) == 0.5
    assert METRICS["perplexity"].compute(ROWS, ()) == pytest.approx(math.exp(0.5))


def test_a_perplexity_too_large_for_a_float_is_infinite():
    assert METRICS["perplexity"].compute([RowLoss(1000.0, 1)], ()) == math.inf
    assert METRICS["perplexity"].compute([RowLoss(699.5, 1)], ()) == math.exp(699.5)


def test_accuracy_is_the_share_of_likeliest_labels_that_are_right():
    assert METRICS["accuracy"].compute(["a", "b", "a", "c"], [["a"], ["b"], ["c"], ["c"]]) == 0.75


def test_losses_and_errors_are_better_when_lower_and_all_else_when_higher():
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"loss", "perplexity", "mse"}
