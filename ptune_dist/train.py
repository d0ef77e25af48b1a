"""THE loop. Floor 6: read `train` top to bottom; the rest of this file is what it names."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptune_dist.cluster.node_check import check_nodes
from ptune_dist.cluster.signs import DONE, STOPPED, End
from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.data.batches import collate
from ptune_dist.data.build import build_split
from ptune_dist.data.encode import Examples, common_context
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, init_distributed, sum_over_ranks
from ptune_dist.errors import RunFault
from ptune_dist.evaluation.during_training import StopAgreed, agree_on_stop, is_due, is_evaluation_due, judge_members
from ptune_dist.evaluation.evaluator import Judge, build_judge
from ptune_dist.evaluation.generate import pad_id
from ptune_dist.optim.optimizer import learning_rate_at
from ptune_dist.run.folder import (
    check_run_dir,
    is_finished,
    list_checkpoints,
    lock_run_dir,
    write_json,
    write_run_configs,
)
from ptune_dist.run.job import Job, build_family, build_job, build_tokenizer, from_main, together
from ptune_dist.run.memory import peak_memory_bytes
from ptune_dist.run.metrics_log import MetricsWriter
from ptune_dist.run.progress import Progress, checkpoint, restore, store_prompt
from ptune_dist.run.status import end_status, say_training
from ptune_dist.run.summary import build_summary, describe_member, describe_start, say_finished
from ptune_dist.run.throughput import StepCount
from ptune_dist.run.watch import STOPPED_REASON, Watch, status_of_failure


def train(config: Config) -> int:
    """Train the prompts that `config` asks for, or go on with them; returns the exit status. Collective."""
    world = init_distributed()
    together(world, lambda: check_run_dir(config))
    summary = from_main(world, lambda: is_finished(config))
    if summary:
        say_finished(config, summary, world)
        return End(DONE).status
    with Watch(world.rank, config.train.hang_timeout_s) as watch:
        if watch.folder:
            check_nodes(world)
        rows, judges = together(world, lambda: build_data(config))
        job = build_job(config, world, with_start=from_main(world, lambda: not has_checkpoint(config)))
        job.engine.contexts.set_lead(*lead_of(rows.examples))
        with together(world, lambda: lock_run_dir(config) if world.is_main else nullcontext()):
            with status_of_failure(Path(config.output_dir)) if world.is_main else nullcontext():
                return train_job(job, rows, judges, watch, world)


def train_job(job: Job, rows: TrainingRows, judges: dict[str, Judge], watch: Watch, world: World) -> int:
    """What `train` does once everything is loaded and the run's folder is ours. Collective."""
    config, end = job.config, End(DONE)
    progress = restore(job, rows, world)
    together(world, lambda: say_training(Path(config.output_dir)) if world.is_main else None)
    together(world, lambda: write_run_configs(config, job.members) if world.is_main else None)
    together(world, lambda: watch.begin_steps(Path(config.output_dir)))
    with together(world, lambda: open_metrics(job, progress, world)) as metrics:
        if world.is_main:
            validation = next(iter(judges.values())).split.examples if judges else None
            metrics.say(describe_start(job, rows, validation, progress, world))
        try:
            run_steps(job, rows, judges, progress, metrics, watch, world)
            summary = finish(job, judges, progress, metrics, watch, world)
        except StopAgreed:
            end = End(STOPPED, STOPPED_REASON)
            if world.is_main:
                metrics.say(f"stopped at step {progress.step} on request; the same command goes on from here")
    if world.is_main:
        end_status(Path(config.output_dir), end)
    if end.kind == DONE:
        say_finished(config, summary, world)
    return end.status


def run_steps(
    job: Job, rows: TrainingRows, judges: dict[str, Judge], progress: Progress, metrics: MetricsWriter | None,
    watch: Watch, world: World,
) -> None:  # fmt: skip
    """Steps until the run is over. Collective.

    Raises StopAgreed, with all of it saved, where any rank is asked to stop.

    A checkpoint comes before the evaluation of its step, so that a long evaluation cannot cost it; a run that goes on
    from there evaluates first.
    """
    config = job.config
    if agree_on_stop(watch, metrics, world):  # while everything was loaded: there is nothing to save
        raise StopAgreed
    if judges and progress.evaluation_pending:
        judge_members(job, judges, progress, metrics, watch, world)
    while not is_over(config, progress):
        began, step, gathers = time.perf_counter(), progress.step + 1, job.engine.gathers.copy()
        job.engine.contexts.take_counts()  # an evaluation's, which are no step's
        examples = rows.of_step(step, progress.live)
        losses = accumulate_step(job, rows, examples, watch, world)
        learning_rates = {name: learning_rate_of(job.members[name], step) for name in losses}
        freeze_faulty(job, rows, progress, losses, examples, learning_rates, metrics)
        read = [i for chosen in examples.values() for i in chosen]
        gathered = job.engine.gathers.since(gathers)
        num_tokens = int(rows.examples.lengths[read].sum())
        progress.count_step(losses, StepCount(time.perf_counter() - began, len(read), num_tokens, *gathered))
        watch.beat(step)
        if world.is_main:
            metrics.step(*metrics_lines(job, progress, losses, learning_rates, world))

        progress.evaluation_pending = bool(judges) and is_evaluation_due(config, step)
        is_stopped = agree_on_stop(watch, metrics, world) and not is_over(config, progress)
        if is_stopped or is_due(config.checkpoint.every, step, config):
            checkpoint(job, progress, world)
        if is_stopped:
            raise StopAgreed
        if progress.evaluation_pending:
            judge_members(job, judges, progress, metrics, watch, world)


def accumulate_step(
    job: Job, rows: TrainingRows, examples: dict[str, list[int]], watch: Watch, world: World
) -> dict[str, float]:
    """Forward and backward of one step's examples: each member's loss per supervised token. Collective."""
    engine, data = job.engine, rows.examples
    num_targets = {name: int(data.num_targets[chosen].sum()) for name, chosen in examples.items()}
    scales = [1 / num_targets[name] if name in examples else 0.0 for name in engine.members]
    plan = engine.plan(rows.units(examples, engine.members), data, job.config.train.micro_batch_tokens)
    total = torch.zeros(len(engine.members), device=world.device)
    for number, shares in enumerate(plan, 1):
        batch = collate(data, shares, world.rank, pad_id(job.tokenizer))
        total += engine.accumulate(batch, scales=scales, is_last=number == len(plan))
        watch.beat()
    sums = dict(zip(engine.members, sum_over_ranks(total.tolist(), world), strict=True))
    return {name: sums[name] / count for name, count in num_targets.items()}


def freeze_faulty(
    job: Job, rows: TrainingRows, progress: Progress, losses: dict[str, float], examples: dict[str, list[int]],
    learning_rates: dict[str, float], metrics: MetricsWriter | None,
) -> None:  # fmt: skip
    """The optimizer's step of every member whose numbers are finite. Collective.

    One whose are not stands still from here on, with the prompt that it had; where it is the last, raises RunFault on
    every rank.
    """
    step = progress.step + 1
    faults = {name: f"the loss is {loss}" for name, loss in losses.items() if not math.isfinite(loss)}
    if len(faults) < len(losses):
        faults |= job.engine.step({name: rate for name, rate in learning_rates.items() if name not in faults})
    if len(faults) == len(losses):
        name, what = next(iter(faults.items()))
        raise describe_fault(job, rows, examples[name], step, what)
    for name, what in faults.items():
        progress.members[name].end(what, step, is_faulty=True)
        if metrics:
            metrics.say(f"{name} stands still from step {step} on: {what}")


def describe_fault(job: Job, rows: TrainingRows, examples: list[int], step: int, what: str) -> RunFault:
    """What is not finite, where, and what is kept."""
    shown = ", ".join(rows.examples.where(i) for i in examples[:3])
    found = list_checkpoints(Path(job.config.output_dir) / "checkpoints")
    return RunFault(
        f"{what} at step {step}, in a batch of {len(examples)} rows ({shown}{', ...' if len(examples) > 3 else ''}); "
        + (f"the last good checkpoint is {found[-1]}" if found else f"{job.config.output_dir} has no checkpoint yet")
    )


def build_data(config: Config) -> tuple[TrainingRows, dict[str, Judge]]:
    """The members' training rows, and for each the judge over its validation split where it has one. Raises UserError.

    What several members share is read once.
    """
    tokenizer, family = build_tokenizer(config), build_family(config)
    members, splits, judges, known = expand_sweep(config), {}, {}, {}
    for name, member in members.items():
        key = member.data.model_dump_json()
        if key not in known:
            options = {"family": family, "placement": member.prompt.placement}
            held_out = build_split(
                member.data, tokenizer, which="validation", max_examples=config.evaluate.max_examples, **options
            )
            split = build_split(member.data, tokenizer, which="train", **options)
            known[key] = split, build_judge(member, held_out, tokenizer, family) if held_out else None
        splits[name], judge = known[key]
        if judge:
            judges[name] = judge
    seeds = {name: member.seed for name, member in members.items()}
    return TrainingRows(splits, batch_size=config.train.batch_size, seeds=seeds), judges


def lead_of(examples: Examples) -> tuple[np.ndarray, bool]:
    """What the contexts of all examples begin with, and whether they end with it."""
    lead = common_context(examples)
    return lead, bool((examples.num_context == len(lead)).all())


def finish(
    job: Job, judges: dict[str, Judge], progress: Progress, metrics: MetricsWriter | None, watch: Watch, world: World
) -> dict[str, Any]:  # fmt: skip
    """Write the summaries, return the run's; where nothing is judged the last prompt is kept. Collective."""
    if any(name in judges and not progress.members[name].best for name in progress.live):
        judge_members(job, judges, progress, metrics, watch, world)
    for name, standing in progress.members.items():
        if not standing.best:  # never judged: there is no validation, or it was brought to a stand before
            store_prompt(job, name, progress, world)
    if progress.step < job.config.train.max_steps:  # patience ended it, perhaps between two checkpoints
        checkpoint(job, progress, world)
    summary = build_summary(job, progress, world)
    if world.is_main:
        metrics.ranks(progress.step, summary["ranks"])
        for line in job.engine.recomputer.describe_profile() if job.engine.recomputer else ():
            metrics.say(line)
    together(world, lambda: write_summaries(job, progress, summary) if world.is_main else None)
    return summary


def write_summaries(job: Job, progress: Progress, summary: dict[str, Any]) -> None:
    """Raises RunFault. One rank calls."""
    for name, member in job.members.items() if job.config.sweep else ():
        write_json(Path(member.output_dir) / "summary.json", describe_member(job, progress, name))
    write_json(Path(job.config.output_dir) / "summary.json", summary)


def has_checkpoint(config: Config) -> bool:
    return bool(list_checkpoints(Path(config.output_dir) / "checkpoints"))


def open_metrics(job: Job, progress: Progress, world: World):
    """The writer on rank 0; the other ranks have none. Raises RunFault."""
    if not world.is_main:
        return nullcontext()
    folder = Path(job.config.output_dir)
    members = {name: Path(member.output_dir) for name, member in job.members.items()} if job.config.sweep else {}
    with fault_on_failed_write(folder):
        return MetricsWriter(
            folder, max_steps=job.config.train.max_steps, first_step=progress.step + 1, members=members
        )


def metrics_lines(
    job: Job, progress: Progress, losses: dict[str, float], learning_rates: dict[str, float], world: World
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """A line of metrics.jsonl, and of each member's own; of a sweep the first holds means over members.

    A member that this step has brought to a stand has no line of it.
    """
    last, cache = progress.throughput.last, job.engine.contexts.cache
    lines = {
        name: {
            "step": progress.step, "loss": loss, "learning_rate": learning_rates[name],
            "grad_norm": job.engine.grad_norm(name), "time_s": progress.elapsed_s,
        }
        for name, loss in losses.items() if not progress.members[name].ended
    }  # fmt: skip
    line = {
        "step": progress.step,
        **{key: sum(one[key] for one in lines.values()) / len(lines) for key in ("loss", "learning_rate", "grad_norm")},
        "samples_per_s": last.num_samples / last.seconds,
        "tokens_per_s": last.num_tokens / last.seconds,
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "num_gathers": last.num_gathers,
        "gathered_bytes": last.gathered_bytes,
        "gathered_bytes_between_nodes": last.gathered_bytes_between_nodes,
        "time_s": progress.elapsed_s,
    }
    if cache:
        hits, misses = job.engine.contexts.take_counts()
        line |= {"context_hit_rate": hits / max(1, hits + misses), "context_cache_bytes": cache.held_bytes}
    if not job.config.sweep:
        return line, {}
    return line | {"num_members": len(lines)}, lines


def learning_rate_of(config: Config, step: int) -> float:
    train_config = config.train
    return learning_rate_at(
        step, peak=train_config.learning_rate, schedule=train_config.schedule,
        warmup_steps=train_config.warmup_steps, max_steps=train_config.max_steps,
    )  # fmt: skip


def is_over(config: Config, progress: Progress) -> bool:
    """All steps done, or no member goes on: each has had `evaluate.patience` evaluations without a better one, say."""
    if progress.step >= config.train.max_steps or not progress.live:
        return True
    only = list(progress.members.values())
    return not config.sweep and 0 < config.evaluate.patience <= only[0].num_worse
