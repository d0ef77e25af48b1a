"""What charts of results show, as plain numbers: curves of training and validation, metrics over each swept key."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ptune_dist.reports.results import Result, common_metrics, differing_keys

WIDE_RANGE = 10  # of the values of a key, from which its axis is logarithmic
CURVES = {
    "loss": "loss in training",
    "learning_rate": "learning rate",
    "tokens_per_s": "tokens per second",
}
MIB = 1 << 20


@dataclass(frozen=True)
class Series:
    """One line, or one set of points."""

    name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Chart:
    """name: for a file. kind: what is drawn of each series; of `bars`, each series has one number.

    x_names: of the places 0, 1, ... on the horizontal axis, where it is one of words.
    """

    name: str
    title: str
    x_label: str
    series: list[Series] = field(default_factory=list)
    kind: Literal["lines", "lines and points", "points", "bars"] = "lines"
    has_log_x: bool = False
    x_names: list[str] = field(default_factory=list)


def list_charts(results: Sequence[Result]) -> Iterator[Chart]:
    """Each chart; what no result has is left out."""
    for key, title in CURVES.items():
        series = [draw_steps(result, key) for result in results]
        if any(own.x for own in series):
            yield Chart(key, title, "step", series)
    for name in common_metrics(results):
        series = [draw_evaluations(result, name) for result in results]
        if any(own.x for own in series):
            yield Chart(file_name(f"validation-{name}"), f"{name} on validation", "step", series, "lines and points")
    peaks = [result for result in results if "peak_memory_bytes" in result.summary]
    if peaks:
        series = [Series(result.name, [0], [result.summary["peak_memory_bytes"] / MIB]) for result in peaks]
        yield Chart("peak-memory", "peak memory, MiB", "", series, "bars")
    is_sweep = all(result.folder.parent.name == "members" for result in results)
    for key, values in differing_keys(results).items():
        if is_sweep or (len(results) > 2 and all(is_number(value) for value in values)):
            for name in common_metrics(results):
                yield draw_swept(results, name, key)


def draw_steps(result: Result, key: str) -> Series:
    lines = [line for line in result.steps if key in line]
    return Series(result.name, [line["step"] for line in lines], [line[key] for line in lines])


def draw_evaluations(result: Result, name: str) -> Series:
    lines = sorted((line for line in result.evaluations if name in line), key=lambda line: line["step"])
    return Series(result.name, [line["step"] for line in lines], [line[name] for line in lines])


def draw_swept(results: Sequence[Result], name: str, key: str) -> Chart:
    """A point for each result. Members that differ in other keys too have a point each at one place."""
    values = [result.settings.get(key) for result in results]
    numbers = [float(value) for value in values if value is not None and is_number(value)]
    words = ["" if value is None else str(value) for value in values]
    names = [] if len(numbers) == len(values) else list(dict.fromkeys(words))
    x = [float(names.index(word)) for word in words] if names else numbers
    points = Series("", x, [result.validation[name] for result in results])
    is_wide = min(x) > 0 and max(x) / min(x) > WIDE_RANGE
    return Chart(file_name(f"{name}-over-{key}"), f"{name} over {key}", key, [points], "points", is_wide, names)


def file_name(text: str) -> str:
    return text.replace("/", "-")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
