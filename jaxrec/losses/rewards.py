"""Rewards of a context's targets, from feedback and from predictions, and the weights of pairs of them.

OneSug §3.4.1, OneSearch §3.4.2, OneMall Eq. 8. A reward is an array [..., L] beside the packed targets of a context; it
is data, and no gradient passes through it. The losses are in `jaxrec.losses.preference` and `jaxrec.losses.policy`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrec.config import UserError

BASE_WEIGHTS = (2.0, 1.5, 1.0, 0.5, 0.2, 0.0)
"""lambda: the base weight of each of the six kinds of feedback, strongest first (OneSug Table 1, OneSearch §3.4.2)"""


class PairWeights(NamedTuple):
    """Of all pairs of a context's targets, [..., chosen L, rejected L]."""

    weight: jax.Array
    """float32, rw of a pair that is compared; 0 for all others"""
    left_out: jax.Array
    """bool, a chosen and a rejected target whose rewards have no order or the wrong one; callers count them"""


def base_weight(feedback: jax.Array, base: Sequence[float] = BASE_WEIGHTS) -> jax.Array:
    """lambda of each target: float32 [...] of feedback int [...], an index of `base`; 0 for an index outside it."""
    return jax.nn.one_hot(feedback, len(base)) @ jnp.array(base, jnp.float32)


def share_within_feedback(count: jax.Array, feedback: jax.Array, *, where: jax.Array) -> jax.Array:
    """p of OneSug §3.4.1: the share of a target among all with its feedback in one context.

    count [..., L]: how often the target met the feedback; feedback int [..., L]; where bool [..., L]. The targets must
    be all that met the feedback: shares of a sample are too large. Returns float32 [..., L], 0 where masked and for
    feedback without counts.

    >>> share_within_feedback(jnp.array([3, 1, 2]), jnp.array([2, 2, 3]), where=jnp.ones(3, bool))
    Array([0.75, 0.25, 1.  ], dtype=float32)
    """
    count = jnp.where(where, count, 0).astype(jnp.float32)
    same = feedback[..., :, None] == feedback[..., None, :]
    total = jnp.where(same, count[..., None, :], 0.0).sum(-1)
    return count / jnp.maximum(total, 1.0)


def feedback_reward(feedback: jax.Array, share: jax.Array, *, base: Sequence[float] = BASE_WEIGHTS) -> jax.Array:
    """r = lambda * e^p: the base weight of the feedback, more for what met it often (OneSug §3.4.1).

    feedback int [...], an index of `base`; share [...]: `share_within_feedback`. Returns float32 [...]. The factor is
    at most e, so a frequent target of one kind of feedback can have a larger reward than a rare one of a stronger kind.

    >>> feedback_reward(jnp.array([0, 2, 5]), jnp.array([0.0, 1.0, 1.0]))
    Array([2.       , 2.7182817, 0.       ], dtype=float32)
    """
    return base_weight(feedback, base) * jnp.exp(jnp.asarray(share, jnp.float32))


def calibrated_rates(exposures: jax.Array, clicks: jax.Array, orders: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Calibrated CTR and CVR of items (OneSearch Eq. 6-7), float32 [...] each.

        CTR = log(clicks + 10) / log((exposures + 10) * (clicks + 10) * (orders + 10))
        CVR = log(orders + 10) / log(clicks + 10)

    exposures, clicks, orders: counts [...] of recent days. CTR is in (0, 1), and 1/3 without counts. CVR is 1 without
    clicks and orders, and above 1 for an item with more orders than clicks: in a log without clicks, count each order
    as a click.

    >>> [rate.round(3).tolist() for rate in calibrated_rates(jnp.array([90.0]), jnp.array([0.0]), jnp.array([0.0]))]
    [[0.25], [1.0]]
    """
    shown, clicked, ordered = (jnp.log(jnp.asarray(each, jnp.float32) + 10) for each in (exposures, clicks, orders))
    return clicked / (shown + clicked + ordered), ordered / clicked


def rate_reward(
    feedback: jax.Array, ctr: jax.Array, cvr: jax.Array, *, base: Sequence[float] = BASE_WEIGHTS
) -> jax.Array:
    """r = 2 lambda * ctr * cvr / (ctr + cvr): the base weight times the harmonic mean of the rates (OneSearch Eq. 8).

    feedback int [...], an index of `base`; ctr, cvr [...], 0 or more (`calibrated_rates`). Returns float32 [...]; 0
    where both rates are 0.

    >>> rate_reward(jnp.array([0, 3]), jnp.array([0.25, 0.0]), jnp.array([0.75, 0.0]))
    Array([0.75, 0.  ], dtype=float32)
    """
    ctr, cvr = (jnp.asarray(each, jnp.float32) for each in (ctr, cvr))
    total = ctr + cvr
    mean = 2 * ctr * (cvr / jnp.where(total > 0, total, 1.0))
    return base_weight(feedback, base) * mean


def predicted_reward(predictions: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """The weighted sum of a ranking model's predictions (OneMall Eq. 8, OneSearch Eq. 10).

    OneMall: {"ctr": 1, "ctcvr": 30, "egpm": 1}. OneSearch: {"ctr": 1, "cvr": 1, "ctcvr": 1, "relevance": 10}, where
    relevance is computed offline. predictions [...] by name; one without a weight counts nothing. Returns float32.

    Raises:
      UserError: no weights, or a weight for what isn't predicted.

    >>> predicted_reward({"ctr": jnp.array([0.5]), "ctcvr": jnp.array([0.25])}, {"ctr": 1, "ctcvr": 30})
    Array([8.], dtype=float32)
    """
    missing = sorted(set(weights) - set(predictions))
    if missing or not weights:
        known = ", ".join(sorted(predictions))
        what = f"has a weight for {', '.join(missing)}, which nothing predicts" if missing else "has no weights"
        raise UserError(f"the reward {what}; give weights for some of: {known}")
    return sum(weight * jnp.asarray(predictions[name], jnp.float32) for name, weight in weights.items())


def places_gained(reward: jax.Array, *, where: jax.Array) -> jax.Array:
    """How far each target moves to the front when a context's targets, best first, are sorted by reward.

    OneSearch §3.4.2 trains on what a reward model changes in the order of the beam: targets that gain places are
    chosen, targets that lose places are rejected. reward [..., L], of targets in the beam's order; where bool [..., L].
    Returns int32 [..., L]; 0 where masked and where the reward isn't finite. Of equal rewards the earlier target stays
    ahead.

    >>> places_gained(jnp.array([0.2, 0.9, 0.1]), where=jnp.ones(3, bool))
    Array([-1,  1,  0], dtype=int32)
    """
    where = where & jnp.isfinite(reward)
    before = jnp.tri(reward.shape[-1], k=-1, dtype=bool)
    larger = reward[..., None, :] > reward[..., :, None]
    equal = reward[..., None, :] == reward[..., :, None]
    real = where[..., None, :]
    old, new = (real & before).sum(-1), (real & (larger | (equal & before))).sum(-1)
    return jnp.where(where, old - new, 0)


def pair_weights(
    reward: jax.Array,
    *,
    chosen: jax.Array,
    where: jax.Array,
    rejected: jax.Array | None = None,
    largest: float = 10.0,
    weighted: bool = True,
) -> PairWeights:
    """rw = 1 / (r_w - r_l), at most `largest`, of each pair of a chosen and a rejected target of one context.

    OneSug Eq. 6, OneSearch Eq. 9. As printed rw has no bound where the rewards are nearly equal, and is negative, which
    trains the rejected target up, where the rejected one's is larger. So rw is clipped, and pairs without r_w > r_l are
    left out, as are pairs whose rewards are no finite numbers.

    Args:
      reward: [..., L].
      chosen: bool [..., L]; several targets may be chosen, each is compared with the rejected ones of lower reward.
      where: bool [..., L], the targets that exist.
      rejected: bool [..., L]; all that aren't chosen by default.
      largest: bound of rw.
      weighted: False gives every compared pair weight 1.

    >>> rw, left_out = pair_weights(
    ...     jnp.array([2.0, 1.5, 2.0]), chosen=jnp.array([True, False, False]), where=jnp.ones(3, bool)
    ... )
    >>> rw[0], left_out[0]
    (Array([0., 2., 0.], dtype=float32), Array([False, False,  True], dtype=bool))
    """
    rejected = ~chosen if rejected is None else rejected
    reward = jnp.asarray(reward, jnp.float32)
    finite = jnp.isfinite(reward)
    difference = jnp.where(finite[..., :, None] & finite[..., None, :], reward[..., :, None] - reward[..., None, :], 0)
    wanted = (chosen & where)[..., :, None] & (rejected & where)[..., None, :]
    compared = wanted & (difference > 0)
    # The bound is applied to the difference, so that the reciprocal can't overflow.
    weight = 1 / jnp.maximum(difference, 1 / largest) if weighted else 1.0
    weight = jax.lax.stop_gradient(jnp.where(compared, weight, 0.0))
    return PairWeights(weight, wanted & ~(weight > 0))
