"""The page's figures: curves over a logarithmic axis, and points in a plane, each with its interval; as SVG."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.images import LOOK
from utils.report.figures import COLORS
from utils.report.tables import Cell

REAL = COLORS["real"][0]
# Of the other rows: readable on white and on black, apart for colour-blind readers with the markers' help.
OTHERS = ("#d6303a", "#e08214", "#35978f", "#9c5fc4", "#8c8c2e", "#e7298a", "#5aa352", "#b15928")
MARKERS = "osD^vPX*"


@dataclass
class Series:
    """Values (x, y with its interval) of one row, and its curve where it has one."""

    label: str
    color: str
    values: Sequence[tuple[float, Cell]]
    curve: Callable[[Any], Any] | None = None
    joined: bool = False  # by a line through the values
    marker: str = "o"


def colors_of(rows: Sequence[str], reference: str) -> dict[str, tuple[str, str]]:
    """Row -> (colour, marker): the reference in the blue of real images."""
    others = [row for row in rows if row != reference]
    found = {row: (OTHERS[i % len(OTHERS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(others)}
    return {reference: (REAL, "o")} | found


def draw(series: Sequence[Series], x: str, y: str, log: bool) -> str:
    """The SVG; the same values give the same bytes."""
    import matplotlib  # here: half a second of start-up

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    with matplotlib.rc_context(LOOK | {"svg.hashsalt": "study", "font.size": 12}):
        figure, plot = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
        for one in series:
            places = np.array([place for place, _ in one.values], float)
            values, low, high = np.array([(cell.value, cell.low, cell.high) for _, cell in one.values], float).T
            around = np.abs([values - low, high - values])
            line = "-" if one.joined else ""
            plot.errorbar(places, values, around, fmt=one.marker + line, color=one.color, label=one.label, markersize=5,
                          linewidth=1.3, elinewidth=1.1, capsize=2.5, alpha=0.9)  # fmt: skip
            if one.curve:
                along = np.geomspace(places.min(), places.max(), 100)
                plot.plot(along, one.curve(along), color=one.color, linewidth=1.3, alpha=0.9)
        if log:
            plot.set_xscale("log")
            ticks = sorted({value[0] for one in series for value in one.values})
            plot.set_xticks(ticks if len(ticks) <= 8 else ticks[:: len(ticks) // 6])
            plot.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
            plot.xaxis.set_minor_locator(ticker.NullLocator())
        plot.set_xlabel(x)
        plot.set_ylabel(y)
        plot.legend(fontsize=10, ncols=1 + (len(series) > 6))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    drawn = buffer.getvalue().decode()
    return drawn[drawn.index("<svg") :]
