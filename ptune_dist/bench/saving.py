"""Measure one checkpoint of a run: milliseconds of a save, and its bytes compared with the prompt's.

    torchrun --nproc-per-node 2 -m ptune_dist.bench.saving CONFIG [key.path=value ...] --result FILE

The time is what the loop waits for: gathering tensors, writing and flushing files, and removing the oldest checkpoint.
"""

import statistics
import time
from pathlib import Path

import torch.distributed as dist

from ptune_dist.base.layers import held_bytes
from ptune_dist.bench.arguments import side_parser
from ptune_dist.bench.probe import write_result
from ptune_dist.cluster.processes import leave
from ptune_dist.config.load import load_config
from ptune_dist.distributed.world import init_distributed, sum_over_ranks
from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.job import build_job
from ptune_dist.run.progress import Progress, Standing, checkpoint
from ptune_dist.run.reading import build_reading
from ptune_dist.zero.engine import Engine

NUM_SAVES = 20


def give_moments(engine: Engine) -> None:
    """The optimizer's state of a prompt that has been trained: a step without a gradient makes it."""
    for member in engine.prompts.members.values():
        for parameter in member.parameters:
            parameter.grad = parameter.detach().clone()
        member.optimizer.step()
        member.clear_gradients()


def main() -> int:
    args = side_parser(__doc__).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    world = init_distributed()
    job = build_job(build_reading(config), world)
    give_moments(job.engine)
    progress = Progress({name: Standing() for name in job.members})
    seconds = []
    for step in range(1, NUM_SAVES + 1):
        progress.step = step
        dist.barrier()
        began = time.perf_counter()
        checkpoint(job, progress, world)
        seconds.append(time.perf_counter() - began)
    base_bytes = sum_over_ranks([held_bytes(job.engine.model.base)], world)[0]
    if world.is_main:
        newest = list_checkpoints(Path(config.output_dir) / "checkpoints")[-1]
        prompt_bytes = sum(t.nbytes for name in job.members for t in job.engine.prompt_tensors(name).values())
        save_bytes = sum(file.stat().st_size for file in newest.iterdir())
        result = {
            "save_ms": 1e3 * statistics.median(seconds),
            "slowest_save_ms": 1e3 * max(seconds),
            "save_bytes": save_bytes,
            "prompt_bytes": prompt_bytes,
            "base_bytes": base_bytes,
            "of_allowed_bytes": save_bytes / (4 * prompt_bytes + 65536),
        }
        write_result(args.result, result)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main())
