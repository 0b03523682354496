"""Residual k-means: each level clusters the residual of the levels before it (OneMall Eq. 1-2).

Levels may be balanced: their clusters are about equally large (OneSearch §3.1.3 balances the last level only).
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.semantic_ids.quantizers import balanced, kmeans
from jaxrec.semantic_ids.quantizers.balanced import BalancedConfig
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig, by_chunk, chunk_rows, nearest
from jaxrec.semantic_ids.quantizers.rows import Rows, check_enough, check_rows, check_width, place


@dataclass(frozen=True)
class ResidualConfig:
    """The levels of a residual k-means."""

    sizes: tuple[int, ...] = (128, 128)
    """Codes in each level."""
    balanced: tuple[int, ...] = ()
    """Levels, counted from 1, whose clusters are kept about equally large; OneSearch: the last one, (3,)."""
    kmeans: KMeansConfig = field(default_factory=partial(KMeansConfig, rows_per_cluster=1024, axes_iterations=10))
    """k-means of the other levels: more rows and iterations than a single level needs, since errors add up."""
    balance: BalancedConfig = field(default_factory=BalancedConfig)
    """The fit of the balanced levels."""


@flax.struct.dataclass
class Residual:
    """Fitted levels: a codebook f32 [K, D] each, and the prices f32 [K] of a balanced one (None for the others)."""

    centroids: tuple[jax.Array, ...]
    prices: tuple[jax.Array | None, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes in each level."""
        return tuple(len(codebook) for codebook in self.centroids)

    @property
    def width(self) -> int:
        """Width of the rows that it encodes."""
        return self.centroids[0].shape[1]


def fit(key: jax.Array, x: np.ndarray | jax.Array | Rows, config: ResidualConfig = ResidualConfig()) -> Residual:
    """Fit one codebook a level to x f32 [I, D] (OneMall Eq. 1).

    Rows that are split over a mesh (`rows.place`) give the codebooks of one device up to rounding.

    Raises:
      UserError: no level, a level with fewer than two codes, a balanced level that does not exist, fewer rows than
        codes, or a row with NaN or infinity.
    """
    rows = x if isinstance(x, Rows) else place(x)
    check(config, (len(rows), rows.x.shape[1]))
    levels: list[tuple[jax.Array, jax.Array | None]] = []
    for level, k in enumerate(config.sizes):
        if levels:
            last = Residual(*((part,) for part in levels[-1]))
            rows = dataclasses.replace(rows, x=_encode_rows(last, rows)[1])
        level_key = jax.random.fold_in(key, level)
        if level + 1 in config.balanced:
            levels.append(balanced.fit(level_key, rows, k, config.balance))
        else:
            levels.append((kmeans.fit(level_key, rows, k, config.kmeans), None))
    return Residual(*zip(*levels, strict=True))


def check(config: ResidualConfig, shape: tuple[int, ...]) -> None:
    """UserError when the configuration is invalid, or does not fit rows of a shape [I, D]."""
    if not config.sizes or min(config.sizes) < 2:
        raise UserError(
            f"sizes={config.sizes} of the residual k-means: give at least one level, each of 2 codes or more"
        )
    if wrong := [level for level in config.balanced if not 1 <= level <= len(config.sizes)]:
        raise UserError(
            f"balanced={config.balanced} names level {wrong[0]}, but sizes={config.sizes} are levels 1 to "
            f"{len(config.sizes)}: name some of these"
        )
    check_enough(shape[0], max(config.sizes))


def encode(fitted: Residual, x: np.ndarray | jax.Array) -> jax.Array:
    """The codes of x f32 [I, D], int32 [I, levels] (OneMall Eq. 2); rows are independent."""
    x = check_rows(x, 0)
    check_width(x, fitted.width)
    return _codes(fitted, x)


def encode_rows(fitted: Residual, rows: Rows) -> jax.Array:
    """The codes of placed rows, int32 [I', levels], split over the devices as the rows are."""
    return _encode_rows(fitted, rows)[0]


def decode(fitted: Residual, codes: np.ndarray | jax.Array) -> jax.Array:
    """The sum of the centroids that codes int32 [I, levels] name, f32 [I, D]; the first levels alone are allowed."""
    codes = jnp.asarray(codes)
    return sum(codebook[codes[:, level]] for level, codebook in enumerate(fitted.centroids[: codes.shape[1]]))


def encode_together(fitted: Residual, x: np.ndarray | jax.Array, config: BalancedConfig) -> jax.Array:
    """The codes of a whole catalogue x f32 [I, D], int32 [I, levels]: balanced levels keep their bound strictly.

    Where `encode` gives a cluster too many rows, those whose error rises least are moved to another cluster.
    """
    x = jnp.asarray(check_rows(x, 0))
    check_width(x, fitted.width)
    codes = []
    for centroids, prices in zip(fitted.centroids, fitted.prices, strict=True):
        if prices is None:
            level = _codes(Residual((centroids,), (None,)), x)[:, 0]
        else:
            level = jnp.asarray(balanced.assign_within(x, centroids, prices, config.slack))
        codes.append(level)
        x = x - centroids[level]
    return jnp.stack(codes, axis=-1)


def _encode_rows(fitted: Residual, rows: Rows) -> tuple[jax.Array, jax.Array]:
    return kmeans.row_by_row(lambda x, fitted: _encode(fitted, x), rows.mesh, rows.x, fitted)


@jax.jit
def _codes(fitted: Residual, x: jax.Array) -> jax.Array:
    """The codes of `_encode` alone; the residuals, as large as x, are then never computed."""
    return _encode(fitted, x)[0]


@jax.jit
def _encode(fitted: Residual, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes int32 [I, levels], and the residual, f32 [I, D]."""
    finders = [nearest(*level) for level in zip(fitted.centroids, fitted.prices, strict=True)]

    def of_rows(rows):
        # All levels of a chunk while it is in the cache.
        codes = []
        for find, centroids in zip(finders, fitted.centroids, strict=True):
            codes.append(find(rows))
            rows = rows - centroids[codes[-1]]
        return jnp.stack(codes, axis=-1), rows

    return by_chunk(of_rows, x, chunk_rows(max(fitted.sizes)))
