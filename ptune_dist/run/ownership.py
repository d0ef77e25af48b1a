"""Which files of a folder a run has written, so that none of the user's own is replaced by one of a run's."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from ptune_dist.common.files import explain
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError

# First line of a run's config.yaml. Runs of earlier versions have none: theirs is known by having all of OLD_KEYS.
MARK = "# Written by ptune-dist: the resolved config of the run in this folder.\n"
OLD_KEYS = {
    *("output_dir", "seed", "model", "prompt", "data", "train", "evaluate", "checkpoint", "deepspeed", "sweep"),
    "sweep_halving",
}
CHECKPOINT = re.compile(r"step-\d{8}")
# What a run replaces. It only adds to others (train.log, logs/, stacks/, tensorboard/), which may be there already.
REPLACED_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "status.json",
    "evaluations.jsonl",
    "evaluation.json",
    "baselines.json",
    "predictions.jsonl",
    "report.html",
    "micro_batch.json",
    "split.json",
    "skipped_rows.jsonl",
    "trackers.json",
)
REPLACED_FOLDERS = ("checkpoints", "prompt", "members")
PARTS_OF_A_RUN = (
    *REPLACED_FILES,
    *REPLACED_FOLDERS,
    "tensorboard",
    "stacks",
    "launchers",
    "nodes",
    "wandb",
    "train.log",
    ".lock",
)
BESIDE_CONFIG = (".lock", "status.json", "metrics.jsonl", "checkpoints", "prompt", "summary.json")
STATES = ("starting", "running", "waiting", "stopped", "failed", "done")  # of status.json
# Folders that are something else, by a file or folder in them.
OTHER_FOLDERS = {
    ".git": "a checkout of a repository",
    "dataset_info.json": "a data set",
    "dataset_dict.json": "a data set",
    "adapter_config.json": "a PEFT adapter",
    "tokenizer_config.json": "a model",
    "model.safetensors": "a model",
    "model.safetensors.index.json": "a model",
    "prompt.safetensors": "the prompt of a run",
}


def check_own_files(run_dir: Path) -> None:
    """Raise UserError where a run in the folder would replace files that no run has written, or is in a wrong place.

    A folder with files that a run never replaces, such as logs, is accepted, as are those of a run that was killed at
    any moment.
    """
    try:
        if not run_dir.is_dir() or is_run(run_dir):
            return
        foreign = find_foreign(run_dir)
        what = next((OTHER_FOLDERS[name] for name in OTHER_FOLDERS if os.path.lexists(run_dir / name)), "")
    except OSError as error:
        raise UserError(f"output_dir: {run_dir}: {explain(error)}") from None
    remedy = f"choose another output_dir, such as {run_dir / 'run'}"
    if foreign:
        raise UserError(
            f"output_dir: {run_dir} holds {foreign}, which no run has written there, and a run would replace it: "
            f"{remedy}"
        )
    if what:
        raise UserError(f"output_dir: {run_dir} is {what}, and a run would write among its files: {remedy}")


def is_run(folder: Path) -> bool:
    """Whether a run has written the folder's checkpoints, or its config.yaml and a file beside it."""
    checkpoints = folder / "checkpoints"
    with contextlib.suppress(PermissionError):  # where the run is resumed it tells so
        if checkpoints.is_dir() and any(is_checkpoint(path) for path in checkpoints.iterdir()):
            return True
    return is_run_config(folder / "config.yaml") and any((folder / name).exists() for name in BESIDE_CONFIG)


def is_checkpoint(path: Path) -> bool:
    return bool(CHECKPOINT.fullmatch(path.name)) and (path / "state.json").exists()


def is_run_config(file: Path) -> bool:
    """Whether a run has written a config.yaml, in this folder or another. Raises PermissionError."""
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith(MARK):
            return True
        content = yaml.safe_load(text)
    except PermissionError:
        raise
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and set(content) >= OLD_KEYS


def find_foreign(folder: Path) -> str:
    """The first file or folder that a new run would replace; "" without one. A launcher may have left status.json."""
    for name in REPLACED_FILES:
        path = folder / name
        if os.path.lexists(path) and not (name == "status.json" and is_status(path)):
            return name
    for name in REPLACED_FOLDERS:  # what is no folder there is refused when the folder is locked
        path = folder / name
        if path.is_dir() and any(path.iterdir()):
            return f"{name}/"
    return ""


def is_status(path: Path) -> bool:
    """Whether a file is the status.json of a run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("state") in STATES


def check_target(key: str, path: Path, config: Config, inputs: dict[str, Any], *, makes_folder: bool = False) -> None:
    """Raise UserError where a command would write `path`, given as `key`, into a run's own files or what it reads.

    Only new folders may be made among the files of a base; what stands in folders of its own is checked by itself.
    `inputs`: files and folders that are read beside those of `config`, by the key that names them; None for none.
    """
    target = Path(os.path.realpath(path))
    read = {
        **inputs,
        "model.path": config.model.path,
        "deepspeed": config.deepspeed if isinstance(config.deepspeed, str) else None,
    }
    sources = list(read.items())
    sources += [("data.train", source) for source in config.data.train_sources]
    sources += [("data.validation", source) for source in config.data.validation_sources]
    started_from = config.prompt.init_file
    files = started_from if isinstance(started_from, list) else [started_from]
    sources += [("prompt.init_file", file) for file in files]
    for name, source in sources:
        if source and not os.path.exists(source):  # FOLDER:SPLIT of a saved data set
            source = source.rpartition(":")[0]
        if not source or not os.path.exists(source):
            continue
        place = Path(os.path.realpath(source))
        if target == place or (target.exists() and target.samefile(place)):
            kind = "folder" if place.is_dir() else "file"
            raise UserError(f"{key}: {path} is the {kind} of {name}: choose another one")
        if target.parent == place and not is_run(place) and (target.is_file() or not makes_folder):
            raise UserError(f"{key}: {path} is inside {name}: choose another place")
    for folder in target.parents:
        first = target.relative_to(folder).parts[0]
        if first in PARTS_OF_A_RUN and is_run(folder):
            raise UserError(f"{key}: {path} is a part of the run in {folder}: choose another name")
