"""Bars of tokens per second: every side of every case, beside a figure that others have published."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COLORS = {"peft": "#9aa0a6"}
OURS = "#3949ab"
PUBLISHED = "#c62828"


@dataclass(frozen=True)
class Bar:
    case: str
    side: str
    tokens_per_s: float


def draw_speeds(bars: Sequence[Bar], published: dict[str, float], path: Path) -> bool:
    """Write a PNG; False if there is nothing to draw or no matplotlib. `published` are lines: label -> tokens/s."""
    if not bars:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    labels = [f"{bar.case}: {bar.side}" for bar in bars]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    speeds = [bar.tokens_per_s for bar in bars]
    drawn = axes.barh(labels, speeds, color=[COLORS.get(bar.side, OURS) for bar in bars])
    axes.bar_label(drawn, labels=[f"{speed:,.0f}" for speed in speeds], padding=3)
    for label, speed in published.items():
        axes.axvline(speed, color=PUBLISHED, linestyle="--", label=f"{label}: {speed:,.0f}")
    if published:
        axes.legend(loc="lower right", fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("tokens per second")
    figure.savefig(path, dpi=120)
    return True
