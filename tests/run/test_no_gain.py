"""The line about a prompt that is no better than the base alone: when it appears and what it proposes."""

from typing import Any

import pytest

from ptune_dist.config.schema import EvaluateConfig
from ptune_dist.run.no_gain import describe_no_gain
from ptune_dist.run.progress import Standing
from tests.run.test_slow_start import DEFAULT, build


def told(
    metric: str,
    base: float,
    trained: float,
    num_rows: int = 160,
    num_held_out: int = 40,
    num_steps: int = 30,
    prompt: dict[str, Any] | None = None,
    **train: Any,
) -> str:
    config = build(prompt, **{"batch_size": 16} | train)
    config = config.model_copy(update={"evaluate": EvaluateConfig(metrics=[metric])})
    standing = Standing(without_prompt={"loss": 2.0, metric: base}, best={"loss": 1.0, metric: trained})
    counts = {"num_steps": num_steps, "num_rows": num_rows, "num_held_out": num_held_out}
    return describe_no_gain(config, standing, "causal", **counts)


@pytest.mark.parametrize(
    ("metric", "base", "trained", "is_told"),
    [
        ("accuracy", 0.875, 0.8, True),
        ("accuracy", 0.8, 0.8, True),
        ("accuracy", 0.8, 0.825, False),
        ("loss", 1.0, 1.5, True),
        ("loss", 1.5, 1.0, False),
    ],
)
def test_it_appears_where_the_metric_that_keeps_prompts_is_no_better(metric, base, trained, is_told):
    assert bool(told(metric, base, trained)) == is_told


def test_it_has_both_numbers_the_rows_and_the_likeliest_remedies():
    line = told("accuracy", 0.875, 0.8)
    assert "\n" not in line
    assert line.startswith("the trained prompt is no better than the base alone (accuracy 0.8000, 0.8750 without it,")
    assert "on 40 validation rows; so few rows leave that uncertain): add training rows (there are 160)" in line
    assert "another train.learning_rate or prompt.method" in line and "(prompt.init_text)" in line
    assert line.endswith("`ptune-dist evaluate x --baselines` gives intervals")


def test_remedies_depend_on_the_run():
    assert "for more steps (30 are 0.5 passes over the 960" in told("accuracy", 1, 0, num_rows=960)
    assert "uncertain" not in told("accuracy", 1, 0, num_held_out=1000)
    assert f"the method's default, {DEFAULT:g} (it is 0.0001)" in told("accuracy", 1, 0, learning_rate=1e-4)
    started = {"init": "text", "init_text": "Is it good?"}
    assert "(prompt.text)" in told("accuracy", 1, 0, prompt=started)
    described = started | {"text": {"task": "Is it good?"}}
    assert "prompt.text" not in told("accuracy", 1, 0, prompt=described)


def test_a_base_that_was_not_evaluated_says_nothing():
    config = build()
    for standing in (Standing(best={"loss": 1.0}), Standing(without_prompt={"loss": 1.0})):
        assert not describe_no_gain(config, standing, "encoder", num_steps=8, num_rows=8, num_held_out=8)
