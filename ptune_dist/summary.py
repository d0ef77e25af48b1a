"""What a run says of itself at its start and at its end.

Floor 6.
"""

import platform
from importlib.metadata import version

from ptune_dist import __version__
from ptune_dist.base.layers import disk_bytes, held_bytes
from ptune_dist.config import Config
from ptune_dist.data.build import Split
from ptune_dist.distributed import World, gather_from_ranks, max_over_ranks
from ptune_dist.evaluate import Judge
from ptune_dist.job import Job
from ptune_dist.metrics import peak_memory_by_kind, peak_memory_bytes, show_samples
from ptune_dist.progress import Progress

MIB = 1 << 20


def describe_start(job: Job, split: Split, judge: Judge | None, progress: Progress, world: World) -> str:
    """The first line of a run's log: what goes in and how it is spread."""
    parts = [f"{len(split.examples):,} examples, {split.examples.truncated_share:.1%} truncated"]
    if judge:
        held_out = judge.split.examples
        parts.append(f"validation {len(held_out):,}, {held_out.truncated_share:.1%} truncated")
    precision = describe_precision(job.config)
    parts.append(f"{world.size} ranks on {world.device.type}, ZeRO {job.engine.stage}, {precision}")
    loading = job.loading
    parts.append(f"base {held_bytes(job.engine.model.base) / MIB:,.2f} MiB a rank, read in {loading['load_s']:.1f} s")
    parts.append(f"from step {progress.step}" if progress.step else "from the start")
    return "; ".join(parts)


def describe_precision(config: Config) -> str:
    return config.model.dtype + (" over int8" if config.model.quantization == "int8" else "")


def build_summary(job: Job, progress: Progress, world: World) -> dict:
    """What `summary.json` holds. Collective: every rank must call."""
    peak = max_over_ranks(peak_memory_bytes(world.device), world)
    return {
        "steps": progress.step,
        "stopped_early": progress.step < job.config.train.max_steps,
        "train_loss": progress.train_loss,
        "validation": progress.best,
        "before": progress.before,
        "best_step": progress.best_step,
        "evaluations_since_best": progress.num_worse,
        "samples": progress.samples,
        "samples_per_s": progress.throughput.samples_per_s,
        "tokens_per_s": progress.throughput.tokens_per_s,
        "peak_memory_bytes": int(peak),
        "ranks": gather_from_ranks(describe_rank(job, progress, world), world),
        "world_size": world.size,
        "zero_stage": job.engine.stage,
        "quantization": job.config.model.quantization,
        "skipped_steps": job.engine.skipped_steps,
        "wall_s": progress.wall_s + progress.throughput.lap(),
        "versions": {
            "ptune_dist": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
        },
    }


def describe_rank(job: Job, progress: Progress, world: World) -> dict:
    """What this rank held, read and, in a steady step, gathered."""
    mean = progress.throughput.per_step
    return {
        "rank": world.rank,
        "base_bytes": held_bytes(job.engine.model.base),
        "base_bytes_on_disk": disk_bytes(job.engine.model.base),
        "peak_memory_bytes": peak_memory_by_kind(world.device),
        "gathers_per_step": mean("num_gathers"),
        "gathered_bytes_per_step": mean("gathered_bytes"),
        "gathered_bytes_between_nodes_per_step": mean("gathered_bytes_between_nodes"),
        **job.loading,
    }


def say_finished(config: Config, summary: dict, world: World) -> None:
    """The end of a run for people: the metric before and after, and some held-out rows' answers."""
    if not world.is_main:
        return
    name, before, after = config.evaluate.best, summary["before"], summary["validation"]
    show_samples(summary["samples"])
    change = (
        f", {name} {before[name]:.4f} before training, {after[name]:.4f} after"
        if name in before and name in after
        else ""
    )
    print(f"finished: {config.output_dir}, {summary['steps']} steps{change}", flush=True)
