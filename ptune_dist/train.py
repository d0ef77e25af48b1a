"""THE loop. Floor 6: read `train` top to bottom; the rest of this file is what it names."""

import math
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from ptune_dist import __version__
from ptune_dist.checkpoint import Snapshot, load_newest_checkpoint, save_checkpoint
from ptune_dist.config import HIGHER_IS_BETTER, Config
from ptune_dist.data.batches import collate, plan_micro_batches, step_examples
from ptune_dist.data.build import Split, build_split
from ptune_dist.distributed import StopRequest, World, init_distributed, max_over_ranks, sum_over_ranks
from ptune_dist.errors import RunFault, UserError
from ptune_dist.evaluate import Judge, build_judge
from ptune_dist.generate import pad_id
from ptune_dist.job import Job, build_job, build_tokenizer, prompt_facts, together
from ptune_dist.metrics import MetricsWriter, Throughput, peak_memory_bytes, show_samples
from ptune_dist.optimizer import learning_rate_at
from ptune_dist.prompts.store import save_prompt
from ptune_dist.run_dir import check_run_dir, claim_run_dir, is_finished, write_json

DONE, STOPPED = 0, 75


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside tensors."""

    step: int = 0
    elapsed_s: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best prompt
    best_step: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)  # input, wanted, untrained answer, best prompt's answer
    num_worse: int = 0  # evaluations since the best
    train_loss: float = math.nan
    data_digest: str = ""


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
    together(world, lambda: claim_run_dir(config) if world.is_main else None)
    progress = restore(job, split, world)
    clock = Throughput(config.train.batch_size)

    with open_metrics(config, progress, world) as metrics, StopRequest() as stop:
        if world.is_main:
            metrics.say(describe_start(job, split, judge, progress, world))
        if progress.step == 0:
            judge_prompt(job, judge, progress, metrics, world)
        while not is_over(config, progress):
            began, step = time.perf_counter(), progress.step + 1
            examples = step_examples(
                step, batch_size=config.train.batch_size, num_examples=len(split.examples), seed=config.seed
            )
            loss, stop_asked = accumulate_step(job, split, examples, step, stop, world)
            learning_rate = learning_rate_of(config, step)
            grad_norm = job.engine.step(learning_rate)
            progress.step, progress.train_loss = step, loss
            num_tokens = int(split.examples.lengths[examples].sum())
            progress.elapsed_s += clock.count(time.perf_counter() - began, num_tokens)
            if world.is_main:
                metrics.step(metrics_line(progress, learning_rate, grad_norm, clock, world))

            if is_due(config.evaluate.every, step, config):
                judge_prompt(job, judge, progress, metrics, world)
            if is_due(config.checkpoint.every, step, config) or stop_asked or is_over(config, progress):
                checkpoint(job, progress, world)
            if stop_asked and not is_over(config, progress):
                if world.is_main:
                    metrics.say(f"stopped at step {step} on request; the same command goes on from here")
                return STOPPED
    finish(job, judge, progress, clock, world)
    return DONE


def accumulate_step(
    job: Job, split: Split, examples: list[int], step: int, stop: StopRequest, world: World
) -> tuple[float, bool]:
    """Forward and backward of one step's examples: loss per supervised token, and whether any rank is asked to stop.

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
    nll, num_asked = sum_over_ranks([total.item(), float(stop.requested)], world)
    loss = nll / num_targets
    if not math.isfinite(loss):
        rows = ", ".join(data.where(i) for i in examples[:3])
        raise RunFault(
            f"the loss is {loss} at step {step}, in a batch of {len(examples)} rows ({rows}, ...); "
            f"the checkpoints in {job.config.output_dir} are as they were"
        )
    return loss, num_asked > 0


def build_data(config: Config) -> tuple[Split, Judge | None]:
    """The training split, and the judge over the validation split where there is one. Raises UserError."""
    tokenizer = build_tokenizer(config)
    held_out = build_split(config.data, tokenizer, which="validation", max_examples=config.evaluate.max_examples)
    split = build_split(config.data, tokenizer, which="train")
    return split, build_judge(config, held_out, tokenizer) if held_out else None


def restore(job: Job, split: Split, world: World) -> Progress:
    """Go on from the newest sound checkpoint, or begin. Collective: every rank must call."""

    def warn(message: str) -> None:
        if world.is_main:
            print(f"warning: {message}", flush=True)

    folder = Path(job.config.output_dir) / "checkpoints"
    snapshot = together(world, lambda: load_newest_checkpoint(folder, warn))
    digest = split.digest()
    if snapshot is None:
        return Progress(data_digest=digest)
    progress = Progress(**snapshot.state["progress"])
    if progress.data_digest != digest:
        raise UserError(f"data.train: {split.rows.name} has changed since this run began: choose another output_dir")
    if snapshot.state["base"] != job.fingerprint:
        path = job.config.model.path
        raise UserError(f"model.path: {path} has changed since this run began: choose another output_dir")
    job.engine.load_prompt(snapshot.prompt)
    job.engine.load_optimizer_state(snapshot.optimizer)
    job.engine.load_loss_scale_state(snapshot.state["loss_scale"])
    return progress


def checkpoint(job: Job, progress: Progress, world: World) -> None:
    """Save the run's place. Collective: every rank must call."""
    snapshot = Snapshot(
        step=progress.step,
        prompt=job.engine.prompt_tensors,
        optimizer=job.engine.optimizer_state(),
        state={
            "progress": asdict(progress),
            "base": job.fingerprint,
            "loss_scale": job.engine.loss_scale_state(),
        },
    )
    folder, keep = Path(job.config.output_dir) / "checkpoints", job.config.checkpoint.keep
    together(world, lambda: save_checkpoint(folder, snapshot, keep=keep) if world.is_main else None)


def judge_prompt(job: Job, judge: Judge | None, progress: Progress, metrics, world: World) -> None:
    """Evaluate; keep the prompt where it is the best so far. Collective: every rank must call."""
    if judge is None:
        return
    found, samples = judge(job.engine)
    if world.is_main:
        metrics.evaluation(progress.step, found, samples)
    name = job.config.evaluate.best
    if progress.step == 0:
        progress.before = found
        progress.samples = [
            {"input": s["input"], "wanted": s["wanted"], "untrained": s["answer"], "trained": ""} for s in samples
        ]
        return
    sign = 1 if HIGHER_IS_BETTER[name] else -1
    if progress.best and sign * found[name] <= sign * progress.best[name]:
        progress.num_worse += 1
        return
    progress.best, progress.best_step, progress.num_worse = found, progress.step, 0
    for kept, sample in zip(progress.samples, samples, strict=True):
        kept["trained"] = sample["answer"]
    store_prompt(job, progress, world)


def store_prompt(job: Job, progress: Progress, world: World) -> None:
    """Write `prompt/`. Collective: every rank must call."""
    facts = prompt_facts(job, step=progress.step, metrics=progress.best)
    folder, tensors = Path(job.config.output_dir) / "prompt", job.engine.prompt_tensors

    def save() -> None:
        try:
            save_prompt(folder, tensors, facts)
        except OSError as error:
            raise RunFault(f"cannot save the prompt: {error.strerror}: {folder}; the one before it is kept") from None

    together(world, lambda: save() if world.is_main else None)


def finish(job: Job, judge: Judge | None, progress: Progress, clock: Throughput, world: World) -> None:
    """Write the summary; without validation the last prompt is the one to keep. Collective."""
    if judge is None:
        store_prompt(job, progress, world)
    peak = max_over_ranks(peak_memory_bytes(world.device), world)
    summary = {
        "steps": progress.step,
        "stopped_early": progress.step < job.config.train.max_steps,
        "train_loss": progress.train_loss,
        "validation": progress.best,
        "before": progress.before,
        "best_step": progress.best_step,
        "samples": progress.samples,
        "samples_per_s": clock.samples_per_s,
        "tokens_per_s": clock.tokens_per_s,
        "peak_memory_bytes": int(peak),
        "world_size": world.size,
        "zero_stage": job.engine.stage,
        "quantization": job.config.model.quantization,
        "skipped_steps": job.engine.skipped_steps,
        "wall_s": progress.elapsed_s,
        "versions": {
            "ptune_dist": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
        },
    }
    if world.is_main:
        write_json(Path(job.config.output_dir) / "summary.json", summary)
        say_finished(job.config, summary, world)


def say_finished(config: Config, summary: dict, world: World) -> None:
    """The end of a run for people: the metric before and after, and some held-out rows' answers."""
    if not world.is_main:
        return
    name, before, after = config.evaluate.best, summary["before"], summary["validation"]
    show_samples(summary["samples"])
    change = f", {name} {before[name]:.4f} before training, {after[name]:.4f} after" if after else ""
    print(f"finished: {config.output_dir}, {summary['steps']} steps{change}", flush=True)


def describe_start(job: Job, split: Split, judge: Judge | None, progress: Progress, world: World) -> str:
    """The first line of a run's log: what goes in and how it is spread."""
    parts = [f"{len(split.examples):,} examples, {split.examples.truncated_share:.1%} truncated"]
    if judge:
        held_out = judge.split.examples
        parts.append(f"validation {len(held_out):,}, {held_out.truncated_share:.1%} truncated")
    parts.append(f"{world.size} ranks on {world.device.type}, ZeRO {job.engine.stage}, {job.config.model.dtype}")
    parts.append(f"from step {progress.step}" if progress.step else "from the start")
    return "; ".join(parts)


def open_metrics(config: Config, progress: Progress, world: World):
    """The writer on rank 0; the other ranks have none."""
    if not world.is_main:
        return nullcontext()
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
