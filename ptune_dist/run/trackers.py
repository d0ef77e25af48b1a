"""Experiment trackers (Weights & Biases, MLflow, ...) through those of accelerate; off unless a config asks."""

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptune_dist.common.files import replace_file
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
IDS = "trackers.json"  # in a run's folder: the run in each service that it continues when it is resumed
NOT_IN_MLFLOW = re.compile(r"[^\w\-. :/]")  # such as in members' names


@dataclass(frozen=True)
class Naming:
    """How a service is told a run's name, and how it continues a run. Others get a new run each time.

    key: the argument for the name. find_id: of the opened run. resume: the arguments for the run of an id.
    """

    key: str
    find_id: Callable[[Any], str]
    resume: Callable[[str], dict[str, str]]


NAMINGS = {
    "wandb": Naming("name", lambda run: run.id, lambda found: {"id": found, "resume": "allow"}),
    "mlflow": Naming("run_name", lambda run: run.info.run_id, lambda found: {"run_id": found}),
    "trackio": Naming("name", lambda run: run.name, lambda found: {"name": found, "resume": "allow"}),
}


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
        self._run_dir = run_dir.absolute()
        for name in names:
            if name != ALWAYS:
                self._attempt(name, lambda name=name: self._open(name, settings))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            own = values
            if name == "mlflow":
                own = {NOT_IN_MLFLOW.sub(":", key): value for key, value in values.items()}
            self._attempt(name, lambda tracker=tracker, own=own: tracker.log(own, step=step))

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.finish)

    def _open(self, name: str, settings: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        ids = read_ids(self._run_dir)
        folder = [str(self._run_dir / name)] if kind.requires_logging_directory else []
        tracker = kind(PROJECT, *folder, **choose_options(name, self._run_dir, ids))
        tracker.start()
        if name not in ids:  # some refuse a setting that has changed
            tracker.store_init_configuration(settings)
        self._trackers[name] = tracker
        if name in NAMINGS:
            ids[name] = NAMINGS[name].find_id(tracker.tracker)
            replace_file(self._run_dir / IDS, json.dumps(ids).encode())

    def _attempt(self, name: str, call: Callable[[], Any]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some greet
                call()
        except Exception as error:  # a service that is away must not cost a run
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: train.report_to: {name} is left out: {reason}", file=sys.stderr, flush=True)


def read_ids(run_dir: Path) -> dict[str, str]:
    """The ids of a run in services, by tracker."""
    file = run_dir / IDS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def choose_options(name: str, run_dir: Path, ids: dict[str, str]) -> dict[str, str]:
    """What accelerate's tracker is opened with: the name of the run's folder, and the run that is continued."""
    if name not in NAMINGS:
        return {}
    options = {NAMINGS[name].key: run_dir.name}
    if name in ids:
        options |= NAMINGS[name].resume(ids[name])
    if name == "wandb" and "WANDB_DIR" not in os.environ:
        options["dir"] = str(run_dir)  # and not wherever the command was started
    return options
