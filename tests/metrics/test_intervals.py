"""Intervals of metrics: those of known statistics, and sacrebleu's own."""

import random

import pytest
from scipy.stats import bootstrap as scipy_bootstrap

from ptune_dist.metrics import METRICS
from ptune_dist.metrics.intervals import bootstrap, of_rows, paired_p_value
from ptune_dist.metrics.metric import RowLoss

WORDS = "one two three four five six seven eight nine ten".split()


def texts(num_rows: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(0)
    references = [[" ".join(rng.choices(WORDS, k=8))] for _ in range(num_rows)]
    answers = [" ".join(w if rng.random() < 0.8 else "other" for w in text.split()) for (text,) in references]
    return answers, references


def test_the_interval_of_a_mean_is_that_of_scipy():
    right = [row % 10 < 7 for row in range(200)]
    labels = ["yes" if is_right else "no" for is_right in right]
    low, high = bootstrap(METRICS["accuracy"], labels, [["yes"]] * 200, num_resamples=4000)
    wanted = scipy_bootstrap((right,), lambda x, axis: x.mean(axis), method="percentile", n_resamples=4000, rng=0)
    assert (low, high) == pytest.approx(tuple(wanted.confidence_interval), abs=0.011)  # a step is 0.005
    assert low < 0.7 < high


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.needs == "answers"])
def test_intervals_hold_the_metric_and_shrink_with_rows(name):
    metric = METRICS[name]
    widths = []
    for num_rows in (20, 320):
        answers, references = texts(num_rows)
        low, high = bootstrap(metric, answers, references, num_resamples=200)
        assert low <= metric.compute(answers, references) <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_metric_that_is_a_mean_is_the_mean_of_its_rows():
    answers, references = texts(30)
    for metric in METRICS.values():
        if metric.needs == "answers" and metric.is_mean:
            values = of_rows(metric, answers, references)
            assert sum(values) / len(values) == pytest.approx(metric.compute(answers, references))
    assert not METRICS["bleu"].is_mean and of_rows(METRICS["bleu"], answers, references) is None


def test_the_loss_is_resampled_by_rows_with_their_tokens():
    rows = [RowLoss(2.0, 1), RowLoss(4.0, 4)]
    assert bootstrap(METRICS["loss"], rows, ()) == (1.0, 2.0)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.needs == "answers"])
def test_a_difference_on_many_rows_is_no_chance_and_none_is(name):
    answers, references = texts(120)
    worse = [f"{answer} nothing" if i % 2 else "x" for i, answer in enumerate(answers)]
    assert paired_p_value(METRICS[name], answers, worse, references, num_resamples=200) < 0.02
    assert paired_p_value(METRICS[name], answers, answers, references, num_resamples=200) == 1


def test_a_p_value_is_that_of_the_sign_test_of_as_many_rows():
    labels = ["yes"] * 50 + ["no"] * 50
    other = ["no"] * 4 + ["yes"] * 46 + ["yes"] * 10 + ["no"] * 40  # 10 rows better, 4 worse
    found = paired_p_value(METRICS["accuracy"], labels, other, [["yes"]] * 100, num_resamples=4000)
    assert found == pytest.approx(0.109, abs=0.03)  # normal approximation: 6 / sqrt(14 - 0.36) = 1.62
