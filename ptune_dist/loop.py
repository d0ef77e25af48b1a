"""THE loop. Read `train`, then `run_steps`; the rest of this file is what they name."""

import contextlib
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptune_dist.cluster.node_check import check_nodes
from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.config.schema import Config
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, from_main, init_distributed, together, write
from ptune_dist.errors import RunFault
from ptune_dist.evaluation.averaging import keep_average
from ptune_dist.evaluation.during_training import describe_validation, evaluate_members, is_due, is_evaluation_due
from ptune_dist.evaluation.evaluator import Evaluator
from ptune_dist.evaluation.generate import pad_id
from ptune_dist.evaluation.row_warnings import find_warnings
from ptune_dist.evaluation.sources import choose_sources
from ptune_dist.evaluation.splits import RunRows, build_splits, describe_skipped, find_lead, measure_scales, write_rows
from ptune_dist.optim.optimizer import learning_rate_at
from ptune_dist.optim.prompt_state import Measured
from ptune_dist.reports.of_run import write_run_report
from ptune_dist.run.accumulate import Accumulator
from ptune_dist.run.batches_ahead import BatchesAhead, StepPlan, StepSource
from ptune_dist.run.folder import (
    check_run_dir,
    is_finished,
    list_checkpoints,
    lock_run_dir,
    write_run_configs,
)
from ptune_dist.run.job import Job, build_job
from ptune_dist.run.length import settle_length
from ptune_dist.run.local_steps import LocalSteps
from ptune_dist.run.metrics_log import Listener
from ptune_dist.run.one_world import OneWorld
from ptune_dist.run.open_log import open_metrics
from ptune_dist.run.open_nodes import describe_traffic, open_nodes, settle_nodes
from ptune_dist.run.progress import Progress, checkpoint, store_prompt
from ptune_dist.run.reading import build_reading
from ptune_dist.run.replicas import FinishedByOthers, Replicas
from ptune_dist.run.resolve import resolve_whole
from ptune_dist.run.shared_pen import Log, SharedPen
from ptune_dist.run.slow_start import find_slow_starts
from ptune_dist.run.status import end_status, mark_running
from ptune_dist.run.step_lines import Taken, step_lines
from ptune_dist.run.summary import build_summary, describe_start, say_finished, write_summaries
from ptune_dist.run.throughput import StepCount
from ptune_dist.run.trained_tokens import describe_trained_tokens
from ptune_dist.run.watch import STOPPED_REASON, StopAgreed, Watch, failure_in_status


@dataclass
class Training:
    """A run at work on this rank. `metrics` is rank 0's alone; `evaluators` are of members with validation rows."""

    job: Job
    rows: TrainingRows
    accumulate: Accumulator
    evaluators: dict[str, Evaluator]
    progress: Progress
    metrics: Log | None
    watch: Watch
    world: World
    nodes: OneWorld | Replicas

    @property
    def config(self) -> Config:
        return self.job.config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir)

    def say(self, text: str) -> None:
        """A line for the console and the log, from rank 0."""
        if self.metrics:
            self.metrics.say(text)


def train(config: Config, listener: Listener | None = None) -> int:
    """Train the prompts that `config` asks for, or resume their run; returns the exit status. Collective.

    `listener` gets the numbers that trackers get, on rank 0.
    """
    world = init_distributed()
    config, _ = together(world, lambda: resolve_whole(config))
    config = settle_nodes(config, world)
    if config.train.nodes == "replicas":
        world = replace(world, pen=SharedPen())
    together(world, lambda: check_run_dir(config))
    summary = from_main(world, lambda: is_finished(config))
    if summary:
        say_finished(config, summary, world)
        return Outcome(DONE).exit_status
    with Watch(world.rank, config.train.hang_timeout_s) as watch:
        if watch.folder:
            with BusyLine("checking the nodes"):
                check_nodes(world)
        reading = together(world, lambda: build_reading(config))
        read = together(world, lambda: build_splits(reading))
        reading, lengths = together(world, lambda: settle_length(reading, read.training))
        config = reading.config
        summary = from_main(world, lambda: is_finished(config)) if lengths else None
        if summary:
            say_finished(config, summary, world)
            return Outcome(DONE).exit_status
        with BusyLine("comparing training and validation rows"):
            warnings = together(world, lambda: find_warnings(reading, read) if world.is_main else [])
        rows = read.training
        is_new = from_main(world, lambda: not has_checkpoint(config))
        with BusyLine(f"loading the base {config.model.path}"):
            job = build_job(reading, world, with_start=is_new, scales=measure_scales(reading, rows), rows=rows)
        job.engine.contexts.set_lead(*find_lead(rows.examples))
        run_dir = Path(config.output_dir)
        watch.begin_run()
        lock = on_main(world, lambda: lock_run_dir(config))
        with lock, on_main(world, lambda: failure_in_status(run_dir, world.pen)):
            notes = lengths + describe_skipped(config, read) + [f"warning: {line}" for line in warnings]
            notes += [prompt.head_note for prompt in job.prompts.values() if prompt.head_note]
            notes += describe_trained_tokens(job.prompts, read.splits, reading)
            notes += describe_traffic(job, list(job.members))
            return train_job(job, read, notes, watch, world, listener)


def train_job(
    job: Job, read: RunRows, notes: list[str], watch: Watch, world: World, listener: Listener | None = None
) -> int:
    """What `train` does once everything is loaded and the run's folder is locked; `notes` go to the log. Collective."""
    config = job.config
    run_dir = Path(config.output_dir)
    notes = choose_sources(job, read.training, world) + notes
    end = Outcome(STOPPED, STOPPED_REASON)
    with open_nodes(job, read.training, read.digests(), watch, world) as nodes:
        with contextlib.suppress(StopAgreed):  # it has waited for other nodes
            progress = nodes.begin(read.training)
            write(world, lambda: mark_running(run_dir))
            write(world, lambda: write_run_configs(config, job.members))
            write(world, lambda: write_rows(job.reading, read))
            together(world, lambda: watch.begin_steps(run_dir))
            if job.micro_batch.may_halve:
                write(world, lambda: job.micro_batch.store(run_dir))
            source = StepSource(job.engine, read.training, world, job.micro_batch.tokens, pad_id(job.tokenizer))
            with on_main(world, lambda: open_metrics(job, progress, world)) as metrics, BatchesAhead(source) as batches:
                accumulate = Accumulator(job, batches, world, watch.beat, metrics.say if metrics else lambda _: None)
                evaluators = read.evaluators
                training = Training(job, read.training, accumulate, evaluators, progress, metrics, watch, world, nodes)
                if metrics:
                    metrics.listener = listener
                    say_start(training, notes)
                try:
                    run_steps(training)
                    summary = finish(training)
                    end = Outcome(DONE)
                except StopAgreed:
                    more = "the other nodes continue" if nodes.has_left else "the same command resumes"
                    training.say(f"stopped at step {progress.step} on request; {more}")
                except FinishedByOthers as finished:
                    summary = finished.summary
                    end = Outcome(DONE)
            write(world, lambda: end_status(run_dir, end))
        if end.kind == DONE:
            write(world, lambda: write_run_report(run_dir))
        nodes.end(is_done=end.kind == DONE)
    if end.kind == DONE:
        say_finished(config, summary, world)
    return end.exit_status


def say_start(training: Training, notes: list[str]) -> None:
    """The first lines of the log."""
    evaluator = next(iter(training.evaluators.values()), None)
    held_out = evaluator.split.examples if evaluator else None
    training.say(describe_start(training.job, training.rows, held_out, training.progress, training.world))
    for line in notes:
        training.say(line)


def run_steps(training: Training) -> None:
    """Steps until the run is over. Collective.

    Raises StopAgreed, with everything saved, where any rank is asked to stop. A checkpoint comes before the evaluation
    of its step, so that a long evaluation cannot cost it; a run that is resumed from there evaluates first.
    """
    config = training.config
    progress = training.progress
    nodes = training.nodes
    if nodes.is_asked(training.metrics):  # while loading: there is nothing to save
        raise StopAgreed
    while True:
        if progress.evaluation_pending:
            evaluate(training)
        if is_over(config, progress):
            return
        if not take_step(training):
            continue
        progress.evaluation_pending = bool(training.evaluators) and is_evaluation_due(config, progress.step)
        is_stopped = nodes.is_asked(training.metrics) and (nodes.has_left or not is_over(config, progress))
        if is_stopped or is_due(config.checkpoint.every_steps, progress.step, config):
            checkpoint(training.job, progress, training.world)
        if is_stopped:
            raise StopAgreed


def take_step(training: Training) -> bool:
    """One optimizer step of every live member, or a period of local steps, each with a line of metrics. Collective.

    False where other nodes have trained on without this one, which is where they are then.
    """
    engine = training.job.engine
    progress = training.progress
    began = time.perf_counter()
    gathers = engine.gathers.copy()
    engine.contexts.take_counts()  # those of an evaluation belong to no step
    taken = take_period(training) if training.config.train.sync_every > 1 else take_one_step(training)
    seconds = (time.perf_counter() - began) / max(1, len(taken))
    gathered = [count // max(1, len(taken)) for count in engine.gathers.since(gathers)]
    if training.metrics and taken:
        training.metrics.eta.count_steps(len(taken))
    for number, one in enumerate(taken, start=1):
        read = [i for chosen in one.examples.values() for i in chosen]
        num_tokens = int(training.rows.examples.lengths_of(read).sum())
        progress.count_step(one.losses, StepCount(seconds, len(read), num_tokens, *gathered))
        training.watch.beat(progress.step)
        if training.metrics:
            line, of_members = step_lines(training.job, progress, one, training.world)
            facts = training.nodes.facts() if number == len(taken) else {}  # of their exchange
            training.metrics.step(line | facts, of_members)
            for text in find_slow_starts(training.job, progress):
                training.say(f"warning: {text}")
    return bool(taken)


def take_one_step(training: Training) -> list[Taken]:
    """A step over all of its rows, forward, backward and update; none as `take_step` has it. Collective."""
    progress = training.progress
    found = training.nodes.sum_step(training.accumulate, progress, training.metrics)
    if found is None:
        return []
    plan, measured = found
    members = training.job.members
    rates = {name: learning_rate_at(plan.step, members[name].train) for name in plan.examples}
    losses = update_members(training, plan, measured, rates)
    return [Taken(plan.examples, losses, rates, {name: training.job.engine.grad_norm(name) for name in losses})]


def take_period(training: Training) -> list[Taken]:
    """The local steps until nodes exchange next; none where others have continued without this one. Collective."""
    nodes = training.nodes
    assert isinstance(nodes, Replicas), "one world with train.sync_every is refused"
    local = LocalSteps(training.job, training.rows, training.accumulate, nodes, training.world)
    ended = local.take(training.progress, training.metrics)
    if ended is None:
        return []
    read = ended.steps[ended.fault_step - training.progress.step - 1].examples
    end_faulty(training, ended.faults, ended.fault_step, read)
    return ended.steps


def update_members(
    training: Training, plan: StepPlan, measured: Measured, learning_rates: dict[str, float]
) -> dict[str, float]:
    """The optimizer's step of every member whose numbers are finite; each member's loss. Collective.

    A member whose numbers are not is stopped, with the prompt that it had; where it is the last one, raises RunFault on
    every rank.
    """
    engine = training.job.engine
    sums, norms = measured
    by_member = dict(zip(engine.members, sums, strict=True))
    losses = {name: by_member[name] / divisor for name, divisor in plan.divisors.items()}
    faults = {name: f"the loss is {loss}" for name, loss in losses.items() if not math.isfinite(loss)}
    sound = {name: rate for name, rate in learning_rates.items() if name not in faults}
    if sound:
        faults |= engine.step(sound, norms)
    end_faulty(training, faults, plan.step, plan.examples)
    return losses


def end_faulty(training: Training, faults: dict[str, str], step: int, read: dict[str, list[int]]) -> None:
    """Stop the members whose numbers failed at a step, of those with the examples that they `read`.

    Raises RunFault on every rank where it is the last one.
    """
    if faults and len(faults) == len(training.progress.live):
        name, what = next(iter(faults.items()))
        raise describe_fault(training, read[name], step, what)
    for name, what in faults.items():
        training.progress.members[name].end(what, step, is_faulty=True)
        training.say(f"{name} is stopped at step {step}: {what}")


def describe_fault(training: Training, examples: list[int], step: int, what: str) -> RunFault:
    """What is not finite, where, and what is kept."""
    shown = ", ".join(training.rows.examples.where(i) for i in examples[:3])
    more = ", ..." if len(examples) > 3 else ""
    found = list_checkpoints(training.run_dir / "checkpoints")
    kept = f"the last good checkpoint is {found[-1]}" if found else f"{training.run_dir} has no checkpoint yet"
    return RunFault(f"{what} at step {step}, in a batch of {len(examples)} rows ({shown}{more}); {kept}")


def evaluate(training: Training) -> None:
    """Evaluate the live members that have validation rows, and keep their best prompts. Collective."""
    for evaluator in training.evaluators.values():  # it may have been halved since the last time
        evaluator.decoding = replace(evaluator.decoding, micro_batch_tokens=training.job.micro_batch.tokens)
    if training.evaluators:
        evaluate_members(
            training.job,
            training.evaluators,
            training.progress,
            training.metrics,
            training.watch,
            training.world,
        )
        if training.metrics:
            training.metrics.eta.count_evaluation()


def finish(training: Training) -> dict[str, Any]:
    """Write the summaries and return the run's. Where nothing is evaluated the last prompt is kept. Collective."""
    job = training.job
    config = job.config
    progress = training.progress
    world = training.world
    if any(name in training.evaluators and not progress.members[name].best for name in progress.live):
        evaluate(training)
    for name, standing in progress.members.items():
        if not standing.best:  # never evaluated: there is no validation, or it was stopped before
            store_prompt(job, name, progress, world)
    if progress.step < training.config.train.max_steps:  # patience ended it, perhaps between two checkpoints
        checkpoint(job, progress, world)
    averaged = keep_average(job, training.evaluators, progress, world, training.say)
    more = describe_validation(job, training.evaluators, progress, training.rows)
    summary = build_summary(job, progress, more, world)
    if averaged:
        summary["average_last"] = averaged if config.sweep else next(iter(averaged.values()))
    if training.metrics:
        training.metrics.ranks(progress.step, summary["ranks"])
    if job.engine.recomputer:
        for line in job.engine.recomputer.describe_profile():
            training.say(line)
    write(world, lambda: write_summaries(job, progress, more, summary))
    return summary


def has_checkpoint(config: Config) -> bool:
    return bool(list_checkpoints(Path(config.output_dir) / "checkpoints"))


def on_main(world: World, open_it: Any) -> AbstractContextManager[Any]:
    """The context manager that `open_it` makes on rank 0, one of None on the others. Collective."""
    return together(world, lambda: open_it() if world.is_main else nullcontext())


def is_over(config: Config, progress: Progress) -> bool:
    """All steps are done, or no member is live, or `evaluate.patience` has ended the only prompt."""
    if progress.step >= config.train.max_steps or not progress.live:
        return True
    only = list(progress.members.values())
    return not config.sweep and 0 < config.evaluate.patience <= only[0].num_worse
