"""A process killed at any moment of a save costs that save at most, and the run goes on to the undisturbed result.

One process, without Slurm: only rank 0 saves, and a start costs a second or two.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from ptune_dist.run.checkpoint import load_newest_checkpoint
from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.status import read_status
from tests.cluster.runs import AFTER_THE_RENAME, ENV, MOMENTS, PATIENCE_S, SABOTEUR, write_run
from tests.commands import Commands, Finished, Forker
from tests.processes import ROOT, process_env

NUM_STEPS = 14
TENSORS = ("prompt.safetensors", "optimizer.safetensors")


class SabotagedCommands(Commands):
    """Commands of which one can be killed inside its first save."""

    def __init__(self, folder: Path):
        self.plan = folder / "kill"
        env = {"PYTHONPATH": f"{SABOTEUR}:{ROOT}", "PTUNE_TEST_KILL": str(self.plan)}
        super().__init__(folder, Forker("torch.utils.tensorboard", env=env))  # what every run imports

    def run_until(self, moment: str, *argv: object) -> tuple[Finished, list[str]]:
        """A command that is killed at that moment of its first save, and the changes to the disk until then."""
        log = self.plan.with_name(f"{self.plan.name}.log")
        log.unlink(missing_ok=True)
        self.plan.write_text(moment)
        return self.run(*argv), log.read_text().splitlines()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return SabotagedCommands(tmp_path_factory.mktemp("commands"))


@pytest.mark.long
def test_a_kill_anywhere_in_a_save_costs_that_save_at_most(commands, tmp_path):
    sections = {"train": {"max_steps": NUM_STEPS}, "checkpoint": {"every": 1, "keep": NUM_STEPS}}
    config, undisturbed = write_run(tmp_path / "run", **sections), tmp_path / "run/run"
    assert commands.run("train", config).code == 0
    run, step = tmp_path / "killed", 3
    begin_again(undisturbed, run, num_steps=step)
    again = ["train", config, f"output_dir={run}", "checkpoint.keep=2"]
    for moment in MOMENTS:
        finished, changes = commands.run_until(moment, *again)
        assert finished.code < 0 and changes[-1] == moment.replace("half of", "open"), (moment, finished)
        step += moment in AFTER_THE_RENAME
        complaints: list[str] = []
        assert load_newest_checkpoint(run / "checkpoints", complaints.append).step == step, moment
        assert not complaints and tensors_of(run, step) == tensors_of(undisturbed, step)
    finished, changes = commands.run_until("never", *again)
    assert finished.code == 0 and set(changes) == {moment for moment in MOMENTS if "half" not in moment}
    assert read_losses(run) == read_losses(undisturbed)
    assert tensors_of(run, NUM_STEPS) == tensors_of(undisturbed, NUM_STEPS)
    stored = [folder / "prompt" / "prompt.safetensors" for folder in (run, undisturbed)]
    assert stored[0].read_bytes() == stored[1].read_bytes()
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {f"step-{n:08d}" for n in (NUM_STEPS - 1, NUM_STEPS)}  # and nothing of what was broken off


def read_losses(run: Path) -> list[float]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    return [line["loss"] for line in lines]


def begin_again(run: Path, copy: Path, *, num_steps: int) -> None:
    """A copy of a run as it was after so many steps, of which the last two have their checkpoints."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    for checkpoint in list_checkpoints(copy / "checkpoints"):
        if not num_steps - 2 < step_of(checkpoint) <= num_steps:
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def tensors_of(run: Path, step: int) -> list[bytes]:
    return [(run / "checkpoints" / f"step-{step:08d}" / name).read_bytes() for name in TENSORS]


# A full disk


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=24m none {disk}
exec 3>&2 2>/dev/null
( until [ "$(grep -c loss {disk}/run/metrics.jsonl)" -ge 20 ]; do sleep 0.05; done; cat /dev/zero > {disk}/filler ) &
exec 2>&3
launch/run.sh {config}
launch/run.sh --may-requeue $? {config}; echo "first ends with $?"
cp -r {disk}/run {left}
rm {disk}/filler
launch/run.sh {config}; echo "second ends with $?"
cp -r {disk}/run {final}
"""


@pytest.mark.long
def test_a_disk_that_fills_up_is_one_clear_error_and_with_space_the_same_command_goes_on(commands, tmp_path):
    sections = {"train": {"max_steps": 60}, "checkpoint": {"every": 4, "keep": 2}}
    assert commands.run("train", write_run(tmp_path / "undisturbed", **sections)).code == 0
    undisturbed, disk = tmp_path / "undisturbed/run", tmp_path / "disk"
    disk.mkdir()
    config = write_run(tmp_path / "small", output_dir=str(disk / "run"), **sections)
    left, final = tmp_path / "left", tmp_path / "final"
    script = ON_A_SMALL_DISK.format(disk=disk, config=config, left=left, final=final)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=ROOT,
        env=process_env(ENV),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    told = done.stdout + done.stderr
    status = read_status(left)
    assert "first ends with 1" in told and "second ends with 0" in told, told
    assert (status["state"], status["kind"]) == ("failed", "fault"), told
    assert "No space left on device" in status["reason"] and str(disk / "run") in status["reason"]
    assert [line for line in told.splitlines() if line.startswith("error:")] in ([], [f"error: {status['reason']}"])
    assert f"launcher: fault: {status['reason']}" in told and "Traceback" not in told and "in place" not in told
    complaints: list[str] = []
    saved = load_newest_checkpoint(left / "checkpoints", complaints.append)
    assert saved.step >= 16 and not complaints and f"from step {saved.step}" in told
    assert read_metrics(final)[-1]["step"] == 60 and len(read_metrics(final)) == 60
    assert [line["loss"] for line in read_metrics(final)] == [line["loss"] for line in read_metrics(undisturbed)]
    assert tensors_of(final, 60) == tensors_of(undisturbed, 60)
