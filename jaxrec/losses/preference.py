"""Preferences between the items of one session: listwise direct preference optimisation (RankGR Eq. 8).

Items have ordered levels (pseudo-exposure < exposure < click < purchase, or any other list). The loss scores each item
above all items of lower levels. No reward model is needed: behaviors are the preferences.
"""

import jax
import jax.numpy as jnp


def ldpo(scores: jax.Array, level: jax.Array, where: jax.Array, *, beta: float = 1.0) -> jax.Array:
    """Listwise direct preference optimisation of one session's items, summed over them (RankGR Eq. 8).

        - sum over k of log( e^(beta pi_k) / (e^(beta pi_k) + sum over i on lower levels of e^(beta pi_i)) )

    scores [..., L]: pi, an item's log-probability (`jaxrec.losses.likelihood.log_likelihood`); level int [..., L],
    higher is preferred; where bool [..., L]: the items that exist. Items of one level aren't compared, and an item of
    the lowest level has no term. Returns [...] in float32; 0 where all items have one level (`has_preference`).

    >>> ldpo(jnp.zeros(3), jnp.array([2, 1, 1]), jnp.ones(3, bool)).round(3)  # log 3
    Array(1.099, dtype=float32)
    """
    scaled = beta * scores.astype(jnp.float32)
    lower = (level[..., None, :] < level[..., :, None]) & where[..., None, :] & where[..., :, None]
    compared = lower.any(-1)
    # An item without lower levels is compared with itself, which avoids the gradient of an empty sum.
    rows = jnp.where(lower | ~compared[..., None], scaled[..., None, :], -jnp.inf)
    rows = jnp.where(compared[..., None], rows, 0.0)
    below = jax.nn.logsumexp(rows, axis=-1)
    return jnp.where(compared, jax.nn.softplus(below - jnp.where(compared, scaled, 0.0)), 0.0).sum(-1)


def has_preference(level: jax.Array, where: jax.Array) -> jax.Array:
    """Whether a session's items, [..., L], have two levels or more: bool [...]."""
    highest = jnp.where(where, level, jnp.iinfo(jnp.int32).min).max(-1)
    lowest = jnp.where(where, level, jnp.iinfo(jnp.int32).max).min(-1)
    return highest > lowest
