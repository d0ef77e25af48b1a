"""Read what runs have left: their configs, metrics, evaluations, and answers to the validation rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptune_dist.common.files import explain
from ptune_dist.errors import UserError
from ptune_dist.metrics import METRICS
from ptune_dist.metrics.metric import Metric, RowLoss

HIDDEN_KEYS = ("output_dir",)  # which differ between any two runs


@dataclass(frozen=True)
class Result:
    """One trained prompt: of a run, or of a member of a sweep.

    name: short, and no two results have the same. settings: the config by dotted keys. steps, evaluations: lines of
    metrics.jsonl and evaluations.jsonl. predictions: of the validation rows, in their order; none without validation.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def validation(self) -> dict[str, float]:
        """The metrics of the best prompt."""
        return self.summary.get("validation") or {}

    def answers(self, metric: Metric) -> list[Any] | None:
        """What the metric takes, of each validation row; None where the run has not kept it."""
        try:
            if metric.needs == "losses":
                return [RowLoss(row["loss"] * row["num_tokens"], row["num_tokens"]) for row in self.predictions]
            key = {"label_losses": "label", "answers": "generated", "values": "predicted"}[metric.needs]
            return [row[key] for row in self.predictions]
        except KeyError:
            return None

    def references(self, metric: Metric) -> list[list[Any]]:
        """What is right for each validation row, as the metric takes it."""
        if metric.needs == "losses":
            return []
        key = "gold_label" if metric.needs == "label_losses" else "gold"
        return [row[key] if isinstance(row[key], list) else [row[key]] for row in self.predictions]


def read_results(folders: Sequence[Path]) -> list[Result]:
    """The results of runs; a sweep has those of its members. Raises UserError."""
    found: list[Path] = []
    for folder in folders:
        members = sorted((folder / "members").glob("*/config.yaml"))
        found += [file.parent for file in members] or [folder]
    distinct = list(dict.fromkeys(path.resolve() for path in found))
    names = short_names(distinct)
    return [read_result(folder, name) for folder, name in zip(distinct, names, strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as needed to tell them apart; `members` between a sweep and a member is left out."""
    parts = [[part for part in folder.parts if part != "members"] for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_result(folder: Path, name: str) -> Result:
    """Raises UserError for what is no run, or one that has no summary yet."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run of ptune-dist: it has no config.yaml")
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder} has no summary.json: the run is not finished")
    try:
        settings = flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return Result(
            name,
            folder,
            settings,
            steps=read_lines(folder / "metrics.jsonl"),
            evaluations=list({line["step"]: line for line in read_lines(folder / "evaluations.jsonl")}.values()),
            summary=summary,
            predictions=read_lines(folder / "predictions.jsonl"),
        )
    except OSError as error:
        raise UserError(f"{folder}: {explain(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise UserError(f"{folder}: a file of this run is damaged") from None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file; none where there is no such file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def differing_keys(results: Sequence[Result]) -> dict[str, list[Any]]:
    """The config keys whose values differ between results, with each one's value, None where it has no such key."""
    keys = dict.fromkeys(key for result in results for key in result.settings)
    found = {key: [result.settings.get(key) for result in results] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if key not in HIDDEN_KEYS and not key.startswith("sweep") and any(value != values[0] for value in values)
    }


def common_metrics(results: Sequence[Result]) -> list[str]:
    """The metrics that every result has, in the order of the first one's."""
    return [name for name in results[0].validation if all(name in result.validation for result in results)]


def best_of(results: Sequence[Result], metric: str) -> Result:
    """The result with the best value of a metric."""
    sign = 1 if is_higher_better(metric) else -1
    return max(results, key=lambda result: sign * result.validation[metric])


def is_higher_better(metric: str) -> bool:
    """Of a metric, which may be that of one task ("accuracy/nli")."""
    return METRICS[metric.partition("/")[0]].higher_is_better
