"""The line about a loss that has not fallen: when it appears, for whom, and what it proposes."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from ptune_dist.config.schema import Config
from ptune_dist.objectives import OBJECTIVES
from ptune_dist.prompts import METHODS
from ptune_dist.run.progress import Progress, Standing
from ptune_dist.run.slow_start import describe_slow_start, find_slow_starts
from ptune_dist.run.throughput import StepCount

DEFAULT = METHODS["prompt_tuning"].default_training.learning_rate


def build(prompt: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config.model_validate(
        {
            "output_dir": "x",
            "model": {"path": "y"},
            "prompt": {"init": "vocab"} | (prompt or {}),
            "data": {"train": "z", "template": "{{ a }}", "target": "{{ b }}"},
            "train": {"max_steps": 200, "learning_rate": DEFAULT, "warmup_steps": 0} | train,
        }
    )


def follow(config: Config, losses: list[float], family: str = "causal") -> dict[int, str]:
    """The lines, by the step after which they come."""
    progress = Progress({"prompt": Standing()})
    said = {}
    for loss in losses:
        progress.count_step({"prompt": loss}, StepCount(1.0, 1, 1, 0, 0, 0))
        line = describe_slow_start(config, progress.members["prompt"], progress.step, family)
        if line:
            said[progress.step] = line
    return said


def noisy(count: int, slope: float, spread: float, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [3.0 - slope * step + generator.uniform(-spread, spread) for step in range(count)]


def test_a_flat_loss_is_named_once_after_a_tenth_of_the_steps_in_one_line():
    said = follow(build(), noisy(200, slope=0, spread=0.02))
    assert list(said) == [20]
    assert "\n" not in said[20] and said[20].startswith("the loss has not fallen by 2% after 20 steps (3")
    assert "raise train.learning_rate" in said[20] and "prompt.init_text" in said[20]


def test_a_loss_that_falls_is_not_told_however_much_one_batch_differs_from_the_next():
    for seed in range(20):
        assert not follow(build(), noisy(200, slope=0.03, spread=0.3, seed=seed))
    falling = noisy(200, slope=0.05, spread=0.0)
    falling[0], falling[19] = 2.9, 3.1  # these two alone would say the opposite
    assert not follow(build(), falling)


def test_a_fall_by_less_than_2_percent_is_told_and_a_larger_one_is_not():
    before, after = [4.0] * 10, 4.0 * 0.985
    assert follow(build(), before + [after] * 190)
    assert not follow(build(), before + [4.0 * 0.975] * 190)


@pytest.mark.parametrize("max_steps", [1, 10, 90])
def test_a_short_run_has_too_few_steps_to_tell(max_steps):
    assert not follow(build(max_steps=max_steps), [3.0] * max_steps)


def test_steps_of_the_warm_up_do_not_count():
    assert list(follow(build(warmup_steps=15), [3.0] * 200)) == [35]


def test_a_prompt_from_a_file_and_a_loss_near_zero_have_nothing_to_lose():
    assert not follow(build({"init": "file", "init_file": "run"}), [3.0] * 200)
    assert not follow(build(), [0.001] * 200)


def test_a_checkpoint_of_an_earlier_version_has_no_first_losses():
    progress = Progress({"prompt": Standing(recent_losses=[3.0] * 12)}, step=12)
    for _ in range(20):
        progress.count_step({"prompt": 3.0}, StepCount(1.0, 1, 1, 0, 0, 0))
        assert not describe_slow_start(build(), progress.members["prompt"], progress.step, "causal")
    assert progress.members["prompt"].first_losses == []


@pytest.mark.parametrize(
    ("config", "losses", "says"),
    [
        (
            build(learning_rate=DEFAULT * 10),
            [3.0] * 20,
            f"set train.learning_rate to the method's default, {DEFAULT:g}",
        ),
        (
            build(learning_rate=DEFAULT / 10),
            [3.0] * 20,
            f"set train.learning_rate to the method's default, {DEFAULT:g}",
        ),
        (build(), [3.0] * 10 + [4.0] * 10, "lower train.learning_rate"),
        (build(), [3.0] * 20, "raise train.learning_rate"),
        (build({"init": "text", "init_text": "Do it."}), [3.0] * 20, "look at the supervised part"),
        (build({"method": "p_tuning", "init": "random"}), [3.0] * 20, "look at the supervised part"),
    ],
)
def test_the_two_likeliest_remedies_follow_from_the_config(config, losses, says):
    (line,) = follow(config, losses).values()
    assert says in line and " or " in line


def test_of_a_sweep_each_live_member_is_told_by_its_name_and_a_loss_that_measures_nothing_is_not():
    members = {"a": build(), "b": build(), "c": build()}
    flat = {"first_losses": [3.0] * 20, "recent_losses": [3.0] * 20}
    standings = {"a": Standing(**flat), "b": Standing(first_losses=[3.0] * 20, recent_losses=[1.0] * 20)}
    standings["c"] = Standing(**flat, ended="worse")
    reading = SimpleNamespace(objective=OBJECTIVES["cross_entropy"], family=SimpleNamespace(name="causal"))
    job: Any = SimpleNamespace(members=members, config=SimpleNamespace(sweep={"seed": [0, 1]}), reading=reading)
    (line,) = find_slow_starts(job, Progress(standings, step=20))
    assert line.startswith("a: the loss has not fallen")
    reading.objective = SimpleNamespace(has_falling_loss=False)
    assert not find_slow_starts(job, Progress(standings, step=20))
