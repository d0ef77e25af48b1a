"""A process that is killed at any moment of a save leaves checkpoints of which the newest is whole, and the run goes on
from it to the undisturbed result. One process, without Slurm: only rank 0 saves, and a start costs a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptune_dist.checkpoint import load_newest_checkpoint
from ptune_dist.run_dir import list_checkpoints
from tests.cluster.runs import SABOTEUR, write_run
from tests.commands import Commands
from tests.conftest import ROOT, process_env

NUM_STEPS, KEEP = 12, 2
SECTIONS = {"train": {"max_steps": NUM_STEPS}, "checkpoint": {"every": 1, "keep": KEEP}}
FILES = ("prompt.safetensors", "optimizer.safetensors", "state.json")


class SabotagedCommands(Commands):
    """Commands whose next save is killed where `plan` says so."""

    def __enter__(self) -> "SabotagedCommands":
        self.plan = self.folder / "kill.json"
        env = process_env({"PYTHONPATH": f"{SABOTEUR}:{ROOT}", "PTUNE_TEST_KILL": str(self.plan)})
        command = [sys.executable, "-m", "tests.commands"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def run_killed(self, config: Path, event: int, *, is_half: bool) -> tuple[bool, list[str]]:
        """Whether the run was killed, and the changes to the disk of that save, the one that did not come last."""
        log = self.plan.with_name("kill.json.log")
        log.unlink(missing_ok=True)
        self.plan.write_text(json.dumps({"event": event, "half": is_half}))
        finished = self.run("train", config)
        assert finished.code == 0 or finished.code < 0, finished.err
        return finished.code < 0, log.read_text().splitlines()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with SabotagedCommands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert commands.run("train", write_run(folder, **SECTIONS)).code == 0
    return folder / "run"


def test_a_kill_at_any_change_that_a_save_makes_costs_that_save_at_most(commands, undisturbed, tmp_path):
    config, run = write_run(tmp_path / "killed", **SECTIONS), tmp_path / "killed/run"
    assert commands.run("train", config, "train.max_steps=3").code == 0  # so that a save has an old one to remove
    (run / "summary.json").unlink()
    config.write_text(config.read_text())
    changes, num_kills = [], 0
    for event in range(1, 40):
        is_killed, changes = kill_once(commands, config, run, event, is_half=False)
        num_kills += is_killed
        if not is_killed:
            break
        for _ in range("safetensors" in changes[-1] or "state.json" in changes[-1] and changes[-1].startswith("open")):
            kill_once(commands, config, run, event, is_half=True)
    assert not is_killed and num_kills >= 12, changes


def kill_once(commands, config: Path, run: Path, event: int, *, is_half: bool) -> tuple[bool, list[str]]:
    folder = run / "checkpoints"
    before = last(folder)
    is_killed, changes = commands.run_killed(config, event, is_half=is_half)
    complaints: list[str] = []
    after = load_newest_checkpoint(folder, complaints.append).step
    assert not complaints
    return is_killed, changes, before, after


def last(folder: Path) -> int:
    found = list_checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


assert os and FILES and KEEP
