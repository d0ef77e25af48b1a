"""What `methods_quality` runs: the plan in YAML, and the config of each of its runs."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ptune_dist.base.source import load_shape
from ptune_dist.bench.matrix import describe
from ptune_dist.config.schema import Section
from ptune_dist.config.sweep import list_members, name_members
from ptune_dist.config.yaml_file import read_yaml
from ptune_dist.errors import UserError
from ptune_dist.prompts import METHODS

INSTRUCTION = "{instruction}"
AT_EQUAL_TIME = " at equal time"  # in the names of results
NUM_TIMED_STEPS = 10  # two epochs: the second one is timed, and finds what a context cache has kept of the first


class Task(Section):
    """A task: the metric that is shown, the instruction that prompts start from, and sections of the run's config."""

    metric: str
    instruction: str
    data: dict[str, Any]
    evaluate: dict[str, Any] = {}
    train: dict[str, Any] = {}


class Part(Section):
    """Some cells of the tables."""

    kind: Literal["score", "bare", "time", "equal_time"] = "score"
    tasks: list[str]
    methods: list[str] = []
    seeds: list[int] = [0]
    cached: bool = False


class Plan(Section):
    """run: sections of every run's config. methods: dotted keys of each."""

    run: dict[str, dict[str, Any]]
    tasks: dict[str, Task]
    methods: dict[str, dict[str, Any]]
    parts: dict[str, Part]

    def num_steps(self, task: str) -> int:
        """The steps of a whole run over a task."""
        steps: int = (self.run["train"] | self.tasks[task].train)["max_steps"]
        return steps


@dataclass(frozen=True)
class Unit:
    """One run. cells: the name of each result, and the member that gives it; of a run without a sweep, ''."""

    task: str
    kind: str
    config: dict[str, Any]
    cells: dict[str, str]

    @property
    def digest(self) -> str:
        """Of the config, with the last part of the base's path: a result of another config does not count."""
        model = self.config["model"] | {"path": Path(self.config["model"]["path"]).name}
        text = json.dumps([self.kind, self.config | {"model": model}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_plan(path: Path) -> Plan:
    """Raises UserError that names the file and the key."""
    try:
        plan = Plan.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from None
    for name, part in plan.parts.items():
        for key, known in (("tasks", plan.tasks), ("methods", plan.methods)):
            for one in getattr(part, key):
                if one not in known:
                    raise UserError(f"{path}: parts.{name}.{key}: {one} is none of {', '.join(known)}")
    return plan


@dataclass(frozen=True)
class Builder:
    """Makes the configs of a plan's runs. base: a folder or a hub name; data: the folder of rows."""

    plan: Plan
    base: str
    data: Path

    def units(self, part: Part, steps_in_time: Callable[[str, str], int]) -> Iterator[Unit]:
        """The runs of a part, in order. steps_in_time: of a task and a method, the steps that equal time leaves it."""
        methods = part.methods
        for seed in part.seeds:
            for task in part.tasks:
                if part.kind == "bare":
                    yield self.bare(task)
                elif part.kind == "time":
                    for method in methods:
                        yield self.timed(task, method, is_cached=False)
                        if part.cached and any("layer" in key for key in self.plan.methods[method]):
                            yield self.timed(task, method, is_cached=True)
                elif part.kind == "equal_time":
                    for method in methods:
                        num_steps = steps_in_time(task, method)
                        if num_steps < self.plan.num_steps(task):  # the fastest one has its run of equal steps
                            yield self.shorter(task, method, seed, num_steps)
                else:
                    yield from self.scored(task, methods, seed)

    def scored(self, task: str, methods: list[str], seed: int) -> Iterator[Unit]:
        """One sweep of the prompts, and a run of each method that trains the base's own tensors."""
        alone = [name for name in methods if METHODS[self.plan.methods[name]["prompt.method"]].trains_base]
        bank = [name for name in methods if name not in alone]
        if bank:
            config = self.config(task)
            config["seed"] = seed
            config["sweep"] = [self.keys(task, name) for name in bank]
            members = name_members(list_members(config["sweep"]))
            yield Unit(
                task, "score", config, dict(zip((f"{task}/{name}/{seed}" for name in bank), members, strict=True))
            )
        for name in alone:
            config = self.config(task)
            put(config, self.keys(task, name) | {"seed": seed})
            yield Unit(task, "score", config, {f"{task}/{name}/{seed}": ""})

    def shorter(self, task: str, method: str, seed: int, num_steps: int) -> Unit:
        """A run of fewer steps, of one method alone."""
        config = self.config(task)
        put(config, self.keys(task, method) | {"seed": seed, "train.max_steps": num_steps})
        return Unit(task, "score", config, {f"{task}/{method}{AT_EQUAL_TIME}/{seed}": ""})

    def bare(self, task: str) -> Unit:
        """The base that reads the instruction as a part of the text. Its one step of training is for nothing."""
        config = self.config(task)
        config["data"]["template"] = f"{self.plan.tasks[task].instruction}\n{config['data']['template']}"
        config["prompt"]["num_virtual_tokens"] = 1
        put(config, {"train.max_steps": 1, "evaluate.every": 0, "checkpoint.every": 0})
        return Unit(task, "bare", config, {f"{task}/hard prompt/0": ""})

    def timed(self, task: str, method: str, *, is_cached: bool) -> Unit:
        """A few steps of one method alone, without evaluations, over rows that are read twice."""
        config = self.config(task)
        put(config, self.keys(task, method))
        put(config, {"train.max_steps": NUM_TIMED_STEPS, "checkpoint.every": 0})
        config["data"].pop("validation")
        config["evaluate"] = {"every": 0}
        if is_cached:
            config["train"]["context_cache_gib"] = 1
        return Unit(task, "time", config, {f"{task}/{method}" + (", cached" if is_cached else ""): ""})

    def config(self, task: str) -> dict[str, Any]:
        """What all runs over a task share."""
        own = self.plan.tasks[task]
        config = {name: dict(values) for name, values in self.plan.run.items()}
        for name in ("data", "evaluate", "train"):
            config[name] = config.get(name, {}) | getattr(own, name)
        config.setdefault("prompt", {})
        config["model"] = config.get("model", {}) | {"path": self.base}
        config["data"] |= {which: f"{task}_{which}.jsonl" for which in ("train", "validation")}
        config["evaluate"]["metrics"] = [own.metric]
        return config

    def keys(self, task: str, method: str) -> dict[str, Any]:
        """A method's own keys, with the task's instruction and shares of the layers filled in."""
        found = {}
        for key, value in self.plan.methods[method].items():
            if value == INSTRUCTION:
                value = self.plan.tasks[task].instruction
            elif isinstance(value, dict):
                value = round(value["of_layers"] * load_shape(self.base).num_hidden_layers)
            found[key] = value
        return found

    def place(self, unit: Unit, folder: Path) -> dict[str, Any]:
        """A unit's config with the files of its rows, and a run in `folder`."""
        data = dict(unit.config["data"])
        data |= {which: str(self.data / data[which]) for which in ("train", "validation") if which in data}
        return unit.config | {"output_dir": str(folder / "run"), "data": data}


def write_config(config: dict[str, Any], folder: Path) -> Path:
    """Write config.json, which is YAML too."""
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder / "config.json"


def put(config: dict[str, Any], keys: dict[str, Any]) -> None:
    """Set dotted keys."""
    for key, value in keys.items():
        section, _, leaf = key.rpartition(".")
        (config.setdefault(section, {}) if section else config)[leaf] = value
