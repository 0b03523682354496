"""Draws semantic_ids_levels.svg: what the levels of residual k-means do to points of a plane, and what balance does.

PYTHONPATH=benchmarks python docs/pictures/semantic_ids_levels.py
"""

from pathlib import Path

import jax
import numpy as np
from shared.pictures import COLORS, GREY, axes, save

from jaxrec.semantic_ids import ResidualConfig
from jaxrec.semantic_ids.quantizers import residual

CODES = 6


def points() -> np.ndarray:
    """Groups of groups, f32 [300, 2]; some are larger than others."""
    rng = np.random.default_rng(3)
    outer = 4 * np.stack(
        [np.cos(np.arange(CODES) * 2 * np.pi / CODES), np.sin(np.arange(CODES) * 2 * np.pi / CODES)], 1
    )
    inner = rng.normal(scale=0.9, size=(CODES, 5, 2))
    group, part = rng.choice(CODES, 300, p=np.arange(1, 7) / 21), rng.integers(0, 5, 300)
    return (outer[group] + inner[group, part] + rng.normal(scale=0.18, size=(300, 2))).astype(np.float32)


def scatter(place, x: np.ndarray, codes: np.ndarray, centroids: np.ndarray, title: str) -> None:
    """Points in the color of their code, and the centroids as crosses."""
    place.scatter(*x.T, s=5, c=np.array(COLORS)[codes], linewidths=0)
    place.plot(*np.asarray(centroids).T, "x", color=GREY, markersize=7, markeredgewidth=2)
    place.set(title=title, xticks=[], yticks=[], aspect="equal")


def main() -> None:
    x = points()
    fitted = residual.fit(jax.random.key(0), x, ResidualConfig((CODES,) * 4))
    codes = np.asarray(residual.encode(fitted, x))
    left = x - np.asarray(residual.decode(fitted, codes[:, :1]))
    figure, places = axes(4, width=2.6)
    scatter(places[0], x, codes[:, 0], fitted.centroids[0], "first code: where")
    scatter(places[1], left, codes[:, 1], fitted.centroids[1], "second code: where within")
    errors = [((x - np.asarray(residual.decode(fitted, codes[:, :level]))) ** 2).sum(1).mean() for level in range(1, 5)]
    places[2].semilogy(range(1, 5), errors, color=COLORS[0], marker="o")
    places[2].set(title="error left", xlabel="codes", xticks=range(1, 5))
    balanced = residual.fit(jax.random.key(0), x, ResidualConfig((CODES,) * 2, balanced=(2,)))
    sizes = [np.bincount(np.asarray(residual.encode(books, x))[:, 1], minlength=CODES) for books in (fitted, balanced)]
    for shift, (name, size) in enumerate(zip(("as they fall", "balanced"), sizes, strict=True)):
        bars = np.arange(CODES) + 0.4 * shift
        places[3].bar(bars, np.sort(size)[::-1], 0.38, color=COLORS[shift], label=name)
    places[3].set(title="items a second code", xticks=[])
    places[3].legend(frameon=False, labelcolor="linecolor", fontsize=8)
    save(figure, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
