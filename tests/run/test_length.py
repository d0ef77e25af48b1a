"""Epochs, shares and `epoch` become steps once, when the rows are counted."""

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError
from ptune_dist.run.length import is_open, settle
from tests.conftest import write_config


def config_of(tmp_path, *overrides: str) -> Config:
    path = write_config(tmp_path / "config.json", train={"batch_size": 8, "max_steps": None})
    return load_config(path, ["train.max_steps=20", *overrides] if "train.epochs" not in str(overrides) else overrides)


@pytest.mark.parametrize(
    "overrides, num_rows, max_steps, evaluate, checkpoint",
    [
        (["train.epochs=3"], 80, 30, 200, 0),
        (["train.epochs=0.5"], 81, 6, 200, 0),
        (["train.epochs=0.001"], 80, 1, 200, 0),
        (["train.epochs=3", "evaluate.every=epoch"], 80, 30, 10, 0),
        (["train.epochs=3", "evaluate.every=epoch"], 84, 32, 11, 0),
        (["evaluate.every=epoch", "checkpoint.every=epoch"], 80, 20, 10, 10),
        (["evaluate.every=0.1", "checkpoint.every=0.51"], 80, 20, 2, 11),
        (["train.epochs=0.1", "evaluate.every=epoch"], 80, 1, 10, 0),
    ],
)
def test_lengths_follow_from_the_rows(tmp_path, overrides, num_rows, max_steps, evaluate, checkpoint):
    config = config_of(tmp_path, *overrides)
    settled, lines = settle(config, num_rows)
    found = settled.train.max_steps, settled.evaluate.every_steps, settled.checkpoint.every_steps
    assert found == (max_steps, evaluate, checkpoint)
    assert is_open(config) and not is_open(settled)
    assert len(lines) == len(overrides)
    assert Config.model_validate(settled.model_dump()) == settled  # as a resumed run reads it


def test_plain_steps_stay_as_they_are(tmp_path):
    config = config_of(tmp_path, "evaluate.every=7")
    assert not is_open(config)
    assert settle(config, 80) == (config, [])


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["train.epochs=2", "train.max_steps=5"], "train.epochs and train.max_steps are both given: leave one out"),
        (["train.epochs=0"], "train.epochs: "),
        (["train.epochs=-1"], "train.epochs: "),
        (["train.epochs=true"], "train.epochs: a number is needed"),
        (["evaluate.every=-1"], "evaluate.every: "),
        (["evaluate.every=1.5"], "evaluate.every: "),
        (["evaluate.every=often"], "evaluate.every: a number of steps, a share such as 0.1, or epoch is needed"),
        (["checkpoint.every=epochs"], "checkpoint.every: a number of steps, a share such as 0.1, or epoch is needed"),
        (["train.log_every=0"], "train.log_every: "),
        (["train.schedule_options={power: 2}"], "train.schedule_options is given, but schedule linear has none"),
        (["train.schedule=reduce_lr_on_plateau"], "train.schedule: "),
    ],
)
def test_what_is_no_length_is_one_line(tmp_path, overrides, says):
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, *overrides)
    assert f": {says}" in str(caught.value) and "\n" not in str(caught.value)


def test_warm_up_must_fit_into_the_epochs(tmp_path):
    with pytest.raises(UserError, match=r"^train.warmup_steps: 10 must be less than the steps: train.epochs 1 of 80 "):
        settle(config_of(tmp_path, "train.epochs=1", "train.warmup_steps=10"), 80)
