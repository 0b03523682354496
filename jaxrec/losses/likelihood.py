"""Likelihoods: of a semantic ID's tokens (OneMall Eq. 7, first line), and of one item among all or some of a catalogue.

`full_softmax` is the cross-entropy over the whole catalogue that SASRec's reproductions train with; `sampled_softmax`
is YouTubeDNN's (Covington et al. 2016) and `binary` SASRec's as published (Kang & McAuley 2018, Eq. 6).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def next_token(log_probs: jax.Array, where: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target: the sum of its tokens' -log p.

    log_probs [..., M] of the true tokens, where [...] bool: which targets exist. Returns [...], 0 where there is none.

    >>> next_token(jnp.log(jnp.array([[0.5, 0.25]])), jnp.array([True])).round(3)
    Array([2.079], dtype=float32)
    """
    return jnp.where(where, -log_probs.sum(-1), 0.0)


def sampled_softmax(
    positive: jax.Array,
    negatives: jax.Array,
    *,
    log_q_positive: jax.Array,
    log_q_negatives: jax.Array,
    candidates: jax.Array,
    where: jax.Array,
) -> jax.Array:
    """-log softmax of each target's score among its own and those of drawn items, corrected for how they were drawn.

    From every score the log of the expected number of draws of its item is subtracted, so that the loss tends to the
    full softmax's (Bengio & Senecal 2008; Covington et al. 2016, section 3.1).

    positive [...], negatives [..., n]; log_q_positive [...] and log_q_negatives (broadcast to negatives): log of the
    probability of an item in one draw; candidates bool, broadcast to negatives: which drawn items count, those that
    are the target itself left out; where bool [...]. Returns [...] in float32, 0 where masked.

    >>> same = dict(log_q_positive=jnp.zeros(1), log_q_negatives=jnp.zeros(3), where=jnp.ones(1, bool))
    >>> sampled_softmax(jnp.zeros(1), jnp.zeros((1, 3)), candidates=jnp.array([[True, False, False]]), **same).round(3)
    Array([0.693], dtype=float32)
    """
    own = positive.astype(jnp.float32) - log_q_positive
    others = jnp.where(candidates, negatives.astype(jnp.float32) - log_q_negatives, -jnp.inf)
    everything = jnp.logaddexp(own, jax.nn.logsumexp(jnp.where(where[..., None], others, 0.0), axis=-1))
    return jnp.where(where, everything - own, 0.0)


def binary(positive: jax.Array, negatives: jax.Array, *, candidates: jax.Array, where: jax.Array) -> jax.Array:
    """-log sigmoid(positive) - sum over the drawn items of log(1 - sigmoid(negative)) (SASRec Eq. 6 has one of them).

    positive [...]; negatives [..., n]; candidates bool [..., n]: which of them count; where bool [...]. Returns [...]
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
    rows: int = 128,
) -> jax.Array:
    """-log softmax of each target's item among all items, without the logits of all targets ever being there at once.

        -(1 - a) log p(target) - a / I * sum over items of log p(item),    p = softmax(states @ table.T),   a smoothing

    Targets that exist are moved to the front and worked through `rows` at a time, so that a chunk's logits stay in the
    cache; chunks without a target cost nothing. The gradient makes the logits again.

    Args:
      states: [T, D].
      table: the items' vectors [I, D].
      targets: int32 [T].
      where: bool [T]: which targets exist.
      label_smoothing: the share of the probability that is spread over all items.
      rows: targets in a chunk; 0 for all at once, which is what a mesh of several devices needs.

    Returns:
      float32 [T], 0 where masked.

    >>> full_softmax(jnp.zeros((1, 2)), jnp.ones((4, 2)), jnp.array([3]), where=jnp.ones(1, bool)).round(3)
    Array([1.386], dtype=float32)
    """
    states, table = states.astype(jnp.float32), table.astype(jnp.float32)
    if rows:
        normaliser = _log_normaliser(states, table, where, rows)
    else:
        normaliser = jax.nn.logsumexp(states @ table.T, axis=-1)
    # The mean of an item's logit over the items is the logit of their mean vector.
    goal = (1 - label_smoothing) * table[targets] + label_smoothing * table.mean(0)
    return jnp.where(where, normaliser - (states * goal).sum(-1), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_normaliser(states: jax.Array, table: jax.Array, where: jax.Array, rows: int) -> jax.Array:
    """log sum over items of exp(states @ table.T): [T], 0 where masked."""
    return _normaliser_forward(states, table, where, rows)[0]


def _normaliser_forward(states, table, where, rows):
    order, packed, chunks = _pack(states, where, rows)

    def work(chunk, out):
        x = jax.lax.dynamic_slice_in_dim(packed, chunk * rows, rows)
        return jax.lax.dynamic_update_slice_in_dim(out, jax.nn.logsumexp(x @ table.T, axis=-1), chunk * rows, 0)

    normaliser = jax.lax.fori_loop(0, chunks, work, jnp.zeros(len(packed), jnp.float32))
    out = jnp.where(where, jnp.zeros(len(states), jnp.float32).at[order].set(normaliser[: len(states)]), 0.0)
    return out, (states, table, where, out)


def _normaliser_backward(rows, kept, gradient):
    states, table, where, normaliser = kept
    order, packed, chunks = _pack(states, where, rows)
    spare = (0, len(packed) - len(states))
    # Rows without a target get weight 0.
    weight = jnp.pad(jnp.where(where, gradient, 0.0)[order], spare)
    shift = jnp.pad(normaliser[order], spare)

    def work(chunk, carry):
        d_packed, d_table = carry
        x, g, s = (jax.lax.dynamic_slice_in_dim(each, chunk * rows, rows) for each in (packed, weight, shift))
        p = jnp.exp(x @ table.T - s[:, None]) * g[:, None]
        d_packed = jax.lax.dynamic_update_slice_in_dim(d_packed, p @ table, chunk * rows, 0)
        return d_packed, d_table + p.T @ x

    d_packed, d_table = jax.lax.fori_loop(0, chunks, work, (jnp.zeros_like(packed), jnp.zeros_like(table)))
    d_states = jnp.zeros_like(states).at[order].set(d_packed[: len(states)])
    return d_states, d_table, np.zeros(where.shape, jax.dtypes.float0)


_log_normaliser.defvjp(_normaliser_forward, _normaliser_backward)


def _pack(states: jax.Array, where: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order that puts existing targets first, the states in it (filled up with zeros), chunks that hold any."""
    order = jnp.argsort(~where, stable=True)
    packed = jnp.pad(jnp.where(where[order][:, None], states[order], 0.0), ((0, -len(states) % rows), (0, 0)))
    return order, packed, (where.sum() + rows - 1) // rows
