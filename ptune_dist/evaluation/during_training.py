"""Between steps: is a checkpoint or an evaluation due, is any rank asked to stop, which members go on?

Floor 6. Evaluations of the members, with what follows from them.
"""

import math

from ptune_dist.config.schema import Config
from ptune_dist.distributed.world import World, sum_over_ranks
from ptune_dist.errors import RunFault
from ptune_dist.evaluation.evaluator import Evaluation, Judge
from ptune_dist.run.job import Job
from ptune_dist.run.metrics_log import MetricsWriter
from ptune_dist.run.progress import Progress, checkpoint, rank_evaluation, store_prompt
from ptune_dist.run.watch import Watch


class StopAgreed(Exception):
    """Every rank has left what it did, an evaluation say, because one was asked to stop."""


def agree_on_stop(watch: Watch, metrics: MetricsWriter | None, world: World) -> bool:
    """Whether any rank is asked to stop. Raises RunFault on every rank where rank 0 cannot write. Collective."""
    failed = metrics.failure if metrics else None
    num_asked, num_failed = sum_over_ranks([float(watch.requested), float(failed is not None)], world)
    if num_failed:
        raise failed or RunFault("rank 0 cannot write its metrics")
    return num_asked > 0


def judge_members(
    job: Job, judges: dict[str, Judge], progress: Progress, metrics: MetricsWriter | None, watch: Watch, world: World
) -> None:  # fmt: skip
    """Evaluate the members that go on; keep each one's prompt where it is its best so far. Collective.

    Raises RunFault where the only one left has no finite loss, and StopAgreed, with the step saved, where any rank is
    asked to stop: the evaluation is done again when the run goes on.
    """
    config, step = job.config, progress.step
    found: dict[str, Evaluation] = {}

    def between_batches() -> None:
        watch.beat()
        if agree_on_stop(watch, metrics, world):
            if step:
                checkpoint(job, progress, world)
            raise StopAgreed

    for judge in {id(judge): judge for judge in judges.values()}.values():
        if judged := [name for name in progress.live if judges.get(name) is judge]:
            found |= judge(job.engine, judged, between_batches)
    for name, (values, samples) in found.items():
        if world.is_main:
            metrics.evaluation(step, values, samples, member=name if config.sweep else None)
        if not math.isfinite(values["loss"]):
            what = f"the validation loss is {values['loss']}"
            if progress.live == [name]:
                raise RunFault(f"{what} at step {step}; the best prompt is kept")
            progress.members[name].end(what, step, is_faulty=True)
        elif progress.members[name].count_evaluation(values, samples, config.evaluate.best, step):
            store_prompt(job, name, progress, world)
    progress.evaluation_pending = False
    end_members(config, progress, metrics)


def end_members(config: Config, progress: Progress, metrics: MetricsWriter | None) -> None:
    """After an evaluation: members without progress stand still, and at a halving the weaker ones."""
    step, name = progress.step, config.evaluate.best
    ended = {}
    for member in progress.live if config.sweep else ():
        num_worse = progress.members[member].num_worse
        if 0 < config.evaluate.patience <= num_worse:
            ended[member] = f"no better in {num_worse} evaluations"
    live = [member for member in progress.live if member not in ended]
    if config.sweep_halving and step and step % config.sweep_halving.every == 0 and step < config.train.max_steps:
        live.sort(key=lambda member: rank_evaluation(progress.members[member].last, name), reverse=True)
        for member in live[max(1, math.ceil(len(live) * config.sweep_halving.keep)) :]:
            ended[member] = "weaker than those that go on"
    for member, reason in ended.items():
        progress.members[member].end(reason, step)
        if metrics:
            metrics.say(f"{member} stands still from step {step} on: {reason}")


def is_evaluation_due(config: Config, step: int) -> bool:
    halving = config.sweep_halving
    return is_due(config.evaluate.every, step, config) or bool(halving and step % halving.every == 0)


def is_due(every: int, step: int, config: Config) -> bool:
    """Every so many steps, and at the end."""
    return step == config.train.max_steps or (every > 0 and step % every == 0)
