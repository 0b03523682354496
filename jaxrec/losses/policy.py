"""Policy optimisation over the candidates of one context: DPO of the best and the worst, GRPO, distance (OneMall §3.3).

Candidates are the packed targets of a context (`jaxrec.decoding.rollout` draws them), rewards an array [..., L]
(`jaxrec.losses.rewards`). The ratio of policy and reference is computed from log-likelihoods: a difference of
logarithms needs no guard against division by zero, so the paper's small delta in the denominator is 0 by default. It
would also outweigh the reference's probability of a whole ID, which is often below 1e-6.
"""

import math

import jax
import jax.numpy as jnp

LARGEST_LOG_RATIO = 10.0
"""beyond it a ratio grows linearly, so that it stays finite in float32"""


def advantages(reward: jax.Array, *, where: jax.Array, floor: float = 1e-6) -> jax.Array:
    """(r - mean) / deviation within each group of candidates (OneMall §3.3).

    reward [..., L]; where bool [..., L]; floor: a group whose rewards span at most this share of the largest magnitude
    counts as equal, since their differences are rounding errors. The deviation is the population's. Returns float32
    [..., L]; 0 where masked, where the reward isn't finite, in groups of equal rewards and of one candidate.

    >>> advantages(jnp.array([1.0, 3.0, 3.0, 9.0]), where=jnp.array([True, True, True, False])).round(3)
    Array([-1.414,  0.707,  0.707,  0.   ], dtype=float32)
    """
    reward = jax.lax.stop_gradient(jnp.asarray(reward, jnp.float32))
    where = where & jnp.isfinite(reward)
    reward = jnp.where(where, reward, 0.0)
    lowest = jnp.where(where, reward, jnp.inf).min(-1, keepdims=True)
    highest = jnp.where(where, reward, -jnp.inf).max(-1, keepdims=True)
    size = jnp.abs(reward).max(-1, keepdims=True)
    differ = where.any(-1, keepdims=True) & (highest - lowest > floor * size)
    # On the scale of 0 to 1 neither the mean cancels nor the squares overflow.
    scaled = (reward - jnp.where(differ, lowest, 0.0)) / jnp.where(differ, highest - lowest, 1.0)
    mean = jnp.mean(scaled, -1, keepdims=True, where=where | ~differ)
    deviation = jnp.sqrt(jnp.mean(jnp.square(scaled - mean), -1, keepdims=True, where=where | ~differ))
    return jnp.where(where & differ, (scaled - mean) / jnp.where(differ, deviation, 1.0), 0.0)


def best_against_worst(
    policy: jax.Array,
    reference: jax.Array,
    reward: jax.Array,
    *,
    where: jax.Array,
    scale: float = 0.1,
    delta: float = 0.0,
    printed: bool = False,
) -> jax.Array:
    """DPO of the candidates with the highest and the lowest reward (OneMall Eq. 9).

        -log sigmoid( scale * (log pi(best) / ref(best) - log pi(worst) / ref(worst)) )

    Printed is -sigmoid(..) instead of -log sigmoid(..): its gradient vanishes where the pair is in the wrong order, as
    sigmoid(z) (1 - sigmoid(z)), so a pair that is far off is never corrected.

    Args:
      policy: log-likelihoods [..., L].
      reference: log-likelihoods [..., L] under the frozen reference.
      reward: [..., L], or advantages; candidates whose reward isn't finite are left out.
      where: bool [..., L].
      scale: lambda, 0.1 to 0.5 in the paper.
      delta: added to the reference's probability, as printed.
      printed: the printed form.

    Returns:
      One value per context, float32 [...]; 0 where no two rewards differ. The first of equal rewards is taken.

    >>> best_against_worst(jnp.zeros(3), jnp.zeros(3), jnp.array([0.0, 2.0, 1.0]), where=jnp.ones(3, bool)).round(3)
    Array(0.693, dtype=float32)
    """
    where = where & jnp.isfinite(reward)
    best, worst = (jnp.argmax(jnp.where(where, sign * reward, -jnp.inf), -1)[..., None] for sign in (1, -1))
    differ = jnp.take_along_axis(reward, best, -1) > jnp.take_along_axis(reward, worst, -1)
    differ = (differ & where.any(-1, keepdims=True))[..., 0]

    def log_ratio(index: jax.Array) -> jax.Array:
        own, other = (jnp.take_along_axis(each, index, -1)[..., 0] for each in (policy, reference))
        return _log_ratio(own, other, differ, delta)

    z = scale * (log_ratio(best) - log_ratio(worst))
    return jnp.where(differ, -jax.nn.sigmoid(z) if printed else jax.nn.softplus(-z), 0.0)


def grpo(
    policy: jax.Array,
    reference: jax.Array,
    advantage: jax.Array,
    *,
    where: jax.Array,
    clip: float = 0.2,
    delta: float = 0.0,
    printed: bool = False,
) -> jax.Array:
    """Group-relative policy optimisation (OneMall Eq. 10), negative.

        -min(ratio * A, clip(ratio, 1 - e, 1 + e) * A),    ratio = policy / reference

    At policy = reference the gradient is the policy gradient's, -A * grad log policy. Printed is the second term alone:
    its gradient is zero wherever the ratio has left the interval, also on the wrong side, so a good candidate that has
    become unlikely, or a bad one that has become likely, is never corrected.

    Args:
      policy: log-likelihoods of candidates [..., L], for one ratio a candidate, or log-probabilities of their tokens
        [..., L, M], for one ratio a token.
      reference: the same under the policy that the candidates were sampled from.
      advantage: [..., L], see `advantages`.
      where: bool [..., L]: mask of the candidates; or [..., L, M]: mask of the tokens.
      clip: e.
      delta: added to the reference's probability, as printed.
      printed: the printed form.

    Returns:
      One value per candidate, float32 [..., L], 0 where masked; summed over the tokens. The paper sums over candidates.

    Raises:
      ValueError: policy is neither [..., L] nor [..., L, M].

    >>> grpo(jnp.log(jnp.array([2.0, 2.0])), jnp.zeros(2), jnp.array([1.0, -1.0]), where=jnp.ones(2, bool))
    Array([-1.2,  2. ], dtype=float32)
    """
    tokens = policy.ndim - advantage.ndim
    if tokens not in (0, 1) or policy.shape[: advantage.ndim] != advantage.shape:
        raise ValueError(f"log-probabilities {policy.shape} are of no candidates or tokens of {advantage.shape}")
    if tokens:
        advantage = advantage[..., None]
        where = where if where.ndim == policy.ndim else where[..., None]
    ratio = _exp(_log_ratio(policy, reference, where, delta))
    advantage = jax.lax.stop_gradient(jnp.where(where, advantage, 0.0).astype(jnp.float32))
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    loss = jnp.where(where, -(clipped if printed else jnp.minimum(ratio * advantage, clipped)), 0.0)
    return loss.sum(-1) if tokens else loss


def divergence(policy: jax.Array, reference: jax.Array, *, where: jax.Array) -> jax.Array:
    """Estimate of the KL divergence of the policy from the reference, from candidates that the policy drew.

        ref / pi - log(ref / pi) - 1        (Schulman 2020, k3: never negative, unbiased)

    policy, reference: log-likelihoods of candidates, or log-probabilities of tokens, [...]; where bool [...]. Returns
    float32 [...], 0 where masked. Times a weight, it keeps the policy near the reference.

    >>> divergence(jnp.log(jnp.array([0.25])), jnp.log(jnp.array([0.5])), where=jnp.ones(1, bool)).round(3)
    Array([0.307], dtype=float32)
    """
    log_ratio = -_log_ratio(policy, reference, where, 0.0)
    return jnp.where(where, _exp(log_ratio) - log_ratio - 1, 0.0)


def _log_ratio(policy: jax.Array, reference: jax.Array, where: jax.Array, delta: float) -> jax.Array:
    """log policy / (reference + delta) in float32, 0 where masked; no gradient passes through the reference."""
    reference = jax.lax.stop_gradient(jnp.where(where, reference, 0.0).astype(jnp.float32))
    if delta:
        reference = jnp.where(where, jnp.logaddexp(reference, math.log(delta)), 0.0)
    return jnp.where(where, policy, 0.0).astype(jnp.float32) - reference


def _exp(log_ratio: jax.Array) -> jax.Array:
    """exp, continued by its tangent beyond LARGEST_LOG_RATIO: finite, with a gradient that is finite and not zero."""
    above = jnp.maximum(log_ratio - LARGEST_LOG_RATIO, 0.0)
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_LOG_RATIO)) * (1 + above)
