"""Which members of a sweep continue: each is evaluated on its own rows, and one that is stopped is not evaluated."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import ptune_dist.evaluation.during_training
from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.distributed.world import World
from ptune_dist.errors import RunFault
from ptune_dist.evaluation.during_training import end_members, evaluate_members
from ptune_dist.evaluation.evaluator import Evaluation, MemberAnswers
from ptune_dist.loop import Training, is_over, update_members
from ptune_dist.optim.prompt_state import Measured
from ptune_dist.run.batches_ahead import StepPlan
from ptune_dist.run.progress import Progress, Standing, rank_members
from ptune_dist.run.step_lines import step_lines
from ptune_dist.run.throughput import StepCount
from tests.conftest import TINY, write_config

WORLD = World(1, 2, None)  # not rank 0: nothing is written
NAMES = [f"seed={number}" for number in range(4)]


@pytest.fixture
def load(tmp_path):
    def load_sweep(**sections) -> Config:
        path = write_config(
            tmp_path / "c.yaml", sweep={"seed": [0, 1, 2, 3]},
            data={"validation": str(TINY / "data" / "validation.jsonl")}, **sections,
        )  # fmt: skip
        return load_config(path)

    return load_sweep


@pytest.fixture
def stored(monkeypatch) -> list[str]:
    """Names of members whose prompt was stored, and then what it answers."""
    names = []
    module = ptune_dist.evaluation.during_training

    def store_predictions(job, name, evaluator, answers, world):
        assert name == names[-1] and answers.texts == [name]

    monkeypatch.setattr(module, "store_prompt", lambda job, name, progress, world: names.append(name))
    monkeypatch.setattr(module, "store_predictions", store_predictions)
    return names


class FakeEvaluator:
    """Gives each member the loss that `losses` has for it."""

    def __init__(self, **losses: float):
        self.losses, self.asked = {name.replace("_", "="): loss for name, loss in losses.items()}, []

    def __call__(self, engine, members, between_batches):
        assert members, "nothing to evaluate"
        self.asked.append(list(members))
        return {name: Evaluation({"loss": self.losses[name]}, [], MemberAnswers({}, texts=[name])) for name in members}


def job_of(config: Config) -> SimpleNamespace:
    return SimpleNamespace(config=config, engine=None)


def begin(step: int = 0, names=NAMES) -> Progress:
    return Progress({name: Standing() for name in names}, step=step)


def ended(progress: Progress) -> dict[str, tuple[str, int]]:
    return {n: (standing.ended, standing.ended_step) for n, standing in progress.members.items() if standing.ended}


def test_members_with_one_evaluator_are_evaluated_together_and_others_by_their_own(load, stored):
    first, second = FakeEvaluator(seed_0=1.0, seed_1=2.0), FakeEvaluator(seed_2=3.0, seed_3=4.0)
    evaluators = dict(zip(NAMES, (first, first, second, second), strict=True))
    progress = begin(step=5)
    evaluate_members(job_of(load()), evaluators, progress, None, None, WORLD)
    assert (first.asked, second.asked) == ([NAMES[:2]], [NAMES[2:]])
    assert [standing.best["loss"] for standing in progress.members.values()] == [1.0, 2.0, 3.0, 4.0]
    assert stored == NAMES and not progress.evaluation_pending


def test_an_evaluator_all_of_whose_members_are_stopped_is_not_asked(load, stored):
    first, second = FakeEvaluator(seed_0=1.0, seed_1=2.0), FakeEvaluator(seed_2=3.0, seed_3=4.0)
    progress = begin(step=5)
    for name in NAMES[2:]:
        progress.members[name].end("no better in 2 evaluations", 4)
    evaluate_members(
        job_of(load()), dict(zip(NAMES, (first, first, second, second), strict=True)), progress, None, None, WORLD
    )
    assert (first.asked, second.asked) == ([NAMES[:2]], [])
    assert stored == NAMES[:2]


def test_a_member_whose_validation_is_not_finite_is_stopped_and_its_prompt_is_not_stored(load, stored):
    evaluator = FakeEvaluator(seed_0=1.0, seed_1=math.nan, seed_2=math.inf, seed_3=2.0)
    progress = begin(step=5)
    evaluate_members(job_of(load()), dict.fromkeys(NAMES, evaluator), progress, None, None, WORLD)
    assert stored == ["seed=0", "seed=3"] == progress.live
    assert ended(progress)["seed=1"] == ("the validation loss is nan", 5)


def test_the_last_member_s_validation_that_is_not_finite_ends_the_run(load, stored):
    progress = begin(step=5, names=NAMES[:1])
    with pytest.raises(RunFault, match="the validation loss is nan at step 5; the best prompt is kept"):
        evaluate_members(job_of(load()), {NAMES[0]: FakeEvaluator(seed_0=math.nan)}, progress, None, None, WORLD)
    assert not stored


def test_halving_keeps_the_share_that_is_best_on_validation_and_one_at_least(load):
    config = load(sweep_halving={"every": 5, "keep": 0.5})
    progress = begin(step=5)
    for name, loss in zip(NAMES, (3.0, 1.0, 4.0, 2.0), strict=True):
        progress.members[name].last = {"loss": loss}
    end_members(config, progress, None)
    assert progress.live == ["seed=1", "seed=3"]
    assert ended(progress) == dict.fromkeys(
        ["seed=0", "seed=2"], ("worse on validation than the members that continue", 5)
    )
    for step, live in ((6, 2), (10, 1), (15, 1)):  # 6: no halving is due
        progress.step = step
        end_members(config, progress, None)
        assert len(progress.live) == live
    assert not is_over(config, progress)


def test_patience_ends_members_one_by_one_and_the_run_with_the_last(load):
    config = load(evaluate={"every": 1, "patience": 2})
    progress = begin(step=5, names=NAMES[:2])
    progress.members["seed=0"].num_worse = 2
    end_members(config, progress, None)
    assert ended(progress) == {"seed=0": ("no better in 2 evaluations", 5)} and not is_over(config, progress)
    progress.members["seed=1"].num_worse = 2
    end_members(config, progress, None)
    assert is_over(config, progress)


def test_a_member_that_a_step_brings_to_a_stand_leaves_no_number_that_is_not_finite():
    config = SimpleNamespace(sweep=True, train=SimpleNamespace(max_steps=9), checkpoint=None, output_dir="/nowhere/run")
    faults = {"seed=1": "the gradient's norm is nan"}
    norms = {"seed=0": 3.0, "seed=1": math.nan, "seed=2": 7.0, "seed=3": 5.0}
    sums = [2.0, 4.0, math.nan, 6.0]
    engine = SimpleNamespace(
        step=lambda rates, _: {name: what for name, what in faults.items() if name in rates}, grad_norm=norms.get,
        contexts=SimpleNamespace(cache=None), members=list(NAMES),
    )  # fmt: skip
    job, progress = SimpleNamespace(config=config, engine=engine), begin()
    rates = dict.fromkeys(NAMES, 0.5)
    world = World(0, 1, torch.device("cpu"))
    plan = StepPlan(1, {}, dict.fromkeys(NAMES, 2.0), 1)
    training = Training(job, None, None, {}, progress, None, None, world, None)
    losses = update_members(training, plan, Measured(sums, norms), rates)
    assert (losses["seed=0"], losses["seed=1"], losses["seed=3"]) == (1.0, 2.0, 3.0)
    progress.count_step(losses, StepCount(0.5, 4, 100))
    line, lines = step_lines(job, progress, losses, rates, world)
    assert ended(progress) == {"seed=1": ("the gradient's norm is nan", 1), "seed=2": ("the loss is nan", 1)}
    assert list(lines) == ["seed=0", "seed=3"] and line["num_members"] == 2
    assert (line["loss"], line["grad_norm"]) == (2.0, 4.0)
    json.dumps([line, lines], allow_nan=False)
    assert progress.members["seed=1"].train_loss == 2.0


def test_members_are_ranked_by_their_best_prompts_and_those_never_evaluated_last():
    progress = begin()
    for name, found in zip(NAMES, ({"loss": 2.0}, {}, {"loss": 1.0}, {}), strict=True):
        progress.members[name].best = found
    progress.members["seed=1"].train_loss, progress.members["seed=3"].train_loss = math.nan, 9.0
    assert rank_members(progress, "loss") == ["seed=2", "seed=0", "seed=3", "seed=1"]


def test_what_a_checkpoint_keeps_of_members_is_what_they_were():
    progress = begin(names=NAMES[:2])
    progress.count_step({"seed=0": 1.5}, StepCount(0.5, 4, 100))
    progress.members["seed=1"].end("the loss is nan", 1)
    kept = progress.state()
    members = {name: Standing(**standing) for name, standing in kept.pop("members").items()}
    assert members == progress.members and members["seed=0"].train_loss == 1.5
    assert (kept["step"], kept["elapsed_s"]) == (1, 0.5)
    assert Progress(members, **kept).live == ["seed=0"]


def test_a_member_s_first_evaluation_is_of_the_untrained_prompt_and_ties_go_to_the_earlier():
    standing = Standing()
    sample = {"input": "a", "wanted": "b", "answer": "c"}
    assert not standing.count_evaluation({"loss": 3.0}, [sample], "loss", 0)
    assert standing.count_evaluation({"loss": 2.0}, [sample | {"answer": "d"}], "loss", 5)
    assert not standing.count_evaluation({"loss": 2.0}, [sample | {"answer": "e"}], "loss", 10)
    assert (standing.before, standing.best_step, standing.num_worse) == ({"loss": 3.0}, 5, 1)
    assert standing.samples == [{"input": "a", "wanted": "b", "untrained": "c", "trained": "d"}]
