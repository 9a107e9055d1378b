"""The radar plot of the paper's page: top-5 on ImageNet's test sets, average top-1 of the transfer groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.storage import atomic_path

# The page draws the model of real images in blue and that of synthetic ones in red. Both stay apart from each other for
# colour-blind readers; further models follow matplotlib's order.
COLORS = ("#2166ac", "#d6303a", "#e08214", "#1b9e77", "#7b3294", "#8c6d31")
INK = "#7d7d7d"  # grey that reads on white paper and on a dark screen alike


def draw_radar(
    axes: Sequence[str], models: Mapping[str, Mapping[str, float]], svg: Path, png: Path, colors: Mapping[str, str]
) -> None:
    """Write the plot as SVG (transparent, for screens of any colour) and PNG (white, for print).

    AXES: names, clockwise from the top; at least three. MODELS: model -> {axis: percent}; a polygon skips an axis
    that its model lacks. COLORS: model -> colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.projections.polar import PolarAxes

    angles = [2 * math.pi * position / len(axes) for position in range(len(axes))]
    # A fixed salt: the same bytes for the same numbers.
    with matplotlib.rc_context({"svg.hashsalt": "radar", "svg.fonttype": "path", "font.size": 11}):
        figure, plot = pyplot.subplots(figsize=(7, 6.4), subplot_kw={"polar": True}, layout="constrained")
        assert isinstance(plot, PolarAxes)
        plot.set_theta_offset(math.pi / 2)
        plot.set_theta_direction(-1)
        plot.set_xticks(angles, axes)
        plot.set_ylim(0, 100)
        plot.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"])
        plot.tick_params(colors=INK)
        plot.grid(color=INK, alpha=0.35, linewidth=0.7)
        plot.spines["polar"].set_color(INK)
        for name, values in models.items():
            known = [(angle, values[axis]) for angle, axis in zip(angles, axes, strict=True) if axis in values]
            if not known:
                continue
            closed = [*known, known[0]]
            color = colors[name]
            plot.plot(*zip(*closed, strict=True), color=color, linewidth=2, marker="o", markersize=4, label=name)
            if len(known) == len(axes):
                plot.fill(*zip(*closed, strict=True), color=color, alpha=0.12)
        legend = plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)
        for text in legend.get_texts():
            text.set_color(INK)
        with atomic_path(svg) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
        with atomic_path(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, facecolor="white")
        pyplot.close(figure)
