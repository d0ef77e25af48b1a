"""Metrics of numbers have the values that scikit-learn's and scipy's documentation shows."""

import math
import warnings

import pytest

from ptune_dist.metrics import METRICS

RIGHT = [[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0]]


def test_mse_is_scikit_learn_s():
    # The example of sklearn.metrics.mean_squared_error.
    assert METRICS["mse"].compute([2.5, 0.0, 2, 8], [[3], [-0.5], [2], [7]]) == 0.375
    assert not METRICS["mse"].higher_is_better


def test_pearson_and_spearman_are_scipy_s():
    # The examples of scipy.stats.pearsonr (SciPy 1.17) and scipy.stats.spearmanr.
    assert METRICS["pearson"].compute([10, 9, 2.5, 6, 4, 3, 2], RIGHT) == pytest.approx(-0.8285038835884279)
    assert METRICS["spearman"].compute([5, 6, 7, 8, 7], RIGHT[:5]) == pytest.approx(0.8207826816681233)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0]])
def test_a_correlation_that_is_not_defined_is_0_without_a_warning(name, values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert METRICS[name].compute(values, RIGHT[: len(values)]) == 0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_with_equal_numbers_is_0(name):
    assert METRICS[name].compute([1.0, 2.0, 3.0], [[4.0], [4.0], [4.0]]) == 0


def test_the_mse_of_what_is_too_large_to_square_is_infinite():
    assert METRICS["mse"].compute([1e200], [[0.0]]) == math.inf
