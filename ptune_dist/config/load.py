"""YAML and `key.path=value` overrides in, one validated `Config` out; and the resolved config as YAML again."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ptune_dist.config.data_section import list_sources
from ptune_dist.config.deepspeed_json import find_preset
from ptune_dist.config.messages import (
    MAX_MESSAGE,
    describe_first_error,
    describe_validation_error,
    find_key,
    name_place,
    text_keys,
)
from ptune_dist.config.schema import Config
from ptune_dist.config.shipped import find_recipe, find_shipped
from ptune_dist.config.sweep import map_paths, render_members, sweep_keys, validate_member
from ptune_dist.config.yaml_file import apply_override, read_yaml
from ptune_dist.errors import UserError

Resolve = Callable[[Config], Config]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, resolve: Resolve | None = None) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, validate.

    Relative paths of files are looked up from the current folder, then from the config's own, then by name among the
    files that come with the package; those found are made absolute, so that a run can be evaluated from anywhere. Every
    member of a sweep is validated too.

    resolve: checks what this package cannot know (names of methods, objectives and metrics, and the options of a
    method), for the config and for each member of a sweep. It returns the config with the method's defaults filled in,
    and must return that one unchanged when it is resolved again; it raises ValueError with a message of one line that
    begins with the key, or with "unknown key" and the key.

    Raises UserError naming the file and the key.
    """
    path = find_recipe(path)
    texts = text_keys()
    raw = read_yaml(path, texts)
    for override in overrides:
        apply_override(raw, override, texts)
    for name in ("model", "prompt", "data", "train", "evaluate", "checkpoint"):  # all keys of it may be comments
        if name in raw and raw[name] is None:
            del raw[name]
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, path, overrides)) from None
    config = resolve_paths(config, Path(path).resolve().parent)
    paths = [("model.path", config.model.path), *(("data.train", source) for source in config.data.train_sources)]
    for key, value in paths:
        if not value.strip():
            raise UserError(f"{name_place(key, path, overrides)}: {key}: a path or a name is needed, and it is empty")
    wrong = describe_wrong_folder(config)
    if wrong:
        raise UserError(f"{name_place('output_dir', path, overrides)}: output_dir: {wrong}")
    key, wrong = describe_wrong_revision(config)
    if wrong:
        raise UserError(f"{name_place(key, path, overrides)}: {key} {wrong}")
    config = pin_base(config)
    try:
        resolved = resolve_outside_sweep(config, resolve) if resolve else config
    except ValueError as error:
        what = str(error)[:MAX_MESSAGE]
        raise UserError(f"{name_place(find_key(what), path, overrides)}: {what}") from None
    check_members(resolved, name_place("sweep", path, overrides), resolve)
    return resolved


def resolve_outside_sweep(config: Config, resolve: Resolve) -> Config:
    """A config with its method's defaults filled in; of a sweep without those that belong to its members."""
    resolved = resolve(config)
    if not config.sweep:
        return resolved
    # Members may have other methods, which have other options and start in other ways.
    start = {} if "prompt.method" in sweep_keys(config.sweep) else {"init": resolved.prompt.init}
    return resolved.model_copy(update={"prompt": config.prompt.model_copy(update=start)})


def check_members(config: Config, place: str, resolve: Resolve | None = None) -> None:
    """Raise UserError, beginning with `place`, unless every member of the sweep is a config of its own."""
    names: dict[str, str] = {}
    for name, raw in render_members(config).items():
        try:
            member = validate_member(config, name, raw)
            member = resolve(member) if resolve else member
        except ValidationError as error:
            raise UserError(f"{place}: sweep: {name}: {describe_first_error(error)[1]}") from None
        except ValueError as error:
            raise UserError(f"{place}: sweep: {name}: {error}") from None
        if config.sweep_halving and not member.data.validation:
            raise UserError(f"{place}: sweep: {name}: sweep_halving needs data.validation")
        same = names.setdefault(member.model_dump_json(exclude={"output_dir"}), name)
        if same != name:
            raise UserError(f"{place}: sweep: {same} and {name} are the same member, leave one out")


def resolve_paths(config: Config, config_dir: Path) -> Config:
    """Make the paths of files and folders that exist absolute; other names (a hub's, say) stay as they are."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if not isinstance(value, str) or not value.strip():
            return value
        value = os.path.expanduser(value)
        name, colon, split = value.rpartition(":") if ":" in value else (value, "", "")  # a saved folder's FOLDER:SPLIT
        for folder in (Path.cwd(), config_dir):
            if os.path.exists(folder / value):
                return os.path.abspath(folder / value)
            if colon and os.path.isdir(folder / name):
                return os.path.abspath(folder / name) + colon + split
        return find_shipped(value)

    def expand(value: Any) -> Any:
        """As `resolve`, with the files that a pattern names in place of it."""
        if isinstance(value, list):
            return [path for item in value for path in list_sources(expand(item))]
        found = resolve(value)
        if not isinstance(found, str) or os.path.exists(found) or not glob.has_magic(found):
            return found
        for folder in (Path.cwd(), config_dir):
            files = sorted(glob.glob(str(folder / found), recursive=True))
            if files:
                return [os.path.abspath(file) for file in files]
        return found

    tasks = config.data.tasks
    if isinstance(tasks, dict):
        tasks = {
            name: files.model_copy(update={"train": resolve(files.train), "validation": resolve(files.validation)})
            for name, files in tasks.items()
        }
    cache_dir = config.train.context_cache_dir
    if cache_dir:  # a run makes it
        cache_dir = os.path.abspath(os.path.expanduser(cache_dir))
    return config.model_copy(
        update={
            "output_dir": os.path.expanduser(config.output_dir),
            "model": config.model.model_copy(update={"path": resolve(config.model.path)}),
            "prompt": config.prompt.model_copy(update={"init_file": resolve(config.prompt.init_file)}),
            "data": config.data.model_copy(
                update={
                    "train": expand(config.data.train),
                    "validation": expand(config.data.validation),
                    "tasks": tasks,
                }
            ),
            "train": config.train.model_copy(update={"context_cache_dir": cache_dir}),
            "deepspeed": find_preset(resolve(config.deepspeed)),
            "sweep": map_paths(config.sweep, expand),
        }
    )


def describe_wrong_folder(config: Config) -> str:
    """Why `output_dir`, with its paths resolved, is no folder for a run; empty where it is one."""
    given = config.output_dir
    if not given.strip():
        return "a folder is needed, such as runs/first"
    folder = os.path.abspath(given)
    if os.path.normpath(given) in (".", "..") or folder == "/" or folder == os.path.expanduser("~"):
        return f"{given} is no folder of a run's own: choose one, such as runs/first"
    if os.path.isfile(folder):
        return f"{given} is a file, and a folder is needed"
    model = os.path.abspath(config.model.path)
    if os.path.isdir(model) and os.path.commonpath([folder, model]) == model:
        return f"{given} is model.path or inside it, and a run would write among the base's files: choose another"
    sources = [("data.train", source) for source in config.data.train_sources]
    sources += [("data.validation", source) for source in config.data.validation_sources]
    for key, data in sources:
        if data and os.path.isdir(data) and os.path.commonpath([folder, os.path.abspath(data)]) == data:
            return f"{given} is {key} or inside it, and a run would write among the rows: choose another"
    return ""


def describe_wrong_revision(config: Config) -> tuple[str, str]:
    """The key of a revision that pins nothing, and why, with the paths resolved; two empty texts where all is well."""
    if config.model.revision and os.path.exists(config.model.path):
        return "model.revision", "is for a name on the hub, and model.path is a folder: leave it out or set it to null"
    if config.data.revision is None:
        return "", ""
    data = config.data
    sources = [*data.train_sources, *data.validation_sources]
    if isinstance(data.tasks, dict):
        sources = [file for files in data.tasks.values() for file in (files.train, files.validation) if file]
    names = sorted({re.split("[@:]", source)[0] for source in sources if not os.path.isabs(source)})
    if not names:
        return "data.revision", "is for a dataset on the hub, and the rows are files here: leave it out"
    if len(names) > 1:
        return "data.revision", f"pins one dataset, and there are {', '.join(names)}: leave it out"
    return "", ""


def pin_base(config: Config) -> Config:
    """`model.path` as `NAME@REVISION`, which all that reads a base understands."""
    model = config.model
    if not model.revision or model.path.endswith(f"@{model.revision}"):
        return config
    return config.model_copy(update={"model": model.model_copy(update={"path": f"{model.path}@{model.revision}"})})


def render_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
