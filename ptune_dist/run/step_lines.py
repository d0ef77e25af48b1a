"""What a training step writes to metrics.jsonl."""

from typing import NamedTuple

from ptune_dist.distributed.world import World
from ptune_dist.run.job import Job
from ptune_dist.run.memory import peak_memory_bytes
from ptune_dist.run.progress import Progress

MEAN_KEYS = ("loss", "learning_rate", "grad_norm")  # of a sweep's members

Line = dict[str, float]


class Taken(NamedTuple):
    """A step that has been taken: what each member read, and its numbers."""

    examples: dict[str, list[int]]
    losses: dict[str, float]
    learning_rates: dict[str, float]
    grad_norms: dict[str, float]  # before clipping


def step_lines(job: Job, progress: Progress, taken: Taken, world: World) -> tuple[Line, dict[str, Line]]:
    """A line of the run's metrics.jsonl, and a line for each member of a sweep.

    A sweep's own line holds means over its members. A member that this step has stopped has no line of it.
    """
    lines = {name: member_line(progress, taken, name) for name in taken.losses if not progress.members[name].ended}
    last = progress.throughput.last
    line: Line = {
        "step": progress.step,
        **{key: sum(one[key] for one in lines.values()) / len(lines) for key in MEAN_KEYS},
        "samples_per_s": last.num_samples / last.seconds,
        "tokens_per_s": last.num_tokens / last.seconds,
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "num_gathers": last.num_gathers,
        "gathered_bytes": last.gathered_bytes,
        "gathered_bytes_between_nodes": last.gathered_bytes_between_nodes,
        "time_s": progress.elapsed_s,
    }
    cache = job.engine.contexts.cache
    if cache:
        hits, misses = job.engine.contexts.take_counts()
        if hits + misses:
            line["context_hit_rate"] = hits / (hits + misses)
        line["context_cache_bytes"] = cache.held_bytes
    if not job.config.sweep:
        return line, {}
    return line | {"num_members": len(lines)}, lines


def member_line(progress: Progress, taken: Taken, name: str) -> Line:
    return {
        "step": progress.step,
        "loss": taken.losses[name],
        "learning_rate": taken.learning_rates[name],
        "grad_norm": taken.grad_norms[name],
        "time_s": progress.elapsed_s,
    }
