"""Losses of ranking models: what follows when an item is shown, one value per candidate.

    clicked, purchased     binary cross-entropy of a tower's logits, masked to the candidates that it is defined for
    purchased, entire      P(purchase) = P(click) P(purchase | click) over everything that was shown (ESMM, Ma et al.
    space                  2018, Eq. 2-3): the conversion tower learns from all exposures, not from clicked ones alone
    price                  squared error of the log of a purchase's price

All of it is computed from logits in float32, so that a probability near 0 or 1 costs no precision.
"""

import jax
import jax.numpy as jnp


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, *, where: jax.Array) -> jax.Array:
    """-y log sigmoid(z) - (1 - y) log(1 - sigmoid(z)) of each candidate.

    logits [...]; labels bool or float [...], 0 to 1; where bool [...]. Returns float32 [...], 0 where masked.

    >>> binary_cross_entropy(jnp.zeros(2), jnp.array([1, 0]), where=jnp.array([True, False])).round(3)
    Array([0.693, 0.   ], dtype=float32)
    """
    logits = jnp.where(where, logits, 0.0).astype(jnp.float32)
    labels = jnp.where(where, labels, 0).astype(jnp.float32)
    return jnp.where(where, jax.nn.softplus(logits) - labels * logits, 0.0)


def entire_space(clicks: jax.Array, conversions: jax.Array, purchased: jax.Array, *, where: jax.Array) -> jax.Array:
    """Cross-entropy of P(purchase | shown) = sigmoid(clicks) sigmoid(conversions) over all candidates (ESMM Eq. 3).

    clicks, conversions: logits [...] of the two towers; purchased bool [...]; where bool [...]: what was shown, clicked
    or not. Returns float32 [...], 0 where masked.

    >>> entire_space(jnp.zeros(2), jnp.zeros(2), jnp.array([1, 0]), where=jnp.ones(2, bool)).round(3)  # log 4, log 4/3
    Array([1.386, 0.288], dtype=float32)
    """
    clicks, conversions = (jnp.where(where, each, 0.0).astype(jnp.float32) for each in (clicks, conversions))
    clicked = jax.nn.log_sigmoid(clicks)
    both = clicked + jax.nn.log_sigmoid(conversions)
    # 1 - a b = (1 - a) + a (1 - b): a sum of positive terms, exact however small the product is.
    neither = jnp.logaddexp(jax.nn.log_sigmoid(-clicks), clicked + jax.nn.log_sigmoid(-conversions))
    return jnp.where(where, -jnp.where(purchased, both, neither), 0.0)


def log_price_error(predicted: jax.Array, log_price: jax.Array, *, where: jax.Array) -> jax.Array:
    """(predicted - log price)^2 / 2 of each candidate.

    exp of what is learned is the geometric mean of the prices. predicted, log_price [...]; where bool [...]: purchases
    with a known price. Returns float32 [...], 0 where masked.

    >>> log_price_error(jnp.array([1.0, 5.0]), jnp.array([3.0, jnp.nan]), where=jnp.array([True, False]))
    Array([2., 0.], dtype=float32)
    """
    error = jnp.where(where, predicted, 0.0) - jnp.where(where, log_price, 0.0)
    return jnp.where(where, 0.5 * jnp.square(error.astype(jnp.float32)), 0.0)
