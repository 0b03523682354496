"""Likelihoods: of a target's tokens (OneMall Eq. 7, first line), and of one item among all or some of a catalogue.

`full_softmax` is the cross-entropy over the whole catalogue that SASRec's reproductions train with; `sampled_softmax`
is YouTubeDNN's (Covington et al. 2016) and `binary` SASRec's as published (Kang & McAuley 2018, Eq. 6).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 256
"""targets in a chunk of `full_softmax`"""


def log_likelihood(log_probs: jax.Array, where: jax.Array) -> jax.Array:
    """The log-probability of each target: the sum of its tokens' (pi of RankGR Eq. 5).

    log_probs [..., M] of the true tokens; where bool [...]: mask of the targets, or [..., M]: mask of the tokens, for
    targets of unequal length. Returns [...], 0 where masked.

    >>> log_likelihood(jnp.log(jnp.array([[0.5, 0.25]])), jnp.array([[True, False]])).round(3)
    Array([-0.693], dtype=float32)
    """
    where = where if where.ndim == log_probs.ndim else where[..., None]
    return jnp.where(where, log_probs, 0.0).sum(-1)


def next_token(
    log_probs: jax.Array, where: jax.Array, *, mean_log_probs: jax.Array | None = None, smoothing: float = 0.0
) -> jax.Array:
    """Negative log-likelihood of each target, with optional label smoothing (Szegedy et al. 2016).

        - sum over m of (1 - a) log p_m + a / K * sum over the K tokens of the level of log p,    a the smoothing

    log_probs and where as for `log_likelihood`; mean_log_probs [..., M], for smoothing only: the mean log-probability
    of the level's tokens. Returns [...], 0 where masked.

    >>> next_token(jnp.log(jnp.array([[0.5, 0.25]])), jnp.array([True])).round(3)
    Array([2.079], dtype=float32)
    """
    if smoothing:
        log_probs = (1 - smoothing) * log_probs + smoothing * mean_log_probs
    return -log_likelihood(log_probs, where)


def sampled_softmax(
    positive: jax.Array, negatives: jax.Array, *, log_draws: jax.Array, candidates: jax.Array, where: jax.Array
) -> jax.Array:
    """-log softmax of each target's score among all items, estimated from sampled negatives.

        -log exp(s_t) / (exp(s_t) + sum over drawn j != t of exp(s_j - log n q_j))

    The logQ correction divides the weight of an item by its expected number of draws n q_j, so that the expectation of
    the sum is that over all other items (Bengio & Senecal 2008; Covington et al. 2016, section 3.1).

    positive [...]; negatives [..., n]; log_draws, broadcast to negatives: log of the item's expected number of draws;
    candidates bool, broadcast to negatives: mask of the negatives, False for the target itself; where bool [...].
    Returns [...] in float32, 0 where masked.

    >>> sampled_softmax(
    ...     jnp.zeros(1), jnp.zeros((1, 2)), log_draws=jnp.log(jnp.array([1.0, 0.5])),
    ...     candidates=jnp.ones((1, 2), bool), where=jnp.ones(1, bool),
    ... ).round(3)
    Array([1.386], dtype=float32)
    """
    own = positive.astype(jnp.float32)
    # Finite, so that a target without negatives has gradient zero.
    others = jnp.where(candidates, negatives.astype(jnp.float32) - log_draws, -1e30)
    return jnp.where(where, jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own, 0.0)


def binary(positive: jax.Array, negatives: jax.Array, *, candidates: jax.Array, where: jax.Array) -> jax.Array:
    """-log sigmoid(positive) - sum over negatives of log(1 - sigmoid(negative)) (SASRec Eq. 6 has one negative).

    positive [...]; negatives [..., n]; candidates bool [..., n]: mask of the negatives; where bool [...]. Returns [...]
    in float32, 0 where masked.

    >>> binary(jnp.zeros(1), jnp.zeros((1, 1)), candidates=jnp.ones((1, 1), bool), where=jnp.ones(1, bool)).round(3)
    Array([1.386], dtype=float32)
    """
    drawn = jnp.where(candidates, jax.nn.softplus(negatives.astype(jnp.float32)), 0.0).sum(-1)
    return jnp.where(where, jax.nn.softplus(-positive.astype(jnp.float32)) + drawn, 0.0)


def full_softmax(
    states: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    where: jax.Array,
    label_smoothing: float = 0.0,
    rows: int = ROWS,
) -> jax.Array:
    """Cross-entropy of each target's item over all items, computed in chunks of targets.

        -(1 - a) log p(target) - a / I * sum over items of log p(item),    p = softmax(states @ table.T),   a smoothing

    The logits of all targets are never in memory together. Unmasked targets are moved to the front and computed in
    chunks of `rows`, whose logits stay in the cache; empty chunks are skipped. Gradients are computed with the values,
    from the same logits.

    Args:
      states: [T, D].
      table: the items' vectors [I, D].
      targets: int32 [T].
      where: bool [T]: mask of the targets.
      label_smoothing: share of the probability that is spread over all items.
      rows: targets in a chunk; 0 computes all targets at once. Under a mesh of several devices all targets are always
        computed at once, since the targets of a chunk would be on few of the devices.

    Returns:
      float32 [T], 0 where masked.

    >>> full_softmax(jnp.zeros((1, 2)), jnp.ones((4, 2)), jnp.array([3]), where=jnp.ones(1, bool)).round(3)
    Array([1.386], dtype=float32)
    """
    states, table = states.astype(jnp.float32), table.astype(jnp.float32)
    if rows and jax.sharding.get_abstract_mesh().size <= 1:
        normaliser = _log_normaliser(states, table, where, rows)
    else:
        normaliser = jax.nn.logsumexp(states @ table.T, axis=-1)
    # The mean of the logits over the items is the logit of the mean vector.
    goal = (1 - label_smoothing) * table[targets] + label_smoothing * table.mean(0)
    return jnp.where(where, normaliser - (states * goal).sum(-1), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_normaliser(states: jax.Array, table: jax.Array, where: jax.Array, rows: int) -> jax.Array:
    """log sum over items of exp(states @ table.T): [T], 0 where masked."""
    order, packed, chunks = _pack(states, where, rows)

    def work(chunk, out):
        x = jax.lax.dynamic_slice_in_dim(packed, chunk * rows, rows)
        return jax.lax.dynamic_update_slice_in_dim(out, jax.nn.logsumexp(x @ table.T, axis=-1), chunk * rows, 0)

    found = jax.lax.fori_loop(0, chunks, work, jnp.zeros(len(packed), jnp.float32))
    return jnp.where(where, _unpack(found, order), 0.0)


def _normaliser_forward(states, table, where, rows):
    """Values and gradients: those of every target's state, and of the table if all targets have weight 1."""
    order, packed, chunks = _pack(states, where, rows)
    real = jnp.arange(len(packed)) < where.sum()

    def work(chunk, carry):
        found, d_packed, d_table = carry
        x, w = (jax.lax.dynamic_slice_in_dim(each, chunk * rows, rows) for each in (packed, real))
        logits = x @ table.T
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        p = jnp.exp(logits - jnp.where(w, normaliser, jnp.inf)[:, None])
        found = jax.lax.dynamic_update_slice_in_dim(found, normaliser, chunk * rows, 0)
        d_packed = jax.lax.dynamic_update_slice_in_dim(d_packed, p @ table, chunk * rows, 0)
        return found, d_packed, d_table + p.T @ x

    empty = (jnp.zeros(len(packed), jnp.float32), jnp.zeros_like(packed), jnp.zeros_like(table))
    found, d_packed, d_table = jax.lax.fori_loop(0, chunks, work, empty)
    out = jnp.where(where, _unpack(found, order), 0.0)
    return out, (states, table, where, out, _unpack(d_packed, order), d_table)


def _normaliser_backward(rows, kept, gradient):
    states, table, where, normaliser, d_states, d_table = kept
    gradient = jnp.where(where, gradient, 0.0)
    # In a mean all targets have the same weight; else the table's gradient is computed again.
    weight = gradient[jnp.argmax(where)]
    d_table = jax.lax.cond(
        ((gradient == weight) | ~where).all(),
        lambda: weight * d_table,
        lambda: _table_gradient(states, table, where, normaliser, gradient, rows),
    )
    return gradient[:, None] * d_states, d_table, np.zeros(where.shape, jax.dtypes.float0)


def _table_gradient(states, table, where, normaliser, gradient, rows):
    order, packed, chunks = _pack(states, where, rows)
    spare = (0, len(packed) - len(states))
    weight, shift = jnp.pad(gradient[order], spare), jnp.pad(normaliser[order], spare)

    def work(chunk, d_table):
        x, g, s = (jax.lax.dynamic_slice_in_dim(each, chunk * rows, rows) for each in (packed, weight, shift))
        p = jnp.exp(x @ table.T - s[:, None])
        return d_table + p.T @ (g[:, None] * x)

    return jax.lax.fori_loop(0, chunks, work, jnp.zeros_like(table))


_log_normaliser.defvjp(_normaliser_forward, _normaliser_backward)


def _pack(states: jax.Array, where: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order with unmasked targets first, the states in it (padded with zeros), and the number of nonempty
    chunks."""
    order = jnp.argsort(~where, stable=True)
    packed = jnp.pad(jnp.where(where[order][:, None], states[order], 0.0), ((0, -len(states) % rows), (0, 0)))
    return order, packed, (where.sum() + rows - 1) // rows


def _unpack(packed: jax.Array, order: jax.Array) -> jax.Array:
    """The inverse of `_pack`'s order."""
    return jnp.zeros((len(order), *packed.shape[1:]), packed.dtype).at[order].set(packed[: len(order)])
