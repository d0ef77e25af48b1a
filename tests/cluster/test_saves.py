"""A kill at any moment of a save costs at most that save, and the run is resumed to the undisturbed result.

One process without Slurm: only rank 0 saves, and a forked start takes a second or two.
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
from tests.processes import ROOT, process_env, python_path

NUM_STEPS = 14
TENSORS = ("prompt.safetensors", "optimizer.safetensors")


class SabotagedCommands(Commands):
    """Commands that can be killed during their first save."""

    def __init__(self, folder: Path):
        self.plan = folder / "kill"
        env = {"PYTHONPATH": python_path(SABOTEUR, ROOT), "PTUNE_TEST_KILL": str(self.plan)}
        super().__init__(folder, Forker(env=env))

    def run_until(self, moment: str, *argv: object) -> tuple[Finished, list[str]]:
        """Kill a command at that moment of its first save; also returns the changes to the disk until then."""
        log = self.plan.with_name(f"{self.plan.name}.log")
        log.unlink(missing_ok=True)
        self.plan.write_text(moment)
        return self.run(*argv), log.read_text().splitlines()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> SabotagedCommands:
    return SabotagedCommands(tmp_path_factory.mktemp("commands"))


@pytest.mark.extended
@pytest.mark.long
def test_a_kill_at_any_moment_of_a_save_costs_at_most_that_save(commands: SabotagedCommands, tmp_path: Path):
    sections = {"train": {"max_steps": NUM_STEPS}, "checkpoint": {"every": 1, "keep": NUM_STEPS}}
    config = write_run(tmp_path / "run", **sections)
    undisturbed = tmp_path / "run/run"
    assert commands.run("train", config).code == 0
    run = tmp_path / "killed"
    step = 3
    copy_as_of_step(undisturbed, run, step)
    again = ["train", config, f"output_dir={run}", "checkpoint.keep=2"]
    for moment in MOMENTS:
        finished, changes = commands.run_until(moment, *again)
        assert finished.code < 0 and changes[-1] == moment.replace("half of", "open"), (moment, finished)
        if moment in AFTER_THE_RENAME:
            step += 1
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
    assert names == {f"step-{n:08d}" for n in (NUM_STEPS - 1, NUM_STEPS)}  # no leftovers


def read_losses(run: Path) -> list[float]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    return [line["loss"] for line in lines]


def copy_as_of_step(run: Path, copy: Path, step: int) -> None:
    """Copy a run as it was after this step, with the checkpoints of the last two steps."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    for checkpoint in list_checkpoints(copy / "checkpoints"):
        if step_of(checkpoint) not in (step - 1, step):
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
launch/run.sh --may-requeue $? {config}; echo "the first exits with $?"
cp -r {disk}/run {left}
rm {disk}/filler
launch/run.sh {config}; echo "the second exits with $?"
cp -r {disk}/run {final}
"""


@pytest.mark.long
@pytest.mark.extended  # test_cli_runs.py has full disks without the launcher
def test_a_full_disk_is_one_clear_error_and_with_free_space_the_same_command_resumes(
    commands: SabotagedCommands, tmp_path: Path
):
    sections = {"train": {"max_steps": 60}, "checkpoint": {"every": 4, "keep": 2}}
    assert commands.run("train", write_run(tmp_path / "undisturbed", **sections)).code == 0
    undisturbed = tmp_path / "undisturbed/run"
    disk = tmp_path / "disk"
    disk.mkdir()
    config = write_run(tmp_path / "small", output_dir=str(disk / "run"), **sections)
    left = tmp_path / "left"
    final = tmp_path / "final"
    script = ON_A_SMALL_DISK.format(disk=disk, config=config, left=left, final=final)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=ROOT,
        env=process_env(ENV),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    output = done.stdout + done.stderr
    status = read_status(left)
    assert "the first exits with 1" in output and "the second exits with 0" in output, output
    assert (status["state"], status["kind"]) == ("failed", "fault"), output
    assert "No space left on device" in status["reason"] and str(disk / "run") in status["reason"]
    assert [line for line in output.splitlines() if line.startswith("error:")] in ([], [f"error: {status['reason']}"])
    assert f"launcher: fault: {status['reason']}" in output and "Traceback" not in output and "in place" not in output
    complaints: list[str] = []
    saved = load_newest_checkpoint(left / "checkpoints", complaints.append)
    assert saved.step >= 16 and not complaints and f"from step {saved.step}" in output
    assert read_metrics(final)[-1]["step"] == 60 and len(read_metrics(final)) == 60
    assert [line["loss"] for line in read_metrics(final)] == [line["loss"] for line in read_metrics(undisturbed)]
    assert tensors_of(final, 60) == tensors_of(undisturbed, 60)
