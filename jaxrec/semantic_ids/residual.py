"""Residual k-means: each level clusters what the levels before it left over (OneMall Eq. 1-2)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.semantic_ids.kmeans import KMeansConfig, assign, kmeans

Centroids = tuple[jax.Array, ...]


def fit(key: jax.Array, x: np.ndarray | jax.Array, levels: Sequence[int], config: KMeansConfig) -> Centroids:
    """One codebook f32 [K, D] a level, from x f32 [I, D] (OneMall Eq. 1).

    Raises:
      UserError: fewer rows than codes, or a row with NaN or infinity.
    """
    residual, centroids = jnp.asarray(x, jnp.float32), []
    for level, k in enumerate(levels):
        fitted = kmeans(jax.random.fold_in(key, level), residual, k, config)
        centroids.append(fitted.centroids)
        residual = residual - fitted.centroids[fitted.assignment]
    return tuple(centroids)


def encode(centroids: Centroids, x: np.ndarray | jax.Array) -> jax.Array:
    """The codes of x f32 [I, D], int32 [I, levels] (OneMall Eq. 2)."""
    residual, codes = jnp.asarray(x, jnp.float32), []
    for codebook in centroids:
        nearest, _ = assign(residual, codebook)
        codes.append(nearest)
        residual = residual - codebook[nearest]
    return jnp.stack(codes, axis=-1) if codes else jnp.zeros((len(residual), 0), jnp.int32)


def decode(centroids: Centroids, codes: np.ndarray | jax.Array) -> jax.Array:
    """The sum of the centroids that codes int32 [I, levels] name, f32 [I, D]; the first levels alone are allowed."""
    return sum(codebook[codes[:, level]] for level, codebook in enumerate(centroids[: codes.shape[1]]))
