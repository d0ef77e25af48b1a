"""Between training steps: evaluate the members of a run, keep the best prompts, and stop members and the run."""

import math
from pathlib import Path
from typing import Any

from ptune_dist.config.schema import Config
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, write
from ptune_dist.errors import RunFault
from ptune_dist.evaluation.bare_base import evaluate_without_prompt
from ptune_dist.evaluation.evaluator import Evaluation, Evaluator, MemberAnswers
from ptune_dist.evaluation.predictions import write_predictions
from ptune_dist.run.job import Job
from ptune_dist.run.no_gain import describe_no_gain
from ptune_dist.run.one_world import agree_on_stop
from ptune_dist.run.progress import Progress, checkpoint, rank_evaluation, store_prompt
from ptune_dist.run.shared_pen import Log
from ptune_dist.run.watch import StopAgreed, Watch


def evaluate_members(
    job: Job,
    evaluators: dict[str, Evaluator],
    progress: Progress,
    metrics: Log | None,
    watch: Watch,
    world: World,
) -> None:
    """Evaluate the live members; store the prompt of each one that is better than before. Collective.

    Raises RunFault where the only live member has no finite loss, and StopAgreed, after a checkpoint of this step,
    where any rank is asked to stop: the evaluation is then repeated when the run is resumed.
    """
    found = run_evaluators(job, evaluators, progress, metrics, watch, world)
    step = progress.step
    for name, (values, samples, answers) in found.items():
        if metrics is not None:
            metrics.evaluation(step, values, samples, member=name if job.config.sweep else None)
        if not math.isfinite(values["loss"]):
            reason = f"the validation loss is {values['loss']}"
            if progress.live == [name]:
                raise RunFault(f"{reason} at step {step}; the best prompt is kept")
            progress.members[name].end(reason, step, is_faulty=True)
        elif progress.members[name].count_evaluation(values, samples, job.config.evaluate.best, step):
            store_prompt(job, name, progress, world)
            store_predictions(job, name, evaluators[name], answers, world)
    progress.evaluation_pending = False
    end_members(job.config, progress, metrics)


def store_predictions(job: Job, member: str, evaluator: Evaluator, answers: MemberAnswers, world: World) -> None:
    """Write what a member's best prompt answers to the validation rows. Collective; raises RunFault."""
    folder = Path(job.members[member].output_dir)
    write(world, lambda: write_predictions(folder, evaluator, answers))


def run_evaluators(
    job: Job,
    evaluators: dict[str, Evaluator],
    progress: Progress,
    metrics: Log | None,
    watch: Watch,
    world: World,
) -> dict[str, Evaluation]:
    """Each live member's evaluation. Members with one evaluator are evaluated together.

    Evaluators run in the order of their first members, which is the same on all ranks. Collective.
    """

    def between_batches() -> None:
        watch.beat()
        if agree_on_stop(watch, metrics, world):
            if progress.step:
                checkpoint(job, progress, world)
            raise StopAgreed

    found: dict[str, Evaluation] = {}
    distinct = {id(evaluator): evaluator for evaluator in evaluators.values()}
    for evaluator in distinct.values():
        members = [name for name in progress.live if evaluators.get(name) is evaluator]
        if members and progress.step == 0 and not progress.members[members[0]].without_prompt:
            bare = evaluate_without_prompt(job.engine, evaluator, members[0], between_batches)
            for name in members:
                progress.members[name].without_prompt = bare
            if metrics and bare:
                metrics.without_prompt(bare)
        if members:
            found |= evaluator(job.engine, members, between_batches)
    return found


def end_members(config: Config, progress: Progress, metrics: Log | None) -> None:
    """After an evaluation, stop the members of a sweep that make no progress and, at a halving, the worse ones."""
    if not config.sweep:
        return
    ended = find_without_progress(config, progress)
    live = [member for member in progress.live if member not in ended]
    ended |= dict.fromkeys(find_halved(config, progress, live), "worse on validation than the members that continue")
    for member, reason in ended.items():
        progress.members[member].end(reason, progress.step)
        if metrics:
            metrics.say(f"{member} is stopped at step {progress.step}: {reason}")


def describe_validation(
    job: Job, evaluators: dict[str, Evaluator], progress: Progress, rows: TrainingRows
) -> dict[str, dict[str, Any]]:
    """What each member's summary has beside its metrics: how they are computed, and that nothing was gained."""
    found = {}
    for name, evaluator in evaluators.items():
        no_gain = describe_no_gain(
            job.members[name],
            progress.members[name],
            job.reading.family.name,
            num_steps=progress.members[name].ended_step or progress.step,
            num_rows=rows.count_rows(name),
            num_held_out=evaluator.split.num_rows,
        )
        own = {"signatures": evaluator.signatures, "no_gain": no_gain}
        found[name] = {key: value for key, value in own.items() if value}
    return found


def find_without_progress(config: Config, progress: Progress) -> dict[str, str]:
    """Members whose evaluations have been no better for `evaluate.patience` times, each with the reason."""
    num_worse = {member: progress.members[member].num_worse for member in progress.live}
    return {
        member: f"no better in {count} evaluations"
        for member, count in num_worse.items()
        if 0 < config.evaluate.patience <= count
    }


def find_halved(config: Config, progress: Progress, live: list[str]) -> list[str]:
    """The members among `live` that successive halving leaves out at this step."""
    halving = config.sweep_halving
    step = progress.step
    if not halving or step == 0 or not has_passed(halving.every, step, config) or step >= config.train.max_steps:
        return []
    name = config.evaluate.best
    ranked = sorted(live, key=lambda member: rank_evaluation(progress.members[member].last, name), reverse=True)
    return ranked[max(1, math.ceil(len(ranked) * halving.keep)) :]


def is_evaluation_due(config: Config, step: int) -> bool:
    halving = config.sweep_halving
    return is_due(config.evaluate.every_steps, step, config) or bool(
        halving and has_passed(halving.every, step, config)
    )


def is_due(every: int, step: int, config: Config) -> bool:
    """Whether `step` is one of every `every` steps, or the last."""
    return step == config.train.max_steps or (every > 0 and has_passed(every, step, config))


def has_passed(every: int, step: int, config: Config) -> bool:
    """Whether `step` is a multiple of `every`, or the first exchange of nodes after one."""
    before = (step - 1) // config.train.sync_every * config.train.sync_every
    return step // every > before // every
