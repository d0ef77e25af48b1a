"""The progress of a run and of each member, which is saved in checkpoints and restored from them."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptune_dist.common.files import explain
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, from_main, write
from ptune_dist.errors import RunFault, UserError
from ptune_dist.metrics import METRICS
from ptune_dist.prompts.store import save_prompt
from ptune_dist.run.checkpoint import Snapshot, load_newest_checkpoint, save_checkpoint
from ptune_dist.run.folder import check_in_place
from ptune_dist.run.job import Job
from ptune_dist.run.stored_prompt import prompt_facts, prompt_tensors
from ptune_dist.run.throughput import StepCount, Throughput

NUM_RECENT = 20  # steps of a mean training loss


@dataclass
class Standing:
    """Where one member stands."""

    train_loss: float = math.nan  # of the last step
    recent_losses: list[float] = field(default_factory=list)  # of the last NUM_RECENT steps
    first_losses: list[float] = field(default_factory=list)  # of the first NUM_RECENT; none where not all are known
    without_prompt: dict[str, float] = field(default_factory=dict)  # metrics of the base alone, with the template
    before: dict[str, float] = field(default_factory=dict)  # of the untrained prompt
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best prompt
    best_step: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)  # input, wanted, untrained answer, best prompt's answer
    num_worse: int = 0  # evaluations since the best
    ended: str = ""  # why it was stopped while others continue; empty while it trains
    ended_step: int = 0
    is_faulty: bool = False  # ended by what was not a number

    @property
    def recent_loss(self) -> float:
        """The mean training loss of the last steps; NaN before the first one."""
        return sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else math.nan

    def end(self, reason: str, step: int, *, is_faulty: bool = False) -> None:
        self.ended = reason
        self.ended_step = step
        self.is_faulty = is_faulty

    def count_evaluation(self, found: dict[str, float], samples: list[dict[str, str]], name: str, step: int) -> bool:
        """Take in an evaluation; True where `step`'s prompt is the best so far by metric `name`, then by loss."""
        if step == 0:
            self.before = found
            self.samples = [
                {"input": s["input"], "wanted": s["wanted"], "untrained": s["answer"], "trained": ""} for s in samples
            ]
            return False
        self.last = found
        if name in self.best and rank_evaluation(found, name) <= rank_evaluation(self.best, name):
            self.num_worse += 1
            return False
        self.best = found
        self.best_step = step
        self.num_worse = 0
        for i, sample in enumerate(samples):
            if i == len(self.samples):  # more than before training: their number may change on resume
                self.samples.append({"input": sample["input"], "wanted": sample["wanted"], "untrained": ""})
            self.samples[i]["trained"] = sample["answer"]
        return True


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside tensors."""

    members: dict[str, Standing]
    step: int = 0
    elapsed_s: float = 0.0  # in training steps
    wall_s: float = 0.0  # in all, evaluations and checkpoints included
    evaluation_pending: bool = True  # due at `step` and not done
    data_digest: str = ""
    throughput: Throughput = field(default_factory=Throughput)  # this process's alone
    saved_step: int = -1  # of the newest checkpoint, this process's alone

    @property
    def live(self) -> list[str]:
        """Members that still train."""
        return [name for name, standing in self.members.items() if not standing.ended]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {key: value for key, value in vars(self).items() if key not in ("throughput", "saved_step", "members")}
        return kept | {"members": {name: asdict(standing) for name, standing in self.members.items()}}

    def take_over(self, other: "Progress") -> None:
        """Be where another process is."""
        self.members = other.members
        for name in ("step", "elapsed_s", "wall_s", "evaluation_pending", "saved_step"):
            setattr(self, name, getattr(other, name))

    def count_step(self, losses: dict[str, float], count: StepCount) -> None:
        """One more step done, with the loss of each member that took part."""
        self.step += 1
        for name, loss in losses.items():
            if math.isfinite(loss):
                standing = self.members[name]
                standing.train_loss = loss
                standing.recent_losses = [*standing.recent_losses, loss][-NUM_RECENT:]
                if len(standing.first_losses) == self.step - 1 < NUM_RECENT:
                    standing.first_losses = [*standing.first_losses, loss]
        self.elapsed_s += count.seconds
        self.throughput.count(count)
        self.wall_s += self.throughput.lap()


def rank_evaluation(found: dict[str, float], name: str) -> tuple[float, float]:
    """Larger is better; an evaluation from before a metric was added, on resume, is the worst by it."""
    if name not in found:
        return (-math.inf, -found["loss"])
    return (found[name] if METRICS[name].higher_is_better else -found[name], -found["loss"])


def rank_members(progress: Progress, name: str) -> list[str]:
    """Members, the best first: by metric `name` of their best prompts, without one by the loss in training.

    Without an evaluated prompt, one that a fault has ended comes last.
    """

    def key(member: str) -> tuple:
        standing = progress.members[member]
        if standing.best:
            return (0, *(-value for value in rank_evaluation(standing.best, name)))
        has_loss = math.isfinite(standing.train_loss)
        return (2 if standing.is_faulty else 1, standing.train_loss if has_loss else math.inf, 0.0)

    return sorted(progress.members, key=key)


def restore(job: Job, rows: TrainingRows, world: World) -> Progress:
    """Continue from the newest sound checkpoint, or begin. Collective: every rank must call. Raises UserError."""
    folder = Path(job.config.output_dir) / "checkpoints"
    snapshot = from_main(
        world, lambda: load_newest_checkpoint(folder, lambda text: print(f"warning: {text}", flush=True))
    )
    if snapshot is None:
        return Progress({name: Standing() for name in job.members}, data_digest=rows.digest())
    return continue_from(snapshot, job, rows, saved_step=snapshot.step)


def continue_from(snapshot: Snapshot, job: Job, rows: TrainingRows, *, saved_step: int = -1) -> Progress:
    """Take over the state of a run. Raises UserError where it is not that of these rows and this base."""
    config = job.config
    kept = dict(snapshot.state["progress"])
    if "members" not in kept:
        folder = Path(config.output_dir) / "checkpoints"
        raise UserError(f"{folder}: these checkpoints are of an earlier version: choose another output_dir")
    members = {name: Standing(**standing) for name, standing in kept.pop("members").items()}
    progress = Progress(members, **kept, saved_step=saved_step)
    if progress.data_digest != rows.digest():
        raise UserError(f"data.train: {rows.names[0]} has changed since this run began: choose another output_dir")
    if snapshot.state["base"] != job.fingerprint:
        raise UserError(f"model.path: {config.model.path} has changed since this run began: choose another output_dir")
    job.engine.load_prompts({name: tensors_of(name, snapshot.prompt) for name in job.members})
    job.engine.load_optimizer_state(snapshot.optimizer)
    job.engine.load_loss_scale_state(snapshot.state["loss_scale"])
    return progress


def tensors_of(member: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A member's own tensors of all members', which are named `MEMBER/TENSOR`."""
    prefix = f"{member}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def take_snapshot(job: Job, progress: Progress) -> Snapshot:
    """Everything that another process needs to continue from here."""
    engine = job.engine
    return Snapshot(
        step=progress.step,
        prompt={f"{name}/{key}": t for name in job.members for key, t in engine.prompt_tensors(name).items()},
        optimizer=engine.optimizer_state(),
        state={
            "progress": progress.state(),
            "base": job.fingerprint,
            "loss_scale": engine.loss_scale_state(),
        },
    )


def checkpoint(job: Job, progress: Progress, world: World) -> None:
    """Save the run's place, unless its step is saved already. Collective: every rank must call."""
    if progress.saved_step == progress.step:
        return
    snapshot = take_snapshot(job, progress)
    run_dir = Path(job.config.output_dir)

    def save() -> None:
        check_in_place(run_dir)
        save_checkpoint(
            run_dir / "checkpoints",
            snapshot,
            keep=job.config.checkpoint.keep,
            may_be_late=job.config.train.nodes == "replicas",
        )

    write(world, save)
    progress.saved_step = progress.step


def store_prompt(job: Job, member: str, progress: Progress, world: World) -> None:
    """Write a member's `prompt/`. Collective: every rank must call."""
    facts = prompt_facts(job, member, step=progress.step, metrics=progress.members[member].best)
    folder = Path(job.members[member].output_dir) / "prompt"
    tensors = prompt_tensors(job, member)

    def save() -> None:
        check_in_place(Path(job.config.output_dir))
        try:
            save_prompt(folder, tensors, facts)
        except OSError as error:
            kept = "; the one before it is kept" if (folder / "prompt.safetensors").exists() else ""
            raise RunFault(f"cannot save the prompt: {folder}: {explain(error, folder)}{kept}") from None

    write(world, save)
