"""Charts as SVG, written directly: a finished run writes a report, and importing matplotlib would take it seconds."""

import math
from collections.abc import Callable, Sequence

from markupsafe import escape

from ptune_dist.reports.charts import Chart, Series

WIDTH = 480
HEIGHT = 280
LEFT = 62
RIGHT = 14
TOP = 30
BOTTOM = 40
LEGEND_ROW = 15
BAR = 24  # the height of a bar and the space below it
MOST_IN_LEGEND = 10
MOST_POINTS = 1000  # of a line; more of them than pixels say nothing
MOST_CIRCLES = 60  # on a line
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
STYLE = 'font-family="system-ui, sans-serif" font-size="11"'


class Axis:
    """From numbers to pixels, and where the ticks are."""

    def __init__(self, values: Sequence[float], begin: float, end: float, *, is_log: bool = False):
        self._function: Callable[[float], float] = math.log10 if is_log else float
        found = [self._function(value) for value in values]
        low = min(found, default=0.0)
        high = max(found, default=1.0)
        if low == high:
            pad = abs(low) * 0.1 or 1.0
            low -= pad
            high += pad
        self._low = low
        self._high = high
        self._begin = begin
        self._end = end
        self.ticks = list_powers(low, high) if is_log else list_ticks(low, high)

    def place(self, value: float) -> float:
        share = (self._function(value) - self._low) / (self._high - self._low)
        return round(self._begin + share * (self._end - self._begin), 2)


def list_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def list_powers(low: float, high: float) -> list[float]:
    """Of an axis whose logarithms go from low to high: powers of ten, and 2 and 5 times them where these are few."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low - 1e-9 <= math.log10(value) <= high + 1e-9]


def show(value: float) -> str:
    """A tick's number."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 10):g}"


def render_svg(chart: Chart) -> str:
    """The chart as an SVG element."""
    if chart.kind == "bars":
        return render_bars(chart)
    series = [finite(thin(own)) for own in chart.series]
    named = [own.name for own in series] if 1 < len(series) <= MOST_IN_LEGEND else []
    height = HEIGHT + LEGEND_ROW * len(named)
    x = Axis([v for own in series for v in own.x], LEFT, WIDTH - RIGHT, is_log=chart.has_log_x)
    y = Axis([v for own in series for v in own.y], HEIGHT - BOTTOM, TOP)
    parts = [text(LEFT, 16, chart.title, size=13), *render_grid(x, y, chart)]
    for number, own in enumerate(series):
        color = COLORS[number % len(COLORS)]
        points = [(x.place(a), y.place(b)) for a, b in zip(own.x, own.y, strict=True)]
        if chart.kind != "points" and points:
            line = " ".join(f"{a:g},{b:g}" for a, b in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.3"/>')
        if (chart.kind != "lines" and len(points) <= MOST_CIRCLES) or len(points) == 1 or chart.kind == "points":
            parts += [f'<circle cx="{a:g}" cy="{b:g}" r="3" fill="{color}"/>' for a, b in points]
    for number, name in enumerate(named):
        place = HEIGHT + LEGEND_ROW * number
        color = COLORS[number % len(COLORS)]
        parts.append(f'<rect x="{LEFT}" y="{place}" width="14" height="3" fill="{color}"/>')
        parts.append(text(LEFT + 20, place + 6, name))
    return element(height, parts)


def render_grid(x: Axis, y: Axis, chart: Chart) -> list[str]:
    """Grid lines, their numbers or names, and the name of the horizontal axis."""
    parts = []
    for tick in y.ticks:
        place = y.place(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:g}" y2="{place:g}" stroke="#e3e3e3"/>')
        parts.append(text(LEFT - 6, place + 4, show(tick), anchor="end"))
    ticks = list(enumerate(chart.x_names)) or [(tick, show(tick)) for tick in x.ticks]
    for tick, name in ticks:
        place = x.place(tick)
        parts.append(f'<line x1="{place:g}" x2="{place:g}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#f0f0f0"/>')
        parts.append(text(place, HEIGHT - BOTTOM + 15, name, anchor="middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x_label, anchor="middle"))
    return parts


def render_bars(chart: Chart) -> str:
    """A horizontal bar for each series, with its number."""
    largest = max((own.y[0] for own in chart.series), default=0) or 1
    room = WIDTH - RIGHT - 90
    parts = [text(0, 16, chart.title, size=13)]
    for number, own in enumerate(chart.series):
        place = TOP + 2 * BAR * number
        parts.append(text(0, place + 10, own.name))
        width = max(1.0, room * own.y[0] / largest)
        parts.append(f'<rect x="0" y="{place + 16}" width="{width:.1f}" height="16" fill="{COLORS[0]}"/>')
        parts.append(text(width + 6, place + 28, f"{own.y[0]:,.0f}"))
    return element(TOP + 2 * BAR * len(chart.series), parts)


def element(height: float, parts: list[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {STYLE}>{"".join(parts)}</svg>'


def text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="#333">{escape(content)}</text>'


def thin(series: Series) -> Series:
    """At most MOST_POINTS points of a line, the last one among them."""
    every = math.ceil(len(series.x) / MOST_POINTS) or 1
    if every == 1:
        return series
    first = (len(series.x) - 1) % every
    return Series(series.name, series.x[first::every], series.y[first::every])


def finite(series: Series) -> Series:
    """Without what no axis has a place for."""
    pairs = [(a, b) for a, b in zip(series.x, series.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return Series(series.name, [a for a, _ in pairs], [b for _, b in pairs])
