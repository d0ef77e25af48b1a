"""At the end of a run: the mean of the last checkpoints' prompts, kept where it is better on validation."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ptune_dist.distributed.world import World, from_main
from ptune_dist.evaluation.during_training import store_predictions
from ptune_dist.evaluation.evaluator import Evaluator
from ptune_dist.run.checkpoint import load_checkpoint
from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.job import Job
from ptune_dist.run.progress import Progress, rank_evaluation, store_prompt, tensors_of


def keep_average(
    job: Job, evaluators: dict[str, Evaluator], progress: Progress, world: World, say: Callable[[str], None]
) -> dict[str, Any]:
    """What `train.average_last` asks for; the metrics of each member's mean, by member. Collective.

    The members' prompts are those of the mean afterwards.
    """
    count = job.config.train.average_last
    if not count:
        return {}
    folder = Path(job.config.output_dir) / "checkpoints"
    mean = from_main(world, lambda: average(list_checkpoints(folder)[-count:]))
    names = [name for name in progress.live if name in evaluators]
    if mean is None or not names:
        return {}
    job.engine.load_prompts({name: tensors_of(name, mean) for name in job.members})
    found: dict[str, Any] = {}
    for evaluator in {id(own): own for own in evaluators.values()}.values():
        own = [name for name in names if evaluators[name] is evaluator]
        for name, (values, samples, answers) in (evaluator(job.engine, own) if own else {}).items():
            is_better = improves(job, progress, name, values)
            shown = "  ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            of_member = f"  {name}" if job.config.sweep else ""
            say(
                f"mean of the last {count} checkpoints  validation  {shown}{of_member}{'  (kept)' if is_better else ''}"
            )
            found[name] = {"checkpoints": count, "is_kept": is_better, **values}
            if is_better:
                progress.members[name].count_evaluation(values, samples, job.config.evaluate.best, progress.step)
                store_prompt(job, name, progress, world)
                store_predictions(job, name, evaluator, answers, world)
    return found


def improves(job: Job, progress: Progress, name: str, values: dict[str, float]) -> bool:
    """Whether a member's prompt is better than its best so far, by the metric that the run keeps prompts by."""
    metric = job.config.evaluate.best
    best = progress.members[name].best
    return not best or rank_evaluation(values, metric) > rank_evaluation(best, metric)


def average(checkpoints: list[Path]) -> dict[str, torch.Tensor] | None:
    """The mean of the prompts of checkpoints, in float64 on the way; None where fewer than two can be read.

    What is not a real number is that of the last one.
    """
    loaded = []
    for folder in checkpoints:
        with contextlib.suppress(ValueError):  # damaged
            loaded.append(load_checkpoint(folder).prompt)
    if len(loaded) < 2:
        return None
    last = loaded[-1]
    return {
        name: torch.stack([own[name].double() for own in loaded]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in last.items()
    }
