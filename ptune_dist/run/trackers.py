"""Experiment trackers (Weights & Biases, MLflow, ...) through those of accelerate; off unless a config asks."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptune_dist.errors import UserError

# The module that each of accelerate's trackers needs.
MODULES = {
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}
ALWAYS = "tensorboard"  # which every run writes by itself
PROJECT = "ptune_dist"


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is not installed."""
    for name in names:
        module = MODULES.get(name)
        if module is not None and importlib.util.find_spec(module) is None:
            raise UserError(f"train.report_to: {name} is not installed: pip install {module.replace('_', '-')}")


class Trackers:
    """The trackers of one run, on rank 0. A tracker that fails is left out from then on; training continues."""

    def __init__(self, names: list[str], run_dir: Path, settings: dict[str, Any]):
        self._trackers: dict[str, Any] = {}
        for name in names:
            if name != ALWAYS:
                self._attempt(name, lambda name=name: self._open(name, run_dir, settings))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, lambda tracker=tracker: tracker.log(values, step=step))

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.finish)

    def _open(self, name: str, run_dir: Path, settings: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = [str(run_dir / name)] if kind.requires_logging_directory else []
        tracker = kind(PROJECT, *folder)
        tracker.start()
        tracker.store_init_configuration(settings)
        self._trackers[name] = tracker

    def _attempt(self, name: str, call: Callable[[], Any]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some greet
                call()
        except Exception as error:  # a service that is away must not cost a run
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: train.report_to: {name} is left out: {reason}", file=sys.stderr, flush=True)
