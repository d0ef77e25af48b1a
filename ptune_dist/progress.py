"""Where a run stands, and its way into and out of checkpoints.

Floor 5.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ptune_dist.checkpoint import Snapshot, load_newest_checkpoint, save_checkpoint
from ptune_dist.data.build import Split
from ptune_dist.distributed import World
from ptune_dist.errors import RunFault, UserError
from ptune_dist.job import Job, prompt_facts, together
from ptune_dist.prompts.store import save_prompt


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
