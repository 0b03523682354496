"""Vectors: unit length, and principal axes."""

import jax
import jax.numpy as jnp
import numpy as np


def unit(x: jax.Array) -> jax.Array:
    """x [..., D] divided by its length, [..., D]. A vector of zeros stays zero, with gradient zero.

    With jnp.linalg.norm its gradient would be NaN, and one such vector would make all weights NaN.
    """
    square = jnp.square(x).sum(-1, keepdims=True)
    there = square > 1e-24
    return jnp.where(there, x * jax.lax.rsqrt(jnp.where(there, square, 1.0)), 0.0)


def principal_axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The principal axes of centred x [n, D] as columns, f64 [D, D], and the sum of squares along each, f64 [D].

    Returns (sums of squares, axes), the largest first.
    """
    squares, axes = np.linalg.eigh(x.astype(np.float64, copy=False).T @ x)
    return squares[::-1], axes[:, ::-1]
