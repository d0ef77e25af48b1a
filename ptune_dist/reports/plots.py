"""Charts of results as PNG, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptune_dist.reports.charts import Chart, list_charts
from ptune_dist.reports.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (6.0, 3.4)  # inches
MOST_IN_LEGEND = 10
STYLES = {"lines": "-", "lines and points": "o-", "points": "o"}


def plot(chart: Chart) -> "Figure":
    """A figure of one set of axes, with a legend where it has labeled lines that are not too many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    if chart.kind == "bars":
        axes.barh([own.name for own in chart.series], [own.y[0] for own in chart.series])
        axes.invert_yaxis()
    else:
        size = 5 if chart.kind == "points" else 3
        for own in chart.series:
            axes.plot(own.x, own.y, STYLES[chart.kind], label=own.name or None, linewidth=1, markersize=size)
        if 1 < len(chart.series) <= MOST_IN_LEGEND:
            axes.legend(fontsize=8, frameon=False)
    if chart.has_log_x:
        axes.set_xscale("log")
    if chart.x_names:
        axes.set_xticks(range(len(chart.x_names)), chart.x_names)
    axes.set_title(chart.title, fontsize=10, loc="left")
    axes.set_xlabel(chart.x_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_plots(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write each chart as a PNG; returns the files."""
    files = []
    for chart in list_charts(results):
        file = folder / f"{chart.name}.png"
        plot(chart).savefig(file, dpi=150, bbox_inches="tight")
        files.append(file)
    return files
