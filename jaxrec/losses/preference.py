"""Preferences between the targets of one context: LDPO, and the hybrid losses weighted by rewards.

`ldpo` (RankGR Eq. 8) needs no rewards: ordered levels (pseudo-exposure < exposure < click < purchase, or any other
list) are the preferences. `hybrid` (OneSug Eq. 7-9, OneSearch Eq. 11-12) compares each chosen target with rejected ones
of lower reward, weights each pair (`jaxrec.losses.rewards.pair_weights`), and adds the chosen target's likelihood.

The hybrid losses are functions of log-likelihoods [..., L] of the packed targets of a context, under the policy and
under a frozen reference (`jaxrec.losses.likelihood.log_likelihood`), and of the pairs' weights [..., L, L]. They return
one value per chosen target, [..., L], 0 for all others; the number of terms is `(weight > 0).any(-1).sum()`.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrec.config import UserError, check_least


def ldpo(scores: jax.Array, level: jax.Array, where: jax.Array, *, beta: float = 1.0) -> jax.Array:
    """Listwise direct preference optimisation of one session's items, summed over them (RankGR Eq. 8).

        - sum over k of log( e^(beta pi_k) / (e^(beta pi_k) + sum over i on lower levels of e^(beta pi_i)) )

    scores [..., L]: pi, an item's log-probability (`jaxrec.losses.likelihood.log_likelihood`); level int [..., L],
    higher is preferred; where bool [..., L]: the items that exist. Items of one level aren't compared, and an item of
    the lowest level has no term. Returns [...] in float32; 0 where all items have one level (`has_preference`).

    >>> ldpo(jnp.zeros(3), jnp.array([2, 1, 1]), jnp.ones(3, bool)).round(1)  # log 3
    Array(1.1, dtype=float32)
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


@dataclass(frozen=True)
class HybridConfig:
    """The hybrid losses of OneSug and OneSearch. The papers print no values: the defaults are ours."""

    compare: Literal["lists", "pairs"] = "lists"
    """a chosen target with all its rejected ones at once (`listwise`), or with one after the other (`pairwise`)"""
    beta: float = 1.0
    """scale of the implicit reward, beta * log(policy / reference)"""
    margin: float = 1.0
    """delta, by which the implicit reward of the chosen target must exceed that of a rejected one"""
    likelihood: float = 0.1
    """alpha, weight of the negative log-likelihood of the chosen target"""
    largest_weight: float = 10.0
    """bound of a pair's weight rw, for `jaxrec.losses.rewards.pair_weights`"""
    form: Literal["margin", "linear", "tolerance", "lead"] = "margin"
    """how a pair enters the loss, see `pair_terms`; "tolerance" and "lead" are what the papers print"""

    def __post_init__(self):
        check_least(self, "", beta=0, margin=0, likelihood=0, largest_weight=0)
        for name in ("beta", "largest_weight"):
            if not getattr(self, name):
                raise UserError(f"configuration key '{name}' is 0; give a number above 0")


def implicit_reward(policy: jax.Array, reference: jax.Array, *, beta: float) -> jax.Array:
    """beta * log(policy / reference), the reward that the policy defines (OneSug Eq. 8, OneSearch Eq. 12).

    policy, reference: log-likelihoods [...]; no gradient passes through the reference. Returns float32 [...].

    >>> implicit_reward(jnp.array([-1.0]), jnp.array([-3.0]), beta=0.5)
    Array([1.], dtype=float32)
    """
    return beta * (policy.astype(jnp.float32) - jax.lax.stop_gradient(reference.astype(jnp.float32)))


def hybrid(
    policy: jax.Array, reference: jax.Array, weight: jax.Array, config: HybridConfig = HybridConfig()
) -> jax.Array:
    """Preference between chosen and rejected targets, and the likelihood of the chosen ones.

        preference - alpha * log policy(chosen)                OneSug Eq. 7 and 9, OneSearch Eq. 11

    The likelihood counts once for every term of the preference: once a chosen target for "lists", once a pair for
    "pairs".

    Args:
      policy: log-likelihoods [..., L].
      reference: log-likelihoods [..., L] under the frozen reference.
      weight: float32 [..., chosen L, rejected L]: rw of the pairs that are compared, 0 for all others.
      config: with its defaults the loss trains from policy = reference on; see `pair_terms` for the printed forms.

    Returns:
      float32 [..., L], 0 for targets that aren't chosen or have no rejected one.
    """
    function = {"lists": listwise, "pairs": pairwise}[config.compare]
    compared = weight > 0
    terms = compared.sum(-1) if config.compare == "pairs" else compared.any(-1)
    unlikely = -jnp.where(compared.any(-1), policy.astype(jnp.float32), 0.0)
    return function(policy, reference, weight, config) + config.likelihood * terms * unlikely


def listwise(
    policy: jax.Array, reference: jax.Array, weight: jax.Array, config: HybridConfig = HybridConfig()
) -> jax.Array:
    """Each chosen target against all its rejected ones (OneSug Eq. 9, OneSearch Eq. 11, without the likelihood).

        -log sigmoid( -log sum over rejected l of exp z_wl )         z: `pair_terms`

    With "linear", a margin of 0 and weights of 1 this is S-DPO (Chen et al. 2024), DPO where one target is rejected,
    and summed over the targets `ldpo(policy - reference)` where every target is chosen against all of lower level.
    With "margin" the equality holds where the margin is 0 and no rejected target's implicit reward is below the
    chosen one's. A rejected target that keeps the margin has z = 0 and stays in the sum: the loss of a satisfied list
    of n is log(1 + n), with gradient zero.

    Arguments and result as for `hybrid`.

    >>> weight = jnp.zeros((3, 3)).at[0, 1:].set(1.0)
    >>> listwise(jnp.zeros(3), jnp.zeros(3), weight, HybridConfig(margin=0.0)).round(1)  # log 3
    Array([1.1, 0. , 0. ], dtype=float32)
    """
    compared = weight > 0
    chosen = compared.any(-1)
    terms = jnp.where(compared, pair_terms(policy, reference, weight, config), -jnp.inf)
    # A row of -inf alone would have a gradient of NaN.
    total = jax.nn.logsumexp(jnp.where(chosen[..., None], terms, 0.0), axis=-1)
    return jnp.where(chosen, jax.nn.softplus(_signed(total, config)), 0.0)


def pairwise(
    policy: jax.Array, reference: jax.Array, weight: jax.Array, config: HybridConfig = HybridConfig()
) -> jax.Array:
    """Each chosen target against its rejected ones, one by one, and the sum (OneSug Eq. 7, without the likelihood).

        - sum over rejected l of log sigmoid(-z_wl)         z: `pair_terms`

    `listwise` of one rejected target each. With "linear", a margin of 0 and weights of 1 this is DPO (Rafailov et al.
    2023). Arguments and result as for `hybrid`.

    >>> weight = jnp.zeros((3, 3)).at[0, 1:].set(1.0)
    >>> pairwise(jnp.zeros(3), jnp.zeros(3), weight, HybridConfig(margin=0.0)).round(1)  # 2 log 2
    Array([1.4, 0. , 0. ], dtype=float32)
    """
    terms = _signed(pair_terms(policy, reference, weight, config), config)
    return jnp.where(weight > 0, jax.nn.softplus(terms), 0.0).sum(-1)


def pair_terms(policy: jax.Array, reference: jax.Array, weight: jax.Array, config: HybridConfig) -> jax.Array:
    """z of every pair, float32 [..., chosen L, rejected L], of r = `implicit_reward`, the weight rw and the margin.

    ============ ========================== ========================================== ==============================
    form         z                          at policy = reference                      printed in
    ============ ========================== ========================================== ==============================
    "margin"     rw max(0, r_l - r_w + d)   gradient for every pair                    (the default)
    "linear"     rw (r_l - r_w + d)         gradient for every pair, at any distance   S-DPO, DPO
    "tolerance"  rw max(0, r_l - r_w - d)   z = 0 and no gradient at all               OneSug Eq. 9
    "lead"       rw max(0, r_w - r_l - d)   z = 0 and no gradient at all               OneSug Eq. 7, OneSearch Eq. 11
    ============ ========================== ========================================== ==============================

    The printed forms can't train from the reference on, as the text describes. "tolerance" acts only where a rejected
    target already leads by d. "lead" acts only where the chosen one leads by d, and then without an end; its loss is
    -log sigmoid(+z). Summed over a list as in OneSearch Eq. 11, with the inner sign reversed against S-DPO, the pair of
    the largest lead alone decides.
    """
    compared = weight > 0
    used = compared.any(-1) | compared.any(-2)
    policy, reference = (jnp.where(used, each, 0.0) for each in (policy, reference))
    reward = implicit_reward(policy, reference, beta=config.beta)
    behind = reward[..., None, :] - reward[..., :, None]
    if config.form == "linear":
        return weight * (behind + config.margin)
    if config.form == "margin":
        short = behind + config.margin
        # The gradient at 0 is that of the active side, so that a margin of 0 trains from the reference on.
        return weight * jnp.where(short >= 0, short, 0.0)
    return weight * jax.nn.relu((-behind if config.form == "lead" else behind) - config.margin)


def _signed(terms: jax.Array, config: HybridConfig) -> jax.Array:
    """The argument of softplus: -log sigmoid(-z), or -log sigmoid(z) for "lead"."""
    return -terms if config.form == "lead" else terms
