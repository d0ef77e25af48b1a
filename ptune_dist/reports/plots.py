"""Charts of results, by matplotlib: curves of training and validation, and metrics over each swept key."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptune_dist.reports.results import Result, common_metrics, differing_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (6.0, 3.4)  # inches
MOST_IN_LEGEND = 10
WIDE_RANGE = 10  # of the values of a key, from which its axis is logarithmic
CURVES = {
    "loss": "loss in training",
    "learning_rate": "learning rate",
    "tokens_per_s": "tokens per second",
}
MIB = 1 << 20


def draw_charts(results: Sequence[Result]) -> Iterator[tuple[str, "Figure"]]:
    """Each chart with a name for its file; what no result has is left out."""
    for key, title in CURVES.items():
        if any(key in line for result in results for line in result.steps):
            yield key, chart(title, "step", lambda axes, key=key: draw_steps(axes, results, key))
    for name in common_metrics(results):
        if any(name in line for result in results for line in result.evaluations):
            yield (
                file_name(f"validation-{name}"),
                chart(f"{name} on validation", "step", lambda axes, name=name: draw_evaluations(axes, results, name)),
            )
    if len(results) > 1 and any("peak_memory_bytes" in result.summary for result in results):
        yield "peak-memory", chart("peak memory, MiB", "", lambda axes: draw_memory(axes, results))
    for key, values in differing_keys(results).items():
        if len(results) > 2 and all(is_number(value) for value in values):
            for name in common_metrics(results):
                yield (
                    file_name(f"{name}-over-{key}"),
                    chart(f"{name} over {key}", key, lambda axes, n=name, k=key: draw_swept(axes, results, n, k)),
                )


def file_name(text: str) -> str:
    return text.replace("/", "-")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def chart(title: str, x_label: str, draw: Callable[["Axes"], None]) -> "Figure":
    """A figure of one set of axes, with a legend where it has labeled lines that are not too many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _, labels = axes.get_legend_handles_labels()
    if 1 < len(labels) <= MOST_IN_LEGEND:
        axes.legend(fontsize=8, frameon=False)
    return figure


def draw_steps(axes: "Axes", results: Sequence[Result], key: str) -> None:
    for result in results:
        lines = [line for line in result.steps if key in line]
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=result.name, linewidth=1)


def draw_evaluations(axes: "Axes", results: Sequence[Result], name: str) -> None:
    for result in results:
        lines = sorted((line for line in result.evaluations if name in line), key=lambda line: line["step"])
        axes.plot(
            [line["step"] for line in lines], [line[name] for line in lines], "o-", label=result.name, markersize=3
        )


def draw_memory(axes: "Axes", results: Sequence[Result]) -> None:
    with_peak = [result for result in results if "peak_memory_bytes" in result.summary]
    axes.barh([result.name for result in with_peak], [r.summary["peak_memory_bytes"] / MIB for r in with_peak])
    axes.invert_yaxis()


def draw_swept(axes: "Axes", results: Sequence[Result], name: str, key: str) -> None:
    """A point for each result. Members that differ in other keys too have a point each at one place."""
    x = [float(result.settings[key]) for result in results]
    axes.plot(x, [result.validation[name] for result in results], "o", markersize=5)
    if min(x) > 0 and max(x) / min(x) > WIDE_RANGE:
        axes.set_xscale("log")


def as_svg(figure: "Figure") -> str:
    """The figure as an element to put into a page."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ptune_dist"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = stream.getvalue()
    return text[text.index("<svg") :]


def write_plots(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write each chart as a PNG; returns the files."""
    files = []
    for name, figure in draw_charts(results):
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=150, bbox_inches="tight")
        files.append(file)
    return files
