"""THE loop. Floor 6: read `train` top to bottom; the rest of this file is what it names."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ptune_dist.checkpoint import list_checkpoints
from ptune_dist.config import Config
from ptune_dist.data.batches import step_examples
from ptune_dist.data.build import Split, build_split
from ptune_dist.distributed import StopRequest, World, init_distributed, sum_over_ranks
from ptune_dist.errors import RunFault
from ptune_dist.evaluate import Judge, build_judge
from ptune_dist.files import fault_on_failed_write
from ptune_dist.generate import pad_id
from ptune_dist.job import Job, build_family, build_job, build_tokenizer, together
from ptune_dist.metrics import MetricsWriter, StepCount, peak_memory_bytes
from ptune_dist.optimizer import learning_rate_at
from ptune_dist.progress import Progress, checkpoint, restore, store_prompt
from ptune_dist.run_dir import check_run_dir, is_finished, lock_run_dir, write_json, write_run_config
from ptune_dist.summary import build_summary, describe_start, say_finished

DONE, STOPPED = 0, 75


def train(config: Config) -> int:
    """Train the prompt that `config` asks for, or go on with it; returns the exit status. Collective."""
    world = init_distributed()
    together(world, lambda: check_run_dir(config))
    summary = is_finished(config)
    if summary:
        say_finished(config, summary, world)
        return DONE
    split, judge = together(world, lambda: build_data(config))
    job = build_job(config, world, with_start=not has_checkpoint(config))
    with together(world, lambda: lock_run_dir(config) if world.is_main else nullcontext()):
        progress = restore(job, split, world)
        together(world, lambda: write_run_config(config) if world.is_main else None)
        with together(world, lambda: open_metrics(config, progress, world)) as metrics, StopRequest() as stop:
            if world.is_main:
                metrics.say(describe_start(job, split, judge, progress, world))
            is_done = run_steps(job, split, judge, progress, metrics, stop, world)
            if not is_done:
                return STOPPED
            summary = finish(job, judge, progress, metrics, world)
    say_finished(config, summary, world)
    return DONE


def run_steps(
    job: Job, split: Split, judge: Judge | None, progress: Progress, metrics: MetricsWriter | None, stop: StopRequest,
    world: World,
) -> bool:  # fmt: skip
    """Steps until the run is over, or until any rank is asked to stop: then False, with all of it saved. Collective.

    A checkpoint comes before the evaluation of its step, so that a long evaluation cannot cost it; a run that goes on
    from there evaluates first.
    """
    config = job.config
    if judge and progress.evaluation_pending:
        judge_prompt(job, judge, progress, metrics, world)
    while not is_over(config, progress):
        began, step, gathers = time.perf_counter(), progress.step + 1, job.engine.gathers.copy()
        examples = step_examples(
            step, batch_size=config.train.batch_size, num_examples=len(split.examples), seed=config.seed
        )
        loss = accumulate_step(job, split, examples, step, world)
        learning_rate = learning_rate_of(config, step)
        grad_norm = move_prompt(job, split, examples, step, learning_rate)
        num_tokens = int(split.examples.lengths[examples].sum())
        gathered = job.engine.gathers.since(gathers)
        progress.count_step(loss, StepCount(time.perf_counter() - began, len(examples), num_tokens, *gathered))
        if world.is_main:
            metrics.step(metrics_line(progress, learning_rate, grad_norm, world))

        progress.evaluation_pending = judge is not None and is_due(config.evaluate.every, step, config)
        is_stopped = agree_on_stop(stop, metrics, world) and not is_over(config, progress)
        if is_stopped or is_due(config.checkpoint.every, step, config):
            checkpoint(job, progress, world)
        if is_stopped:
            if world.is_main:
                metrics.say(f"stopped at step {step} on request; the same command goes on from here")
            return False
        if progress.evaluation_pending:
            judge_prompt(job, judge, progress, metrics, world)
    return True


def accumulate_step(job: Job, split: Split, examples: list[int], step: int, world: World) -> float:
    """Forward and backward of one step's examples: the loss per supervised token over all ranks. Collective.

    Raises RunFault on every rank, before anything moves, when the loss is not finite.
    """
    train_config, data = job.config.train, split.examples
    plan = job.engine.plan(examples, data, train_config.micro_batch_tokens)
    num_targets = int(data.num_targets[examples].sum())
    total = torch.zeros((), device=world.device)
    for number, groups in enumerate(plan, 1):
        batch = job.engine.collate(data, groups[world.rank], pad_id(job.tokenizer))
        total += job.engine.accumulate(batch, scale=1 / num_targets, is_last=number == len(plan))
    (nll,) = sum_over_ranks([total.item()], world)
    if not math.isfinite(nll):
        raise describe_fault(job, split, examples, step, f"the loss is {nll / num_targets}")
    return nll / num_targets


def move_prompt(job: Job, split: Split, examples: list[int], step: int, learning_rate: float) -> float:
    """The optimizer's step; returns the gradient's norm. Raises RunFault on every rank. Collective."""
    try:
        return job.engine.step(learning_rate)
    except FloatingPointError as error:
        raise describe_fault(job, split, examples, step, str(error)) from None


def describe_fault(job: Job, split: Split, examples: list[int], step: int, what: str) -> RunFault:
    """What is not finite, where, and what is kept."""
    rows = ", ".join(split.examples.where(i) for i in examples[:3])
    found = list_checkpoints(Path(job.config.output_dir) / "checkpoints")
    return RunFault(
        f"{what} at step {step}, in a batch of {len(examples)} rows ({rows}{', ...' if len(examples) > 3 else ''}); "
        + (f"the last good checkpoint is {found[-1]}" if found else f"{job.config.output_dir} has no checkpoint yet")
    )


def agree_on_stop(stop: StopRequest, metrics: MetricsWriter | None, world: World) -> bool:
    """Whether any rank is asked to stop. Raises RunFault on every rank where rank 0 cannot write. Collective."""
    failed = metrics.failure if metrics else None
    num_asked, num_failed = sum_over_ranks([float(stop.requested), float(failed is not None)], world)
    if num_failed:
        raise failed or RunFault("rank 0 cannot write its metrics")
    return num_asked > 0


def build_data(config: Config) -> tuple[Split, Judge | None]:
    """The training split, and the judge over the validation split where there is one. Raises UserError."""
    tokenizer, family = build_tokenizer(config), build_family(config)
    held_out = build_split(
        config.data, tokenizer, which="validation", family=family, max_examples=config.evaluate.max_examples
    )
    split = build_split(config.data, tokenizer, which="train", family=family)
    return split, build_judge(config, held_out, tokenizer, family) if held_out else None


def judge_prompt(
    job: Job, judge: Judge, progress: Progress, metrics: MetricsWriter | None, world: World
) -> None:  # fmt: skip
    """Evaluate; keep the prompt where it is the best so far. Collective: every rank must call. Raises RunFault."""
    found, samples = judge(job.engine)
    if world.is_main:
        metrics.evaluation(progress.step, found, samples)
    if not math.isfinite(found["loss"]):
        raise RunFault(f"the validation loss is {found['loss']} at step {progress.step}; the best prompt is kept")
    if progress.count_evaluation(found, samples, job.config.evaluate.best):
        store_prompt(job, progress, world)


def finish(
    job: Job, judge: Judge | None, progress: Progress, metrics: MetricsWriter | None, world: World
) -> dict[str, Any]:  # fmt: skip
    """Write the summary and return it; where nothing is judged the last prompt is the one to keep. Collective."""
    if judge and not progress.best:
        judge_prompt(job, judge, progress, metrics, world)
    if judge is None:
        store_prompt(job, progress, world)
    if progress.step < job.config.train.max_steps:  # patience ended it, perhaps between two checkpoints
        checkpoint(job, progress, world)
    summary = build_summary(job, progress, world)
    if world.is_main:
        metrics.ranks(progress.step, summary["ranks"])
        for line in job.engine.recomputer.describe_profile() if job.engine.recomputer else ():
            metrics.say(line)
    file = Path(job.config.output_dir) / "summary.json"
    together(world, lambda: write_json(file, summary) if world.is_main else None)
    return summary


def has_checkpoint(config: Config) -> bool:
    return bool(list_checkpoints(Path(config.output_dir) / "checkpoints"))


def open_metrics(config: Config, progress: Progress, world: World):
    """The writer on rank 0; the other ranks have none. Raises RunFault."""
    if not world.is_main:
        return nullcontext()
    with fault_on_failed_write(Path(config.output_dir)):
        return MetricsWriter(Path(config.output_dir), max_steps=config.train.max_steps, first_step=progress.step + 1)


def metrics_line(progress: Progress, learning_rate: float, grad_norm: float, world: World) -> dict[str, float]:
    """A line of metrics.jsonl."""
    last = progress.throughput.last
    return {
        "step": progress.step,
        "loss": progress.train_loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "samples_per_s": last.num_samples / last.seconds,
        "tokens_per_s": last.num_tokens / last.seconds,
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "num_gathers": last.num_gathers,
        "gathered_bytes": last.gathered_bytes,
        "gathered_bytes_between_nodes": last.gathered_bytes_between_nodes,
        "time_s": progress.elapsed_s,
    }


def learning_rate_of(config: Config, step: int) -> float:
    train_config = config.train
    return learning_rate_at(
        step, peak=train_config.learning_rate, schedule=train_config.schedule,
        warmup_steps=train_config.warmup_steps, max_steps=train_config.max_steps,
    )  # fmt: skip


def is_over(config: Config, progress: Progress) -> bool:
    """All steps done, or `evaluate.patience` evaluations without a better one."""
    return progress.step >= config.train.max_steps or 0 < config.evaluate.patience <= progress.num_worse


def is_due(every: int, step: int, config: Config) -> bool:
    """Every so many steps, and at the end."""
    return step == config.train.max_steps or (every > 0 and step % every == 0)
