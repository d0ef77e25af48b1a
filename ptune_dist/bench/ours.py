"""Our side of a benchmark: `ptune-dist train` with a probe on it, its figures as a result JSON.

    torchrun --nproc-per-node 2 -m ptune_dist.bench.ours CONFIG [key.path=value ...] --result FILE

The run is `train` itself, metrics and TensorBoard included; the probe notes when the base is loaded and when the engine
has stepped. Evaluation and checkpoints are the config's to leave out.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from ptune_dist import train as loop
from ptune_dist.bench.probe import NUM_WARM_UP_STEPS, Probe, steady_figures, write_result
from ptune_dist.bench.work import share_of_peak, useful_flops
from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.data.build import build_split
from ptune_dist.distributed.world import World, init_distributed, max_over_ranks, sum_over_ranks
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.job import Job
from ptune_dist.run.log import read_metrics


def probe_job(build_job: Callable[..., Job], probe: Probe, jobs: list[Job]) -> Callable[..., Job]:
    """`build_job` that tells `probe` when the job is built and when its engine has stepped, and notes it in `jobs`."""

    def build(*args, **kwargs) -> Job:
        job = build_job(*args, **kwargs)
        jobs.append(job)
        engine_step = job.engine.step

        def step(learning_rates: dict[str, float]) -> dict[str, str]:
            faults = engine_step(learning_rates)
            probe.step_done()
            return faults

        job.engine.step = step
        probe.base_loaded()
        return job

    return build


def read_steps(run_dir: Path) -> tuple[list[float], list[int], list[int]]:
    """Loss, rows and real tokens of every step, from the run's metrics.jsonl."""
    losses, rows, tokens, before = [], [], [], 0.0
    for line in read_metrics(run_dir):
        step_s, before = line["time_s"] - before, line["time_s"]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--warm-up-steps", type=int, default=NUM_WARM_UP_STEPS, help="steps that are not timed")
    parser.add_argument("--result", required=True)
    args = parser.parse_intermixed_args()
    probe, jobs = Probe(args.warm_up_steps), []
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
    dist.destroy_process_group()  # gloo's threads may end a process that leaves without with an abort
    return status


def count_work(job: Job, result: dict) -> dict:
    """Useful work per second and its share of what plain matrix products reach. Collective: every rank must call."""
    examples = build_split(job.config.data, job.tokenizer, which="train").examples
    flops = useful_flops(
        job.engine.model.base, examples.lengths.tolist(), examples.num_targets.tolist(),
        num_virtual=job.config.prompt.num_virtual_tokens, recomputes=job.engine.recomputer is not None,
    )  # fmt: skip
    return share_of_peak(job.engine.model.base, flops / int(examples.lengths.sum()) * result["tokens_per_s"])


if __name__ == "__main__":
    sys.exit(main())
