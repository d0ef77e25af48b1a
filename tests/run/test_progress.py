"""What a run counts about its members, which of them is best, and that a checkpoint brings all of it back."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from ptune_dist.errors import RunFault, UserError
from ptune_dist.optim.loss_scale import LossScale
from ptune_dist.prompts.method import Method
from ptune_dist.run.checkpoint import load_newest_checkpoint, save_checkpoint
from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.progress import (
    NUM_RECENT,
    Progress,
    Standing,
    checkpoint,
    rank_members,
    restore,
    store_prompt,
    tensors_of,
)
from ptune_dist.run.throughput import StepCount
from ptune_dist.zero.engine import Engine
from tests.optim.states import ALONE, are_equal, build_state, give_gradients, take_step
from tests.optim.states import tensors_of as trained_tensors

pytestmark = pytest.mark.usefixtures("group")
SAMPLE = {"input": "one =", "wanted": "1", "answer": "7"}


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_fresh_standing_has_measured_nothing():
    standing = Standing()
    assert math.isnan(standing.train_loss) and math.isnan(standing.recent_loss)
    assert (standing.best_step, standing.num_worse, standing.ended, standing.is_faulty) == (0, 0, "", False)


def test_the_evaluation_before_training_is_kept_apart_and_is_not_the_best():
    standing = Standing()
    assert standing.count_evaluation({"loss": 1.0}, [SAMPLE], "loss", 0) is False
    assert (standing.before, standing.last, standing.best) == ({"loss": 1.0}, {}, {})
    assert standing.samples == [{"input": "one =", "wanted": "1", "untrained": "7", "trained": ""}]


def test_the_best_evaluation_is_that_of_the_metric_and_of_equals_that_of_lower_loss():
    standing = Standing()
    found = [  # accuracy, loss, whether it is the best so far
        (0.5, 2.0, True),
        (0.6, 3.0, True),
        (0.6, 3.0, False),
        (0.6, 2.9, True),
        (0.6, 2.95, False),
        (0.5, 1.0, False),
        (0.4, 0.5, False),
    ]
    worse = 0
    for step, (accuracy, loss, is_best) in enumerate(found, start=1):
        metrics = {"loss": loss, "accuracy": accuracy}
        assert standing.count_evaluation(metrics, [], "accuracy", step) is is_best
        worse = 0 if is_best else worse + 1
        assert (standing.last, standing.num_worse) == (metrics, worse)
    assert (standing.best_step, standing.best) == (4, {"loss": 2.9, "accuracy": 0.6})


def test_a_lower_loss_is_better_and_its_samples_are_kept():
    standing = Standing()
    standing.count_evaluation({"loss": 3.0}, [SAMPLE, SAMPLE | {"input": "two ="}], "loss", 0)
    for step, loss, answer in ((2, 2.0, "a"), (4, 2.5, "b"), (6, 1.5, "c"), (8, 1.6, "d")):
        standing.count_evaluation({"loss": loss}, [SAMPLE | {"answer": answer}], "loss", step)
    assert (standing.best_step, standing.best, standing.num_worse) == (6, {"loss": 1.5}, 1)
    assert [(s["untrained"], s["trained"]) for s in standing.samples] == [("7", "c"), ("7", "")]


def test_a_metric_that_was_added_on_resume_starts_anew():
    standing = Standing(best={"loss": 1.0}, best_step=3, num_worse=2)
    assert standing.count_evaluation({"loss": 2.0, "accuracy": 0.1}, [], "accuracy", 5) is True
    assert (standing.best_step, standing.num_worse) == (5, 0)


def test_more_samples_than_before_training_have_no_untrained_answer():
    standing = Standing()
    standing.count_evaluation({"loss": 3.0}, [SAMPLE], "loss", 0)
    standing.count_evaluation({"loss": 2.0}, [SAMPLE, SAMPLE | {"input": "two =", "answer": "2"}], "loss", 1)
    assert [(s["input"], s["untrained"], s["trained"]) for s in standing.samples] == [
        ("one =", "7", "7"),
        ("two =", "", "2"),
    ]


def test_a_member_that_ended_before_a_metric_was_added_ranks_below_those_that_have_it():
    found = {
        "a": {"loss": 1.0},
        "b": {"loss": 3.0, "accuracy": 0.1},
        "c": {"loss": 0.5},
        "d": {"loss": 2.0, "accuracy": 0.9},
    }
    progress = Progress({name: Standing(best=best) for name, best in found.items()})
    assert rank_members(progress, "accuracy") == ["d", "b", "c", "a"]


def test_a_member_that_has_ended_is_live_no_more_and_says_why():
    progress = Progress({name: Standing() for name in "abc"}, step=4)
    progress.members["b"].end("weaker", 4)
    progress.members["c"].end("not a number", 3, is_faulty=True)
    assert progress.live == ["a"]
    facts = [(s.ended, s.ended_step, s.is_faulty) for s in progress.members.values()]
    assert facts == [("", 0, False), ("weaker", 4, False), ("not a number", 3, True)]


def test_each_step_is_counted_with_its_time_and_the_last_losses_that_are_finite():
    progress = Progress({"a": Standing(), "b": Standing()})
    for step in range(1, NUM_RECENT + 3):
        progress.count_step({"a": float(step), "b": math.nan}, StepCount(0.5, 8, 80))
    assert (progress.step, progress.elapsed_s) == (NUM_RECENT + 2, 0.5 * (NUM_RECENT + 2))
    assert 0 < progress.wall_s < 5 and progress.throughput.samples_per_s == 16
    member = progress.members["a"]
    assert member.recent_losses == [float(step) for step in range(3, NUM_RECENT + 3)]
    assert NUM_RECENT == 20  # as docs/runs.md says of train_loss_mean
    assert (member.train_loss, member.recent_loss) == (NUM_RECENT + 2, sum(member.recent_losses) / NUM_RECENT)
    assert math.isnan(progress.members["b"].train_loss) and progress.members["b"].recent_losses == []


def test_members_rank_by_their_best_prompts_then_by_training_and_the_faulty_last():
    progress = Progress(
        {
            "faulty": Standing(train_loss=0.1, is_faulty=True),
            "none": Standing(),
            "slow": Standing(train_loss=3.0),
            "quick": Standing(train_loss=2.0),
            "low": Standing(best={"accuracy": 0.5, "loss": 0.1}),
            "high": Standing(best={"accuracy": 0.7, "loss": 9.0}),
            "higher": Standing(best={"accuracy": 0.7, "loss": 8.0}),
        }
    )
    assert rank_members(progress, "accuracy") == ["higher", "high", "low", "quick", "slow", "none", "faulty"]
    assert rank_members(progress, "loss") == ["low", "higher", "high", "quick", "slow", "none", "faulty"]


class Rows:
    """Training rows of which only the content's digest and the file's name count here."""

    names = ["train.jsonl"]

    def __init__(self, digest: str = "d"):
        self._digest = digest

    def digest(self) -> str:
        return self._digest


def build_job(folder: Path, fingerprint: str = "base", keep: int = 3) -> SimpleNamespace:
    """A job of two members whose engine has the prompts' state but no base."""
    (folder / "config.yaml").touch()  # a folder without one is no run's any more
    engine = Engine.__new__(Engine)
    engine.prompts = build_state("one", "two", loss_scale=LossScale({"initial_scale_power": 4}))
    prompts = [Method(), Method()]
    engine.model = cast(Any, SimpleNamespace(members=lambda: prompts, read_prompts=lambda: None))
    members = {name: SimpleNamespace(output_dir=str(folder / name)) for name in ("one", "two")}
    config = SimpleNamespace(
        output_dir=str(folder),
        model=SimpleNamespace(path="models/x"),
        checkpoint=SimpleNamespace(keep=keep),
        train=SimpleNamespace(nodes="one_world"),
    )
    return SimpleNamespace(config=config, engine=engine, members=members, fingerprint=fingerprint)


def train_step(job: SimpleNamespace, progress: Progress, seed: int) -> None:
    give_gradients(job.engine.prompts, seed=seed)
    take_step(job.engine.prompts, {"one": 0.1, "two": 0.2})
    progress.count_step({"one": 2.0 - seed, "two": 3.0}, StepCount(0.25, 4, 40))


def test_a_run_without_checkpoints_begins(tmp_path):
    progress = restore(build_job(tmp_path), Rows("x"), ALONE)
    assert (progress.step, progress.saved_step, progress.data_digest) == (0, -1, "x")
    assert progress.evaluation_pending and list(progress.members) == ["one", "two"]
    assert progress.elapsed_s == progress.wall_s == 0


def test_a_checkpoint_brings_back_all_that_training_has_changed(tmp_path):
    job = build_job(tmp_path)
    progress = restore(job, Rows(), ALONE)
    for seed in range(3):
        train_step(job, progress, seed)
    progress.members["one"].count_evaluation({"loss": 1.0}, [SAMPLE], "loss", 3)
    progress.members["two"].end("weaker", 2)
    progress.evaluation_pending = False
    checkpoint(job, progress, ALONE)
    assert progress.saved_step == 3
    again = build_job(tmp_path)
    restored = restore(again, Rows(), ALONE)
    assert {name: asdict(one) for name, one in restored.members.items()} == {
        name: asdict(one) for name, one in progress.members.items()
    }
    for key in ("step", "elapsed_s", "wall_s", "evaluation_pending", "data_digest", "saved_step"):
        assert getattr(restored, key) == getattr(progress, key), key
    assert again.engine.loss_scale_state() == job.engine.loss_scale_state()
    for one in (job, again):  # the optimizers continue where they were
        train_step(one, replace(progress), seed=9)
    for name in ("one", "two"):
        assert are_equal(trained_tensors(job.engine.prompts)[name], trained_tensors(again.engine.prompts)[name])


def test_a_step_is_saved_once_and_the_newest_few_are_kept(tmp_path):
    job = build_job(tmp_path, keep=2)
    progress = restore(job, Rows(), ALONE)
    for seed in range(3):
        train_step(job, progress, seed)
        checkpoint(job, progress, ALONE)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]
    written = (folder / "step-00000003").stat().st_mtime_ns
    checkpoint(job, progress, ALONE)
    assert (folder / "step-00000003").stat().st_mtime_ns == written


def test_changed_rows_and_another_base_are_refused(tmp_path):
    job = build_job(tmp_path)
    progress = restore(job, Rows(), ALONE)
    train_step(job, progress, 0)
    checkpoint(job, progress, ALONE)
    with pytest.raises(UserError, match="data.train: train.jsonl has changed since this run began"):
        restore(job, Rows("other"), ALONE)
    with pytest.raises(UserError, match="model.path: models/x has changed since this run began"):
        restore(build_job(tmp_path, fingerprint="other"), Rows(), ALONE)
    restore(build_job(tmp_path), Rows(), ALONE)


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    job = build_job(tmp_path)
    progress = restore(job, Rows(), ALONE)
    train_step(job, progress, 0)
    checkpoint(job, progress, ALONE)
    folder = tmp_path / "checkpoints"
    snapshot = load_newest_checkpoint(folder, pytest.fail)
    assert snapshot is not None
    del snapshot.state["progress"]["members"]
    save_checkpoint(folder, snapshot, keep=1)
    with pytest.raises(UserError, match=f"{folder}: these checkpoints are of an earlier version"):
        restore(job, Rows(), ALONE)


def test_a_damaged_checkpoint_is_a_warning_that_the_user_sees(tmp_path, capsys):
    job = build_job(tmp_path)
    progress = restore(job, Rows(), ALONE)
    for seed in range(2):
        train_step(job, progress, seed)
        checkpoint(job, progress, ALONE)
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").write_text("{")
    assert restore(job, Rows(), ALONE).step == 1
    assert capsys.readouterr().out.startswith("warning: ")


def test_a_members_tensors_are_those_of_its_own_name_alone():
    tensors = {"a/x": 1, "a/y.z": 2, "ab/x": 3, "b/a/x": 4}
    assert tensors_of("a", tensors) == {"x": 1, "y.z": 2} and tensors_of("ab", tensors) == {"x": 3}


def test_a_prompt_that_cannot_be_written_is_a_fault_that_names_the_folder(tmp_path, monkeypatch):
    job = build_job(tmp_path)
    (tmp_path / "one").write_text("a file")
    monkeypatch.setattr("ptune_dist.run.progress.prompt_facts", lambda *_args, **_options: {})
    monkeypatch.setattr("ptune_dist.run.progress.prompt_tensors", lambda *_args: {})
    with pytest.raises(RunFault, match="cannot save the prompt: .*/one/prompt: File exists: a folder is needed"):
        store_prompt(job, "one", Progress({"one": Standing()}), ALONE)
