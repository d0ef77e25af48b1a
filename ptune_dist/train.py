"""THE loop. Floor 6: read `train` top to bottom; the rest of this file is what it names."""

import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from ptune_dist.config import HIGHER_IS_BETTER, Config
from ptune_dist.data.batches import collate, plan_micro_batches, step_examples
from ptune_dist.data.build import Split, build_split
from ptune_dist.distributed import StopRequest, World, init_distributed, sum_over_ranks
from ptune_dist.errors import RunFault
from ptune_dist.evaluate import Judge, build_judge
from ptune_dist.files import fault_on_failed_write
from ptune_dist.generate import pad_id
from ptune_dist.job import Job, build_job, build_tokenizer, together
from ptune_dist.metrics import MetricsWriter, Throughput, peak_memory_bytes
from ptune_dist.optimizer import learning_rate_at
from ptune_dist.progress import Progress, checkpoint, restore, store_prompt
from ptune_dist.run_dir import check_run_dir, claim_run_dir, is_finished, write_json
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
    job = build_job(config, world)
    progress = restore(job, split, world)
    together(world, lambda: claim_run_dir(config) if world.is_main else None)
    clock = Throughput(config.train.batch_size)

    with together(world, lambda: open_metrics(config, progress, world)) as metrics, StopRequest() as stop:
        if world.is_main:
            metrics.say(describe_start(job, split, judge, progress, world))
        if progress.step == 0:
            judge_prompt(job, judge, progress, metrics, world)
        while not is_over(config, progress):
            began, step = time.perf_counter(), progress.step + 1
            examples = step_examples(
                step, batch_size=config.train.batch_size, num_examples=len(split.examples), seed=config.seed
            )
            loss = accumulate_step(job, split, examples, step, world)
            learning_rate = learning_rate_of(config, step)
            grad_norm = move_prompt(job, split, examples, step, learning_rate)
            progress.step, progress.train_loss = step, loss
            num_tokens = int(split.examples.lengths[examples].sum())
            progress.elapsed_s += clock.count(time.perf_counter() - began, num_tokens)
            if world.is_main:
                metrics.step(metrics_line(progress, learning_rate, grad_norm, clock, world))
            stop_asked = agree_on_stop(stop, metrics, world)

            if is_due(config.evaluate.every, step, config):
                judge_prompt(job, judge, progress, metrics, world)
            if is_due(config.checkpoint.every, step, config) or stop_asked or is_over(config, progress):
                checkpoint(job, progress, world)
            if stop_asked and not is_over(config, progress):
                if world.is_main:
                    metrics.say(f"stopped at step {step} on request; the same command goes on from here")
                return STOPPED
        finish(job, judge, progress, metrics, clock, world)
    return DONE


def accumulate_step(job: Job, split: Split, examples: list[int], step: int, world: World) -> float:
    """Forward and backward of one step's examples: the loss per supervised token over all ranks. Collective.

    Raises RunFault on every rank, before anything moves, when the loss is not finite.
    """
    train_config, data = job.config.train, split.examples
    plan = plan_micro_batches(
        examples, data.lengths, world_size=world.size, micro_batch_tokens=train_config.micro_batch_tokens,
        extra_tokens=job.engine.num_virtual_tokens,
    )  # fmt: skip
    num_targets = int(data.num_targets[examples].sum())
    total = torch.zeros((), device=world.device)
    for number, groups in enumerate(plan, 1):
        batch = collate(data, groups[world.rank], pad_id(job.tokenizer)).to(world.device)
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
    return RunFault(
        f"{what} at step {step}, in a batch of {len(examples)} rows ({rows}{', ...' if len(examples) > 3 else ''}); "
        f"the checkpoints in {job.config.output_dir} are as they were"
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
    tokenizer = build_tokenizer(config)
    held_out = build_split(config.data, tokenizer, which="validation", max_examples=config.evaluate.max_examples)
    split = build_split(config.data, tokenizer, which="train")
    return split, build_judge(config, held_out, tokenizer) if held_out else None


def judge_prompt(
    job: Job, judge: Judge | None, progress: Progress, metrics: MetricsWriter | None, world: World
) -> None:
    """Evaluate; keep the prompt where it is the best so far. Collective: every rank must call."""
    if judge is None:
        return
    found, samples = judge(job.engine)
    if world.is_main:
        metrics.evaluation(progress.step, found, samples)
    if not math.isfinite(found["loss"]):
        raise RunFault(f"the validation loss is {found['loss']} at step {progress.step}; nothing of this step is saved")
    name = job.config.evaluate.best
    if progress.step == 0:
        progress.before = found
        progress.samples = [
            {"input": s["input"], "wanted": s["wanted"], "untrained": s["answer"], "trained": ""} for s in samples
        ]
        return
    sign = 1 if HIGHER_IS_BETTER[name] else -1
    if name in progress.best and sign * found[name] <= sign * progress.best[name]:
        progress.num_worse += 1
        return
    progress.best, progress.best_step, progress.num_worse = found, progress.step, 0
    for kept, sample in zip(progress.samples, samples, strict=False):  # their number may change on resume
        kept["trained"] = sample["answer"]
    store_prompt(job, progress, world)


def finish(
    job: Job, judge: Judge | None, progress: Progress, metrics: MetricsWriter | None, clock: Throughput, world: World
) -> None:
    """Write the summary; where nothing has been judged the last prompt is the one to keep. Collective."""
    if not progress.best:
        judge_prompt(job, judge, progress, metrics, world)
    if judge is None:
        store_prompt(job, progress, world)
    summary = build_summary(job, progress, clock, world)
    file = Path(job.config.output_dir) / "summary.json"
    together(world, lambda: write_json(file, summary) if world.is_main else None)
    say_finished(job.config, summary, world)


def open_metrics(config: Config, progress: Progress, world: World):
    """The writer on rank 0; the other ranks have none. Raises RunFault."""
    if not world.is_main:
        return nullcontext()
    with fault_on_failed_write(Path(config.output_dir)):
        return MetricsWriter(Path(config.output_dir), max_steps=config.train.max_steps, first_step=progress.step + 1)


def metrics_line(
    progress: Progress, learning_rate: float, grad_norm: float, clock: Throughput, world: World
) -> dict[str, float]:
    return {
        "step": progress.step,
        "loss": progress.train_loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "samples_per_s": clock.last_samples / clock.last_s,
        "tokens_per_s": clock.last_tokens / clock.last_s,
        "peak_memory_bytes": peak_memory_bytes(world.device),
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
