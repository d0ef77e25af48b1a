"""`train` and `evaluate` from Python."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptune_dist.api.configs import ConfigSource, Overrides, load_config, to_words
from ptune_dist.api.session import process_group
from ptune_dist.config.schema import Config

if TYPE_CHECKING:
    from ptune_dist.run.metrics_log import Listener

STOPPED = 75  # the loop's status where it was asked to stop, and has saved


def train(config: Config | ConfigSource, *, on_metrics: "Listener | None" = None) -> dict[str, Any]:
    """Train the prompts that a config asks for, or resume their run; returns the run's summary (`summary.json`).

    config: from `load_config`, or what that takes. on_metrics: called in this process with a step and the numbers
    of it, named as in TensorBoard: "train/loss", "validation/accuracy" (of a member of a sweep,
    "validation/accuracy/MEMBER"). An error that it raises ends the run; the next call resumes it.

    Raises UserError for a mistake, RunFault for a fault, and KeyboardInterrupt where the run was interrupted: between
    two steps, after saving; the same call resumes it. Under torchrun every rank must call.
    """
    from ptune_dist.loop import train as run
    from ptune_dist.run.folder import read_summary

    if not isinstance(config, Config):
        config = load_config(config)
    with process_group():
        status = run(without_timer(config), on_metrics)
    if status == STOPPED:
        raise KeyboardInterrupt(f"stopped after saving; train the same config again to resume {config.output_dir}")
    return read_summary(Path(config.output_dir)) or {}


def without_timer(config: Config) -> Config:
    """The config without the timer that ends the whole process where a step hangs: it is the user's own process."""
    return config.model_copy(update={"train": config.train.model_copy(update={"hang_timeout_s": 0})})


def evaluate(
    run: str | Path, overrides: Overrides = (), *, member: str | None = None, output: str | Path | None = None
) -> dict[str, Any]:
    """Evaluate a run's prompt on `data.validation`, as `ptune-dist evaluate` does; returns evaluation.json.

    overrides: other rows or metrics (`{"data.validation": "test.jsonl"}`). member: of a sweep; the best-ranked one
    where left out. output: a file for each row with what was answered. Raises UserError. Under torchrun every rank must
    call.
    """
    from ptune_dist.commands import evaluate_run
    from ptune_dist.run.folder import find_member_dir, read_run_config
    from ptune_dist.run.resolve import resolve

    run_dir = find_member_dir(Path(run), member)
    config = read_run_config(run_dir, to_words(overrides), resolve=resolve)
    with process_group():
        return evaluate_run(config, run_dir, Path(output) if output else None, is_shown=False)
