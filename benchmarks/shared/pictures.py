"""Plots for docs/: a grid of axes that reads on light and on dark pages, saved as SVG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

GREY = "#808890"
COLORS = ("#2f6bd8", "#d9822b", "#1f9d66", "#b04bc2", "#c23b4b", "#6b7280")
STYLE = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "jaxrec"}


def axes(columns: int, width: float = 3.2, height: float = 2.5) -> tuple[Figure, list]:
    """A figure and its `columns` axes side by side, in one row."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, height), layout="constrained")
        made = list(figure.subplots(1, columns, squeeze=False)[0])
    for each in made:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set(color=GREY, alpha=0.5)
        each.tick_params(colors=GREY, length=2, which="both")
        each.xaxis.label.set_color(GREY)
        each.yaxis.label.set_color(GREY)
        each.title.set_color(GREY)
        each.grid(color=GREY, alpha=0.15)
        each.set_axisbelow(True)
    return figure, made


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as SVG, the same bytes for the same plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
