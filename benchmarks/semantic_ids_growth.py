"""How the time of quantizers grows with rows, codes and levels.

    python benchmarks/semantic_ids_growth.py [--quick] [--picture docs/pictures/semantic_ids_growth.svg]

Seeded Gaussians of width 64 with falling variances; residual k-means, fit and encode apart, and balanced k-means of one
level with sizes within 10%. One JSON line a row; the peer is the smallest case of its line, so that the ratio is the
growth, to be held against `growth`, that of the rows (codes, levels). In full it takes a quarter of an hour.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from shared.pictures import COLORS, axes, save
from shared.timing import best_of, parser, report

from jaxrec.console import report_user_errors
from jaxrec.semantic_ids.quantizers import balanced, residual
from jaxrec.semantic_ids.quantizers.balanced import BalancedConfig
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig

WIDTH, ROWS, CODES, LEVELS = 64, 100_000, 256, 3
STEPS = {
    "rows": (10_000, 30_000, 100_000, 300_000, 1_000_000),
    "codes": (64, 256, 1024, 4096),
    "levels": (1, 2, 4, 8),
}
QUICK = {"rows": (10_000, 100_000), "codes": (64, 256), "levels": (1, 3)}
Lines = dict[str, list[tuple[int, float]]]
"""Of each line of a plot, (rows, codes or levels; milliseconds)."""


def main() -> None:
    """Prints the rows; draws them where --picture says."""
    command = parser(__doc__)
    command.add_argument("--picture", type=Path, metavar="FILE", help="an SVG to write")
    args = command.parse_args()
    lines = {along: measure(along, sizes, args.quick) for along, sizes in (QUICK if args.quick else STEPS).items()}
    if args.picture:
        draw(lines, args.picture)


def measure(along: str, sizes: tuple[int, ...], quick: bool) -> Lines:
    """Times along one dimension, the others at their usual size, and the rows printed."""
    lines: Lines = {"residual, fit": [], "residual, encode": []}
    if along != "levels":
        lines["balanced, fit"] = []
    for size in sizes:
        rows, codes, levels = (size if along == name else usual for name, usual in usual_sizes(along))
        case = f"{rows} x {WIDTH}, {levels} x {codes}"
        x = make(rows)
        for name, milliseconds in timed(x, codes, levels, along != "levels", quick).items():
            line = lines[name]
            line.append((size, milliseconds))
            growth = {"growth": size / line[0][0]}
            first = f"{line[0][0]} {along}"
            report(f"{name}: {along}", case, milliseconds, line[0][1], first, **growth)
    return lines


def usual_sizes(along: str) -> tuple[tuple[str, int], ...]:
    """The sizes that do not change: one level where rows and codes grow."""
    return (("rows", ROWS), ("codes", CODES), ("levels", LEVELS if along == "levels" else 1))


def timed(x: np.ndarray, codes: int, levels: int, with_balanced: bool, quick: bool) -> dict[str, float]:
    """Milliseconds of each line at one size."""
    config = ResidualConfig((codes,) * levels)
    fitted = residual.fit(jax.random.key(0), x, config)
    fit, encode = best_of(
        [lambda: residual.fit(jax.random.key(0), x, config), lambda: residual.encode(fitted, x)], 1 if quick else 2
    )
    times = {"residual, fit": fit, "residual, encode": encode}
    if with_balanced:
        # Once, compiling (two seconds) included: the largest take minutes.
        (times["balanced, fit"],) = best_of([lambda: balanced.fit(jax.random.key(0), x, codes, BalancedConfig())], 0)
    return times


def make(rows: int) -> np.ndarray:
    """Seeded rows f32 [rows, WIDTH]."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, WIDTH), np.float32) * np.geomspace(1, 0.2, WIDTH, dtype=np.float32)


def draw(lines: dict[str, Lines], path: Path) -> None:
    """One plot a dimension, both axes logarithmic; the dotted line is growth in proportion."""
    figure, places = axes(len(lines))
    for place, (along, drawn) in zip(places, lines.items(), strict=True):
        for color, (name, points) in zip(COLORS, drawn.items(), strict=False):
            sizes, times = zip(*points, strict=True)
            seconds = np.array(times) / 1e3
            place.loglog(sizes, seconds, color=color, marker="o", markersize=3, linewidth=1.4, label=name)
            place.loglog(sizes, seconds[0] * np.array(sizes) / sizes[0], ":", color=color, linewidth=0.8, alpha=0.7)
        place.set_xlabel(along)
    places[0].set_ylabel("seconds")
    places[0].legend(frameon=False, labelcolor="linecolor", fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
