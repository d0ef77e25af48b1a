"""The seam of metrics: every entry of METRICS is named as it names itself, and missing libraries are told by name."""

import dataclasses
import importlib.util
from typing import get_args

import pytest

from ptune_dist.errors import UserError
from ptune_dist.metrics import METRICS
from ptune_dist.metrics.metric import Metric, Need


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_has_its_config_s_name_and_a_need_that_exists(name):
    metric = METRICS[name]
    assert metric.name == name and metric.needs in get_args(Need)
    assert (metric.package is None) == (metric.module is None)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_s_library_is_installed_with_the_tests(name):
    METRICS[name].check_available()


def test_a_library_that_is_missing_is_named_with_the_extra_that_installs_it():
    metric = Metric("bleu", "answers", lambda *_: 0.0, package="sacrebleu", module="no_such_module_anywhere")
    assert importlib.util.find_spec(metric.module) is None
    with pytest.raises(UserError) as caught:
        metric.check_available()
    assert str(caught.value) == "evaluate.metrics: bleu needs sacrebleu: pip install 'ptune_dist[metrics]'"
    dataclasses.replace(metric, module="json").check_available()


def test_a_metric_that_all_runs_share_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        METRICS["loss"].higher_is_better = True
