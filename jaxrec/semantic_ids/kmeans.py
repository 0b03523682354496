"""k-means in JAX: k-means++ start, rows in chunks, empty clusters seeded again, stop at a tolerance."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError


@dataclass(frozen=True)
class KMeansConfig:
    """How a k-means is run; its number of clusters is given with the data."""

    iterations: int = 50
    """The most Lloyd iterations."""
    tolerance: float = 1e-4
    """Stop when the centroids move less than this share of the data's variance (mean over coordinates, squared)."""
    start_rows: int = 16384
    """Rows that k-means++ looks at; more are sampled down."""
    chunk_rows: int = 2048
    """Rows whose distances are held at once: bounds the memory, and keeps the distances in the processor's cache."""


class KMeans(NamedTuple):
    """A fitted k-means: centroids f32 [K, D], assignment int32 [I], inertia f32 [] (sum of squared distances)."""

    centroids: jax.Array
    assignment: jax.Array
    inertia: jax.Array


def kmeans(key: jax.Array, x: np.ndarray | jax.Array, k: int, config: KMeansConfig = KMeansConfig()) -> KMeans:
    """Cluster rows x f32 [I, D] into k clusters.

    Raises:
      UserError: fewer rows than clusters, or a row with NaN or infinity.
    """
    x = jnp.asarray(x, jnp.float32)
    check_rows(x, k)
    sample_key, start_key = jax.random.split(key)
    sample = x
    if len(x) > (most := max(config.start_rows, 4 * k)):
        sample = x[jnp.sort(jax.random.choice(sample_key, len(x), (most,), replace=False))]
    return lloyd(x, plus_plus(start_key, sample, k), config)


def check_rows(x: np.ndarray | jax.Array, k: int) -> None:
    """UserError when x [I, D] cannot be clustered into k clusters."""
    if x.ndim != 2:
        raise UserError(f"embeddings must be a matrix [items, width], but have shape {x.shape}")
    if len(x) < k:
        raise UserError(f"{len(x)} rows cannot fill a codebook of {k} codes: choose smaller codebooks (ids.levels)")
    if len(bad := np.flatnonzero(~np.isfinite(np.asarray(x)).all(axis=1))):
        raise UserError(f"row {bad[0]} of the embeddings holds NaN or infinity ({len(bad)} such rows): mend them first")


@partial(jax.jit, static_argnums=2)
def plus_plus(key: jax.Array, x: jax.Array, k: int) -> jax.Array:
    """Greedy k-means++: each next centroid is the best of 2 + log k rows drawn by squared distance, f32 [k, D]."""
    candidates = 2 + int(np.log(k))
    squares = jnp.sum(x * x, axis=-1)
    first_key, key = jax.random.split(key)
    first = x[jax.random.randint(first_key, (), 0, len(x))]

    def add(nearest, key):
        # Inverse of the cumulative sum: one uniform number a candidate, where a categorical draw needs one per row.
        mass = jnp.cumsum(nearest)
        drawn = jnp.searchsorted(mass, jax.random.uniform(key, (candidates,)) * mass[-1], side="right")
        rows = x[jnp.minimum(drawn, len(x) - 1)]
        distances = squares[:, None] - 2 * x @ rows.T + jnp.sum(rows * rows, axis=-1)
        reached = jnp.minimum(nearest[:, None], jnp.maximum(distances, 0))
        best = jnp.argmin(reached.sum(0))
        return reached[:, best], rows[best]

    nearest = jnp.sum((x - first) ** 2, axis=-1)
    _, rest = jax.lax.scan(add, nearest, jax.random.split(key, k - 1))
    return jnp.concatenate([first[None], rest])


@partial(jax.jit, static_argnames="config")
def lloyd(x: jax.Array, centroids: jax.Array, config: KMeansConfig) -> KMeans:
    """Lloyd iterations from given centroids f32 [K, D] until they rest, or for config.iterations."""
    limit = config.tolerance * jnp.mean(jnp.var(x, axis=0))

    def going(state):
        iteration, _, moved, empty = state
        return (iteration < config.iterations) & ((moved > limit) | empty)

    def iterate(state):
        iteration, centroids, _, _ = state
        assignment, distances = assign(x, centroids, config.chunk_rows)
        counts = jax.ops.segment_sum(jnp.ones(len(x)), assignment, len(centroids))
        sums = jax.ops.segment_sum(x, assignment, len(centroids))
        updated = jnp.where((counts == 0)[:, None], centroids, sums / jnp.maximum(counts, 1)[:, None])
        updated, seeded = jax.lax.cond(
            (counts == 0).any(), seed_empty, lambda c, *_: (c, False), updated, counts == 0, x, distances
        )
        moved = jnp.mean((updated - centroids) ** 2)
        return iteration + 1, updated, moved, seeded

    start = (0, centroids, jnp.inf, False)
    _, centroids, _, _ = jax.lax.while_loop(going, iterate, start)
    assignment, distances = assign(x, centroids, config.chunk_rows)
    return KMeans(centroids, assignment, distances.sum())


def seed_empty(
    centroids: jax.Array, empty: jax.Array, x: jax.Array, distances: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Move empty centroids (bool [K]) to the rows worst served, by distances f32 [I]; also returns whether any moved.

    A row that lies on a centroid is no better place, so data with fewer distinct rows than clusters comes to rest too.
    """
    far, rows = jax.lax.top_k(distances, min(len(centroids), len(x)))
    rank = jnp.cumsum(empty) - 1
    moved = empty & (far[rank] > 0)
    return jnp.where(moved[:, None], x[rows[rank]], centroids), moved.any()


@partial(jax.jit, static_argnames="chunk_rows")
def assign(x: jax.Array, centroids: jax.Array, chunk_rows: int = 2048) -> tuple[jax.Array, jax.Array]:
    """The nearest centroid of each row, int32 [I], the first of equals, and its squared distance, f32 [I]."""
    squares = jnp.sum(centroids * centroids, axis=-1)

    def one_chunk(rows):
        partial_distances = squares - 2 * rows @ centroids.T
        return jnp.argmin(partial_distances, axis=-1).astype(jnp.int32)

    chunk = min(chunk_rows, len(x))
    chunks = -(-len(x) // chunk)
    padded = jnp.pad(x, ((0, chunks * chunk - len(x)), (0, 0))).reshape(chunks, chunk, -1)
    assignment = jax.lax.map(one_chunk, padded).reshape(-1)[: len(x)]
    # The distance by difference, as |x|^2 - 2xc + |c|^2 loses all digits for rows near their centroid.
    return assignment, jnp.sum((x - centroids[assignment]) ** 2, axis=-1)
