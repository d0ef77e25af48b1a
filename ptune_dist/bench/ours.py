"""Our side of a benchmark: `ptune-dist train` with a probe on it, its figures as a result JSON.

    torchrun --nproc-per-node 2 -m ptune_dist.bench.ours CONFIG [key.path=value ...] --result FILE

The run is `train` itself, metrics and TensorBoard included; the probe notes when the base is loaded and when the engine
has stepped. Evaluation and checkpoints are the config's to leave out.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ptune_dist import train as loop
from ptune_dist.bench.probe import NUM_WARM_UP_STEPS, Probe, steady_figures, write_result
from ptune_dist.config import Config, load_config
from ptune_dist.distributed import World, init_distributed, max_over_ranks, sum_over_ranks
from ptune_dist.errors import RunFault, UserError
from ptune_dist.job import Job
from ptune_dist.metrics import read_metrics


def probe_job(build_job: Callable[..., Job], probe: Probe) -> Callable[..., Job]:
    """`build_job` that tells `probe` when the job is built and when its engine has stepped."""

    def build(*args, **kwargs) -> Job:
        job = build_job(*args, **kwargs)
        engine_step = job.engine.step

        def step(learning_rate: float) -> float:
            norm = engine_step(learning_rate)
            probe.step_done()
            return norm

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
    if len(losses) > NUM_WARM_UP_STEPS:
        window_s, cpu_s = probe.window()
        result |= steady_figures(window_s, sum_over_ranks([cpu_s], world)[0], rows, tokens)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--result", required=True)
    args = parser.parse_intermixed_args()
    probe = Probe()
    loop.build_job = probe_job(loop.build_job, probe)
    try:
        config = load_config(args.config, args.overrides)
        status = loop.train(config)
    except (UserError, RunFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    world = init_distributed()
    result = build_result(config, probe, world)
    if world.is_main:
        write_result(args.result, result)
    return status


if __name__ == "__main__":
    sys.exit(main())
