"""A run that started from a prompt's file is resumed when that file is gone, without options that the file decided."""

import shutil
from pathlib import Path

import pytest
import yaml

from ptune_dist.run.metrics_log import read_metrics
from tests.conftest import write_config

PREFIX = {"method": "prefix_tuning"}
CASES = {  # the first prompt, the options of the one that starts from it, and what its run stores
    "frozen positions": (
        PREFIX | {"init": "text", "init_text": "a b"},
        {},
        {"num_frozen": 1, "lower_layers": None},
    ),
    "lower layers": (
        PREFIX | {"init": "random", "from_layer": 1},
        {"from_layer": 1},
        {"num_frozen": 0, "lower_layers": "none"},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_resumed_without_the_file_that_it_started_from(tmp_path, commands, case):
    first, options, decided = CASES[case]

    def train(name: str, prompt: dict, max_steps: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = {"max_steps": max_steps, "schedule": "constant"}
        done = commands.run("train", write_config(folder / "config.json", prompt=prompt, train=settings))
        assert done.code == 0, done.err
        return folder / "run"

    source = train("source", first, 2)
    further = PREFIX | options | {"init": "file", "init_file": str(source)}
    whole = train("whole", further, 4)
    stopped = train("stopped", further, 2)
    shutil.rmtree(source)
    assert train("stopped", further, 4) == stopped
    curves = [[line["loss"] for line in read_metrics(run)] for run in (whole, stopped)]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    stored = yaml.safe_load((stopped / "config.yaml").read_text())["prompt"]
    assert {key: stored[key] for key in decided} == decided
