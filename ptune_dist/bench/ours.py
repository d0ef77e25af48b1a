"""Our side of a benchmark: `ptune-dist train` with a probe, which writes its figures to a result JSON.

    torchrun --nproc-per-node 2 -m ptune_dist.bench.ours CONFIG [key.path=value ...] --result FILE

The run is that of `train`, including metrics and TensorBoard. The probe records when the base is loaded and when the
engine has stepped. The config should turn evaluation and checkpoints off.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ptune_dist import loop
from ptune_dist.bench.arguments import side_parser
from ptune_dist.bench.probe import NUM_WARM_UP_STEPS, Probe, steady_figures, write_result
from ptune_dist.bench.work import share_of_peak, useful_flops
from ptune_dist.cluster.processes import leave
from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.data.build import build_split
from ptune_dist.distributed.world import World, init_distributed, max_over_ranks, sum_over_ranks
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.job import Job
from ptune_dist.run.metrics_log import read_metrics


def probe_job(build_job: Callable[..., Job], probe: Probe, jobs: list[Job]) -> Callable[..., Job]:
    """Wrap `build_job`: append the job to `jobs`, and tell `probe` when it is built and when its engine has stepped."""

    def build(*args: Any, **kwargs: Any) -> Job:
        job = build_job(*args, **kwargs)
        jobs.append(job)
        engine_step = job.engine.step

        def step(learning_rates: dict[str, float], norms: dict[str, float]) -> dict[str, str]:
            faults = engine_step(learning_rates, norms)
            probe.step_done()
            return faults

        job.engine.step = step
        probe.base_loaded()
        return job

    return build


def read_steps(run_dir: Path) -> tuple[list[float], list[int], list[int]]:
    """Loss, rows and real tokens of every step, from the run's metrics.jsonl."""
    losses: list[float] = []
    rows: list[int] = []
    tokens: list[int] = []
    before = 0.0
    for line in read_metrics(run_dir):
        step_s = line["time_s"] - before
        before = line["time_s"]
        losses.append(line["loss"])
        rows.append(round(line["samples_per_s"] * step_s))
        tokens.append(round(line["tokens_per_s"] * step_s))
    return losses, rows, tokens


def build_result(config: Config, probe: Probe, world: World) -> dict:
    """The side's figures. Collective: every rank must call."""
    memory = {name: int(max_over_ranks(value, world)) for name, value in probe.memory().items()}
    losses, rows, tokens = read_steps(Path(config.output_dir))
    result = {"steps": len(losses), "world_size": world.size, **memory, "loss_curve": losses}
    if len(losses) > probe.num_warm_up:
        window_s, cpu_s = probe.window()
        cpu_s = sum_over_ranks([cpu_s], world)[0]
        result |= steady_figures(window_s, cpu_s, rows, tokens, probe.num_warm_up)
    return result


def main() -> int:
    parser = side_parser(__doc__)
    parser.add_argument("--warm-up-steps", type=int, default=NUM_WARM_UP_STEPS, help="steps that are not timed")
    args = parser.parse_intermixed_args()
    probe = Probe(args.warm_up_steps)
    jobs: list[Job] = []
    loop.build_job = probe_job(loop.build_job, probe, jobs)
    try:
        config = load_config(args.config, args.overrides)
        status = loop.train(config)
    except (UserError, RunFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    world = init_distributed()
    result = build_result(config, probe, world)
    if "samples_per_s" in result:
        result |= count_work(jobs[0], result)
    if world.is_main:
        write_result(args.result, result)
    dist.destroy_process_group()  # without this, gloo's threads may abort the process at exit
    return status


def count_work(job: Job, result: dict) -> dict:
    """Useful work per second, and its share of the rate of plain matrix products. Collective: every rank must call."""
    split = build_split(job.config.data, job.reading.encoding(job.config), which="train")
    assert split is not None  # data.train is required
    examples = split.examples
    flops = useful_flops(
        job.engine.model.base,
        examples.lengths.tolist(),
        examples.num_targets.tolist(),
        num_virtual=job.config.prompt.num_virtual_tokens,
        recomputes=job.engine.recomputer is not None,
    )
    flops_per_token = flops / int(examples.lengths.sum())
    return share_of_peak(job.engine.model.base, flops_per_token * result["tokens_per_s"])


if __name__ == "__main__":
    leave(main())
