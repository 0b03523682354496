"""In-batch contrastive losses with correction for how often an item is drawn (OneMall Eq. 7, second line)."""

import jax
import jax.numpy as jnp


def in_batch_softmax(
    scores: jax.Array, *, positive: jax.Array, candidates: jax.Array, log_q: jax.Array | None = None
) -> jax.Array:
    """-log softmax of each row's own candidate among the batch's candidates.

    scores [R, C]; positive int32 [R]: the column that belongs to the row; candidates bool [R, C]: which columns the row
    is compared with (leave out the row's other positives and copies of the same item); log_q [C]: log of the
    probability that the column's item is drawn into a batch, subtracted from the scores so that popular items are not
    punished for being drawn often (Yi et al. 2019). Returns [R]; a row whose candidates are all masked gives 0.

    >>> everything = jnp.ones((1, 4), bool)
    >>> in_batch_softmax(jnp.zeros((1, 4)), positive=jnp.array([2]), candidates=everything).round(3)
    Array([1.386], dtype=float32)
    """
    corrected = scores if log_q is None else scores - log_q
    own = jax.nn.one_hot(positive, scores.shape[1], dtype=bool)
    corrected = jnp.where(candidates | own, corrected.astype(jnp.float32), -1e30)
    loss = jax.nn.logsumexp(corrected, axis=1) - jnp.take_along_axis(corrected, positive[:, None], axis=1)[:, 0]
    return jnp.where(candidates.any(1), loss, 0.0)
