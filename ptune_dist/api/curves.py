"""Curves of a training that is under way, drawn in a notebook."""

import time
from typing import Any

from ptune_dist.reports.charts import Chart, Series
from ptune_dist.reports.svg import render_svg

LINES = ("train/loss", "validation/")  # what is drawn: names, or what they begin with


class LiveCurves:
    """Draws the loss and the validation metrics as they come: `train(config, on_metrics=LiveCurves())`.

    It needs a notebook; elsewhere nothing is shown, and `svg` has the charts. every_s: seconds between two drawings.
    """

    def __init__(self, every_s: float = 2.0):
        self.every_s = every_s
        self.points: dict[str, list[tuple[int, float]]] = {}
        self._shown_at = 0.0
        self._place: Any = None  # where in the notebook the charts are

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step; those of an evaluation are drawn at once."""
        chosen = {name: value for name, value in values.items() if name.startswith(LINES)}
        for name, value in chosen.items():
            self.points.setdefault(name, []).append((step, value))
        is_evaluation = any(name != LINES[0] for name in chosen)
        if is_evaluation or time.monotonic() - self._shown_at > self.every_s:
            self.show()

    def show(self) -> None:
        """Draw what there is now."""
        self._shown_at = time.monotonic()
        try:
            from IPython.core.getipython import get_ipython  # pyright: ignore[reportMissingImports]
            from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]
        except ImportError:
            return
        if get_ipython() is None:
            return
        if self._place is None:
            self._place = display(HTML(self.svg()), display_id=True)
        else:
            self._place.update(HTML(self.svg()))

    def svg(self) -> str:
        """The charts as SVG elements side by side: one of the losses, one of each other metric."""
        charts: dict[str, list[str]] = {}
        for name in self.points:
            charts.setdefault(name.split("/")[1], []).append(name)
        found = []
        for metric, names in charts.items():
            series = [Series(name, *map(list, zip(*self.points[name], strict=True))) for name in names]
            found.append(render_svg(Chart(metric, metric, "step", series, "lines and points")))
        return "".join(found)
