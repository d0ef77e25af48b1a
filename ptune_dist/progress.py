"""Where a run stands, and its way into and out of checkpoints.

Floor 5.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ptune_dist.checkpoint import Snapshot, load_newest_checkpoint, save_checkpoint
from ptune_dist.config import HIGHER_IS_BETTER
from ptune_dist.data.build import Split
from ptune_dist.distributed import World
from ptune_dist.errors import RunFault, UserError
from ptune_dist.job import Job, prompt_facts, together
from ptune_dist.metrics import StepCount, Throughput
from ptune_dist.prompts.store import save_prompt


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside tensors."""

    step: int = 0
    elapsed_s: float = 0.0  # in training steps
    wall_s: float = 0.0  # in all, evaluations and checkpoints included
    evaluation_pending: bool = True  # due at `step` and not done
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best prompt
    best_step: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)  # input, wanted, untrained answer, best prompt's answer
    num_worse: int = 0  # evaluations since the best
    train_loss: float = math.nan
    data_digest: str = ""
    throughput: Throughput = field(default_factory=Throughput)  # this process's alone

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "throughput"}

    def count_step(self, loss: float, count: StepCount) -> None:
        """One more step done."""
        self.step, self.train_loss = self.step + 1, loss
        self.elapsed_s += count.seconds
        self.throughput.count(count)
        self.wall_s += self.throughput.lap()

    def count_evaluation(self, found: dict[str, float], samples: list[dict[str, str]], name: str) -> bool:
        """Take in an evaluation; True where `step`'s prompt is the best so far by metric `name`, then by loss."""
        self.evaluation_pending = False
        if self.step == 0:
            self.before = found
            self.samples = [
                {"input": s["input"], "wanted": s["wanted"], "untrained": s["answer"], "trained": ""} for s in samples
            ]
            return False
        if name in self.best and rank_evaluation(found, name) <= rank_evaluation(self.best, name):
            self.num_worse += 1
            return False
        self.best, self.best_step, self.num_worse = found, self.step, 0
        for kept, sample in zip(self.samples, samples, strict=False):  # their number may change on resume
            kept["trained"] = sample["answer"]
        return True


def rank_evaluation(found: dict[str, float], name: str) -> tuple[float, float]:
    """Larger is better."""
    return (found[name] if HIGHER_IS_BETTER[name] else -found[name], -found["loss"])


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
            "progress": progress.state(),
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
