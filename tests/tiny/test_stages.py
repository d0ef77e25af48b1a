"""The training of a tiny base that is stopped ends with the bits of one that is not."""

import random
from pathlib import Path

import pytest
import torch

from ptune_dist.tiny.stages import SAVE_EVERY, Stage, train_stages


class Stop(Exception):
    """What ends a training early."""


def losses_of(model: torch.nn.Linear, stop_after: int | None = None):
    drawn = 0

    def losses(rng: random.Random) -> list[torch.Tensor]:
        nonlocal drawn
        if drawn == stop_after:
            raise Stop
        drawn += 1
        inputs = torch.tensor([[rng.random() for _ in range(3)]])
        return [(model(inputs) - 1).square().mean()]

    return losses


def train(folder: Path, *, stop_after: int | None = None, rate: float = 0.01) -> torch.Tensor:
    """The weights after two stages; `stop_after` counts the steps of the second stage alone."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    stages = [
        Stage(losses_of(model), rate, SAVE_EVERY),
        Stage(losses_of(model, stop_after), rate / 10, 2 * SAVE_EVERY),
    ]
    train_stages(model, stages, seed=0, part=folder / "base.part")
    return model.weight


def test_a_training_that_was_stopped_continues_from_its_last_save(tmp_path, capsys):
    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "stopped", stop_after=SAVE_EVERY + 20)
    capsys.readouterr()
    continued = train(tmp_path / "stopped")
    assert capsys.readouterr().out.startswith(f"continues after step {SAVE_EVERY} of stage 2\n")
    assert torch.equal(continued, whole)
    assert not list(tmp_path.rglob("*.part"))


def test_a_training_with_other_settings_starts_again(tmp_path):
    whole = train(tmp_path / "whole", rate=0.02)
    with pytest.raises(Stop):
        train(tmp_path / "stopped", stop_after=20)
    assert torch.equal(train(tmp_path / "stopped", rate=0.02), whole)
