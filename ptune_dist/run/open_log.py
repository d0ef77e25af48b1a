"""The log of a run, opened for the steps that are still to come."""

import functools
from pathlib import Path
from typing import Any

from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.config.schema import Config
from ptune_dist.distributed.world import World
from ptune_dist.run.eta import Eta
from ptune_dist.run.job import Job
from ptune_dist.run.metrics_log import MetricsWriter
from ptune_dist.run.progress import Progress
from ptune_dist.run.shared_pen import Log, SharedLog, SharedPen


def open_metrics(job: Job, progress: Progress, world: World) -> Log:
    """The run's log, for rank 0. Raises RunFault."""
    if isinstance(world.pen, SharedPen):
        eta = Eta(job.config.train.max_steps, job.config.evaluate.every_steps)
        return SharedLog(functools.partial(open_from, job), world.pen, progress.step + 1, eta)
    return open_from(job, progress.step + 1)


def open_from(job: Job, first_step: int) -> MetricsWriter:
    """Raises RunFault."""
    folder = Path(job.config.output_dir)
    members = {}
    if job.config.sweep:
        members = {name: Path(member.output_dir) for name, member in job.members.items()}
    with fault_on_failed_write(folder):
        return MetricsWriter(
            folder,
            max_steps=job.config.train.max_steps,
            first_step=first_step,
            members=members,
            evaluate_every=job.config.evaluate.every_steps,
            log_every=job.config.train.log_every,
            report_to=job.config.train.report_to,
            settings={name if members else "": describe_settings(own) for name, own in job.members.items()},
        )


def describe_settings(config: Config) -> dict[str, Any]:
    """TensorBoard's hyperparameters of one prompt."""
    found = {
        **{key: getattr(config.train, key) for key in ("learning_rate", "batch_size", "max_steps", "schedule")},
        **{key: getattr(config.prompt, key, None) for key in ("method", "placement", "num_virtual_tokens")},
        "seed": config.seed,
        "model": config.model.path,
    }
    return {key: value for key, value in found.items() if isinstance(value, (bool, int, float, str))}
