"""Samples of whole IDs without replacement, by stochastic beam search (Kool et al. 2019).

Add independent Gumbel noise to the log-probability of every ID: the n largest sums are n draws without replacement. The
search finds them without visiting all IDs: the largest below a prefix is itself Gumbel, located at the prefix's
log-probability. So each prefix carries that maximum, its children's variables are drawn conditionally on it, and the n
prefixes of largest maximum contain the n IDs.

The distribution sampled from is the model's at a temperature, restricted to the trie and the filter level by level: at
each prefix, softmax(log p / temperature) over the codes that lead to an allowed item.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrec.config import UserError
from jaxrec.decoding.filters import ItemFilter
from jaxrec.decoding.step import Beams, Extend, as_filter, children_grid, extended, filled, grown, reorder, root
from jaxrec.decoding.top import top, top_capped
from jaxrec.decoding.trie import Trie


@flax.struct.dataclass
class Rollouts:
    """n distinct IDs of each of B requests, in the order of the draws."""

    codes: jax.Array
    """int32 [B, n, M], -1 where there are no more IDs."""
    leaf: jax.Array
    """int32 [B, n], the ID's rank among the catalogue's sorted IDs; -1 where there is none."""
    valid: jax.Array
    """bool [B, n]"""
    log_probs: jax.Array
    """float32 [B, n], the model's, at temperature 1 over all codes, as in `beam_search`; -inf for none."""
    sampling_log_probs: jax.Array
    """float32 [B, n], under the distribution sampled from; exp of them sums to 1 over all allowed IDs."""
    perturbed: jax.Array
    """float32 [B, n], sampling_log_probs + Gumbel noise, falling; -inf for none."""
    threshold: jax.Array
    """float32 [B], the largest perturbed score that was not drawn, -inf if all were; NaN with `per_prefix`."""
    nan: jax.Array
    """bool [B], the model gave NaN or +inf for this request, which then has no valid sample; callers report it."""

    def inclusion_log_probs(self) -> jax.Array:
        """float32 [B, n], log P(perturbed > threshold) of each sample, the denominator of importance weights.

        sum(exp(sampling_log_probs - inclusion_log_probs) * f) over the samples is an unbiased estimate of the
        expectation of f (Kool et al. 2019 Eq. 8); 0 where all IDs were drawn.
        """
        rate = jnp.exp(self.sampling_log_probs - self.threshold[:, None])
        inclusion = jnp.log(-jnp.expm1(-rate))
        return jnp.where(self.valid, jnp.where(self.threshold[:, None] == -jnp.inf, 0.0, inclusion), -jnp.inf)


def rollout(
    extend: Extend,
    cache: Any,
    trie: Trie,
    key: jax.Array,
    *,
    batch: int,
    samples: int,
    temperature: float | jax.Array = 1.0,
    allowed: jax.Array | ItemFilter | None = None,
    per_prefix: int | None = None,
) -> Rollouts:
    """`samples` IDs without replacement; fewer where fewer are allowed. The same key gives the same samples.

    Args:
        extend: as in `beam_search`.
        cache: as in `beam_search`.
        trie: of IDs.
        key: a jax.random key; request b draws from `fold_in(key, b)`, independently of the rest of the batch.
        batch: B.
        samples: n; the model extends n + 1 beams, the last gives `threshold`.
        temperature: above 0; higher values flatten the distribution.
        allowed: as in `beam_search`.
        per_prefix: the most samples with the same first code; the first draws are kept. The result is then no sample
            without replacement from the whole, so there is no threshold and no importance weight.

    Raises:
        UserError: samples, per_prefix or temperature too small, a trie of texts, `allowed` or log_probs of a wrong
            shape.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}: ask for at least one.")
    if per_prefix is not None and per_prefix < 1:
        raise UserError(f"per_prefix is {per_prefix}: allow at least one sample a first code.")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise UserError(f"temperature is {temperature}: give a number above 0.")
    if trie.eos is not None:
        raise UserError("the trie holds texts: rollouts are of IDs.")
    item_filter = as_filter(trie, allowed, batch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    beams = root(trie, batch)
    sampling = jnp.zeros((batch, 1))
    perturbed = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, trie.levels), (1,)))(keys)
    for level in range(trie.levels):
        log_probs, cache = extended(extend, beams, cache, level, trie.codebook_sizes[level])
        grid = children_grid(log_probs, beams, trie, level, item_filter)
        child_sampling = sampling[..., None] + _normalised(grid.log_probs / temperature)
        noise = jax.vmap(lambda k, shape=grid.log_probs.shape[1:]: jax.random.gumbel(k, shape))(
            jax.vmap(jax.random.fold_in, (0, None))(keys, level)
        )
        scores = _conditioned(child_sampling + noise, perturbed[..., None])
        flat = scores.reshape(batch, -1)
        if per_prefix is not None and level:
            perturbed, index = top_capped(scores, beams.codes[..., 0], per_prefix, samples + 1)
        else:
            perturbed, index = top(flat, min(samples + 1, trie.nodes(level), flat.shape[1]))
        sampling = jnp.take_along_axis(child_sampling.reshape(batch, -1), index, axis=1)
        beams, parents = _grown(beams, trie, level, grid, perturbed, index)
        if level < trie.levels - 1:
            cache = reorder(cache, parents)
    return _result(beams, sampling, perturbed, samples, per_prefix is not None)


def _normalised(scores: jax.Array) -> jax.Array:
    """log softmax over the last axis; all -inf where all are."""
    largest = jnp.max(scores, axis=-1, keepdims=True)
    total = jnp.log(jnp.exp(scores - jnp.where(largest > -jnp.inf, largest, 0)).sum(-1, keepdims=True)) + largest
    return jnp.where(scores > -jnp.inf, scores - total, -jnp.inf)


def _conditioned(scores: jax.Array, maximum: jax.Array) -> jax.Array:
    """Gumbel variables [..., n] given that the largest of them is `maximum` [..., 1] (Kool et al. 2019, appendix B).

    -log(exp(-maximum) - exp(-largest) + exp(-scores)), in a form that neither overflows nor cancels.
    """
    alive = (scores > -jnp.inf) & (maximum > -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    safe = jnp.where(alive, scores, 0.0)
    below = jnp.where(alive, jnp.minimum(safe - largest, 0.0), 0.0)
    # log(1 - exp(below)): -inf for the largest itself, which becomes `maximum` exactly.
    rest = jnp.where(below > -0.6931472, jnp.log(-jnp.expm1(below)), jnp.log1p(-jnp.exp(below)))
    v = jnp.where(alive, maximum, 0.0) - safe + rest
    moved = maximum - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(alive, moved, -jnp.inf)


def _grown(beams: Beams, trie: Trie, level: int, grid, perturbed, index) -> tuple[Beams, jax.Array]:
    """Beams with the model's log-probabilities; dead where nothing was drawn."""
    log_probs = (beams.log_probs[..., None] + grid.log_probs).reshape(len(perturbed), -1)
    log_probs = jnp.where(perturbed > -jnp.inf, jnp.take_along_axis(log_probs, index, axis=1), -jnp.inf)
    return grown(beams, trie, level, grid, log_probs, index, in_order=False)


def _result(beams: Beams, sampling: jax.Array, perturbed: jax.Array, samples: int, is_capped: bool) -> Rollouts:
    valid = (perturbed > -jnp.inf) & ~beams.bad[:, None]

    def filled_up(values: jax.Array, fill: float) -> jax.Array:
        return filled(values, valid, samples + 1, fill)

    perturbed = filled_up(perturbed, -jnp.inf)
    threshold = jnp.full(len(perturbed), jnp.nan) if is_capped else perturbed[:, samples]
    return Rollouts(
        codes=filled_up(beams.codes, -1)[:, :samples],
        leaf=filled_up(beams.nodes, -1)[:, :samples],
        valid=filled_up(valid, False)[:, :samples],
        log_probs=filled_up(beams.log_probs, -jnp.inf)[:, :samples],
        sampling_log_probs=filled_up(sampling, -jnp.inf)[:, :samples],
        perturbed=perturbed[:, :samples],
        threshold=threshold,
        nan=beams.bad,
    )
