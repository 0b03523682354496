"""Contrastive losses, functions of similarities: in-batch softmax, margin ranking, regression to a given relevance.

OneMall Eq. 7 (second line) and §3.1.2, OneSearch Eq. 1, OneSug Eq. 1.
"""

import jax
import jax.numpy as jnp


def in_batch_softmax(
    scores: jax.Array, *, positive: jax.Array, candidates: jax.Array, log_q: jax.Array | None = None
) -> jax.Array:
    """-log softmax of each row's positive among the batch's candidates.

    scores [R, C]; positive int32 [R]: the column of the row's positive; candidates bool [R, C]: mask of the negatives
    (False for the row's other positives and copies of the same item); log_q [C]: log of the probability that the
    column's item is drawn into a batch, subtracted from the scores so that popular items, drawn often, are not
    penalised (Yi et al. 2019). Returns [R]; 0 for a row whose candidates are all masked.

    >>> everything = jnp.ones((1, 4), bool)
    >>> in_batch_softmax(jnp.zeros((1, 4)), positive=jnp.array([2]), candidates=everything).round(3)
    Array([1.386], dtype=float32)
    """
    corrected = scores if log_q is None else scores - log_q
    own = jax.nn.one_hot(positive, scores.shape[1], dtype=bool)
    corrected = jnp.where(candidates | own, corrected.astype(jnp.float32), -1e30)
    loss = jax.nn.logsumexp(corrected, axis=1) - jnp.take_along_axis(corrected, positive[:, None], axis=1)[:, 0]
    return jnp.where(candidates.any(1), loss, 0.0)


def pair_loss(scores: jax.Array, log_q: jax.Array, where: jax.Array) -> jax.Array:
    """Symmetric in-batch InfoNCE with logQ correction.

    OneMall §3.1.2; OneSearch Eq. 1, L_q2q, L_i2i and L_q2i; OneSug Eq. 1, Batch-Contrastive.

    Args:
      scores: f32 [B, B], similarity over temperature of each left (row) and right text or item; pairs on the diagonal.
      log_q: f32 [2, B], log-probability that the left and the right texts are drawn into a batch.
      where: bool [B, B], False where a column is no true negative of its row. The diagonal is always kept.

    Returns:
      One value per pair, f32 [B]; 0 for a pair without negatives in its row and column.
    """
    own = jnp.arange(len(scores))
    where = where | jnp.eye(len(scores), dtype=bool)
    right = in_batch_softmax(scores, positive=own, candidates=where, log_q=log_q[1])
    left = in_batch_softmax(scores.T, positive=own, candidates=where.T, log_q=log_q[0])
    return (left + right) / 2


def margin_rank(scores: jax.Array, levels: jax.Array, *, margin: float, where: jax.Array) -> jax.Array:
    """Margin loss: a stronger behavior's similarity exceeds a weaker one's by `margin` a level (OneSearch Eq. 1,
    L_rank).

        mean over i, j with level_i > level_j of  max(0, margin * (level_i - level_j) - (s_i - s_j))

    scores [..., L]: similarity of a query and each of its L items; levels int [..., L]: index of the item's behavior
    in a list from weak to strong; where bool [..., L]: mask of the items. Returns [...] in float32; 0 if all items have
    one level. The paper prints no formula; this is the margin loss that its text describes.

    >>> margin_rank(jnp.array([0.5, 0.75]), jnp.array([2, 0]), margin=0.25, where=jnp.ones(2, bool))
    Array(0.75, dtype=float32)
    """
    scores = scores.astype(jnp.float32)
    gap = (levels[..., :, None] - levels[..., None, :]).astype(jnp.float32)
    compared = (gap > 0) & where[..., :, None] & where[..., None, :]
    short = jnp.maximum(margin * gap - (scores[..., :, None] - scores[..., None, :]), 0.0)
    return jnp.where(compared, short, 0.0).sum((-2, -1)) / jnp.maximum(compared.sum((-2, -1)), 1)


def relevance_regression(scores: jax.Array, relevance: jax.Array, *, where: jax.Array) -> jax.Array:
    """Squared difference of a similarity and a given relevance score (OneSearch Eq. 1, L_rel).

    scores, relevance [...], on the same scale; where bool [...]. Returns [...] in float32, 0 where masked.

    >>> relevance_regression(jnp.array([0.5]), jnp.array([1.0]), where=jnp.array([True]))
    Array([0.25], dtype=float32)
    """
    distance = jnp.where(where, scores.astype(jnp.float32) - relevance.astype(jnp.float32), 0.0)
    return jnp.square(distance)
