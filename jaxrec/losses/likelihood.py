"""Next-token likelihood of semantic IDs (OneMall Eq. 7, first line)."""

import jax
import jax.numpy as jnp


def next_token(log_probs: jax.Array, where: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target: the sum of its tokens' -log p.

    log_probs [..., M] of the true tokens, where [...] bool: which targets exist. Returns [...], 0 where there is none.

    >>> next_token(jnp.log(jnp.array([[0.5, 0.25]])), jnp.array([True])).round(3)
    Array([2.079], dtype=float32)
    """
    return jnp.where(where, -log_probs.sum(-1), 0.0)
