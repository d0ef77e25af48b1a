"""The summary of a run, and what it prints at its start and its end."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ptune_dist import __version__
from ptune_dist.base.layers import disk_bytes, held_bytes
from ptune_dist.config.schema import Config
from ptune_dist.data.examples import Examples
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, gather_from_ranks, max_over_ranks
from ptune_dist.run.folder import write_json
from ptune_dist.run.job import Job
from ptune_dist.run.memory import peak_memory_by_kind, peak_memory_bytes
from ptune_dist.run.progress import Progress, Standing, rank_members
from ptune_dist.run.sample_table import show_samples
from ptune_dist.run.training_defaults import describe_rates

MIB = 1 << 20


def describe_start(job: Job, rows: TrainingRows, held_out: Examples | None, progress: Progress, world: World) -> str:
    """The first line of a run's log: its rows, those held out for validation if any, and how it is spread."""
    parts = [f"{len(rows.examples):,} examples, {rows.examples.truncated_share:.1%} truncated"]
    if held_out:
        parts.append(f"validation {len(held_out):,}, {held_out.truncated_share:.1%} truncated")
    if job.config.sweep:
        parts.append(f"{len(job.members)} members")
    precision = describe_precision(job.config)
    parts.append(f"{world.size} ranks on {world.device.type}, ZeRO {job.engine.stage}, {precision}")
    base_mib = held_bytes(job.engine.model.base) / MIB
    parts.append(f"base {base_mib:,.2f} MiB per rank, loaded in {job.loading['load_s']:.1f} s")
    parts.append(describe_rates(job.members))
    parts.append(f"from step {progress.step}" if progress.step else "from the start")
    return "; ".join(parts)


def describe_precision(config: Config) -> str:
    quantization = config.model.quantization
    return config.model.dtype + ("" if quantization == "none" else f" over {quantization}")


def build_summary(job: Job, progress: Progress, more: dict[str, dict[str, Any]], world: World) -> dict[str, Any]:
    """What `summary.json` holds; a sweep's is about its best member and ranks all. Collective.

    `more`: keys of its own for each member.
    """
    ranked = rank_members(progress, job.config.evaluate.best)
    peak = max_over_ranks(peak_memory_bytes(world.device), world)
    summary = {
        **describe_member(job, progress, ranked[0], more),
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
    if job.config.sweep:
        summary["steps"] = progress.step
        summary["stopped_early"] = progress.step < job.config.train.max_steps
        summary["ranking"] = [describe_rank_of(progress.members[name], name) for name in ranked]
    return summary


def describe_member(job: Job, progress: Progress, member: str, more: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a member's own `summary.json` holds."""
    standing = progress.members[member]
    step = standing.ended_step or progress.step
    found = {
        "steps": step,
        "stopped_early": step < job.config.train.max_steps,
        "train_loss": finite(standing.train_loss),  # of the last step
        "train_loss_mean": finite(standing.recent_loss),  # of the last steps
        "validation": standing.best,
        "base_without_prompt": standing.without_prompt,
        "before": standing.before,
        "last": standing.last,
        "best_step": standing.best_step,
        "evaluations_since_best": standing.num_worse,
        "samples": standing.samples,
        **more.get(member, {}),
    }
    if standing.ended:
        found["ended"] = standing.ended
    return found


def finite(value: float) -> float | None:
    """None instead of NaN or infinity, which JSON lacks: a member may not have had a finite step."""
    return value if math.isfinite(value) else None


def describe_rank_of(standing: Standing, name: str) -> dict[str, Any]:
    """A line of a sweep's ranking."""
    return {
        "member": name,
        "validation": standing.best,
        "best_step": standing.best_step,
        "train_loss": finite(standing.train_loss),
        "ended": standing.ended or None,
        "ended_step": standing.ended_step or None,
    }


def describe_rank(job: Job, progress: Progress, world: World) -> dict[str, Any]:
    """What this rank held and read, and what it gathered per step."""
    mean = progress.throughput.per_step
    cache = job.engine.contexts.cache
    found = {
        "rank": world.rank,
        "base_bytes": held_bytes(job.engine.model.base),
        "base_bytes_on_disk": disk_bytes(job.engine.model.base),
        "peak_memory_bytes": peak_memory_by_kind(world.device),
        "gathers_per_step": mean("num_gathers"),
        "gathered_bytes_per_step": mean("gathered_bytes"),
        "gathered_bytes_between_nodes_per_step": mean("gathered_bytes_between_nodes"),
        **job.loading,
    }
    if cache:
        found |= {"context_cache_bytes": cache.held_bytes, "context_hits": cache.hits, "context_misses": cache.misses}
    return found


def say_finished(config: Config, summary: dict[str, Any], world: World) -> None:
    """Print the end of a run: answers to some held-out rows, a sweep's ranking, the metric before and after."""
    if not world.is_main:
        return
    name = config.evaluate.best
    show_samples(summary["samples"])
    if "ranking" in summary:
        Console().print(render_ranking(summary["ranking"], name))
    line = f"finished: {config.output_dir}, {summary['steps']} steps"
    found = describe_gain(summary, name)
    if found:
        line += f", {found}"
        if "ranking" in summary:
            line += f" of the best member, {summary['ranking'][0]['member']}"
    print(line, flush=True)
    if "no_gain" in summary:
        print(f"warning: {summary['no_gain']}", flush=True)


def describe_gain(summary: dict[str, Any], name: str) -> str:
    """Metric `name` before training and of the best prompt, with its step where later prompts were worse.

    A metric that was added on resume has no value before training, and none at all where the run was finished already;
    the loss always has one.
    """
    before = summary["before"]
    best = summary["validation"]
    last = summary.get("last", best)
    if not before or not best:
        return ""
    name = name if name in best else "loss"
    shown = name if name in before else "loss"
    parts = [f"{shown} {before[shown]:.4f} before training"]
    if shown != name:
        parts.append(f"{best[shown]:.4f} after, {name} {best[name]:.4f}")
    elif last.get(name, best[name]) == best[name]:
        parts.append(f"{best[name]:.4f} after")
    else:
        parts.append(f"best at step {summary['best_step']}: {best[name]:.4f}, {last[name]:.4f} at the end")
    bare = summary.get("base_without_prompt", {})
    if shown in bare:
        parts.append(f"{bare[shown]:.4f} of the base without prompt")
    return ", ".join(parts)


def render_ranking(ranking: list[dict[str, Any]], name: str) -> Table:
    """A sweep's members, the best first; `name` is the metric that ranks them."""
    table = Table("", Column("member", overflow="fold"), name, "loss", "at step", "training loss", "")
    for place, line in enumerate(ranking, 1):
        found = line["validation"]
        shown = [f"{found[key]:.4f}" if key in found else "" for key in (name, "loss")]
        ended = f"{line['ended']} (step {line['ended_step']})" if line["ended"] else ""
        loss = "" if line["train_loss"] is None else f"{line['train_loss']:.4f}"
        table.add_row(str(place), line["member"], *shown, str(line["best_step"] or ""), loss, ended)
    return table


def write_summaries(job: Job, progress: Progress, more: dict[str, dict[str, Any]], summary: dict[str, Any]) -> None:
    """Raises RunFault. One rank calls."""
    if job.config.sweep:
        for name, member in job.members.items():
            write_json(Path(member.output_dir) / "summary.json", describe_member(job, progress, name, more))
    write_json(Path(job.config.output_dir) / "summary.json", summary)
