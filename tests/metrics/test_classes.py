"""Metrics of classes have the values that scikit-learn's documentation shows."""

import warnings

import pytest

from ptune_dist.metrics import METRICS


def references_of(labels: str) -> list[list[str]]:
    return [[label] for label in labels]


def test_macro_f1_is_scikit_learn_s():
    # The example of sklearn.metrics.f1_score: 0.27 with average="macro".
    assert METRICS["macro_f1"].compute("021001", references_of("012012")) == pytest.approx(0.26666666)


def test_macro_f1_counts_a_class_that_is_never_answered_as_0():
    assert METRICS["macro_f1"].compute("aaaa", references_of("aaab")) == pytest.approx((6 / 7 + 0) / 2)


def test_matthews_is_scikit_learn_s():
    # The example of sklearn.metrics.matthews_corrcoef: -0.33.
    assert METRICS["matthews"].compute("+-++", references_of("+++-")) == pytest.approx(-1 / 3)


@pytest.mark.parametrize(("answers", "right"), [("aaaa", "abab"), ("abab", "aaaa"), ("aaaa", "aaaa")])
def test_matthews_is_0_without_a_warning_where_all_are_of_one_class(answers, right):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert METRICS["matthews"].compute(answers, references_of(right)) == 0
