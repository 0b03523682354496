"""Copying from the past: people come back to items that they looked at or bought, and a decoder copies them badly.

Beside the decoder's distribution over IDs stands one over the items of the past (See et al. 2017, pointer-generator
networks). The two are mixed as distributions over whole IDs. The mixture gives the joint probability of any prefix, and
each level's probability follows by the chain rule, so that training, scoring and the beam stay exact:

    points  = head(...)                              the weights of the past's items, and their share in the mixture
    scored  = points.along(scored, targets, codes)   given targets
    copied  = points.begin()                         or level by level, given the decoder's log-probabilities:
    mixed   = copied.mix(log_probs, codes of the level)
    copied  = copied.after(tokens, codes of the level, log-probabilities of the tokens)

`extend_mixture` is these last three lines for a model's `extend`. Targets may be of unequal length: codes of items and
targets are then tokens with an end, and what stands behind the end of a target means nothing.

`PointerHead` (RankGR) weights the items of a history from the decoder's states; `HabitHead` (OneMall) weights the
distinct items of the past by how often and how long ago each was taken as well. `CandidateHead` weights items that need
not be of the past, such as those that a query led others to.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.config import UserError
from jaxrec.models.contract import Scored, pick
from jaxrec.nn.attention import masked_softmax
from jaxrec.nn.layers import Projection, RMSNorm

TINY, NOTHING = 1e-37, -1e30


def check_labels(copies: bool, key: str, smoothing: float) -> None:
    """Whether labels may be smoothed: not if the model `copies`, as configuration key `key` says.

    Raises:
      UserError: it copies, and `objective.smoothing` is above 0.
    """
    if copies and smoothing:
        raise UserError(
            f"configuration key 'objective.smoothing' is {smoothing} and '{key}' is on: labels are smoothed over the "
            "decoder's distribution alone, not over its mixture with what is copied; set either to 0 or False"
        )


@struct.dataclass
class Points:
    """A distribution over the past's items for each of L targets, or one for all of them (L = 1).

    weights float32 [B, L, S] sum to 1; share float32 [B, L] is the part of the mixture that is copied. Without a past
    both are 0.
    """

    weights: jax.Array
    share: jax.Array

    def begin(self) -> "Copied":
        """The empty prefix."""
        return Copied(self.share, jnp.zeros_like(self.share), self.weights)

    def along(self, scored: Scored, targets: jax.Array, codes: jax.Array) -> Scored:
        """The mixture's scores of targets int32 [B, L, M], from the decoder's own; codes int32 [B, S, M] of items.

        `mean_log_probs` stays the decoder's own, not that of the mixture, which needs the whole distribution of every
        level: a configuration that copies must not smooth labels (`check_labels`).
        """
        same = codes[:, None, :, : targets.shape[-1]] == targets[:, :, None]
        begins = jnp.cumprod(same.astype(jnp.float32), axis=-1)  # [B, L, S, M]
        copied = (begins * self.weights[..., None]).sum(2)
        joint = _mixture(self.share[..., None], jnp.cumsum(scored.log_probs, axis=-1), copied)
        return scored.replace(log_probs=jnp.diff(joint, prepend=0.0, axis=-1))


@struct.dataclass
class Copied:
    """L prefixes of IDs: the share [B, L], the log-probability of the prefix under the decoder alone, [B, L], and the
    weights [B, L, S] of the past's items that begin with the prefix (0 for the others)."""

    share: jax.Array
    generated: jax.Array
    begins: jax.Array

    def mix(self, log_probs: jax.Array, codes: jax.Array) -> jax.Array:
        """The mixture's log-probabilities [B, L, K] of the next code, from the decoder's own; codes int32 [B, S]."""
        there = jax.nn.one_hot(codes, log_probs.shape[-1])
        copied = jnp.einsum("BLS,BSK->BLK", self.begins, there)
        joint = _mixture(self.share[..., None], self.generated[..., None] + log_probs, copied)
        return joint - _mixture(self.share, self.generated, self.begins.sum(-1))[..., None]

    def after(self, tokens: jax.Array, codes: jax.Array, log_probs: jax.Array) -> "Copied":
        """One code longer: tokens int32 [B, L], log_probs float32 [B, L] of the tokens under the decoder alone."""
        begins = self.begins * (codes[:, None] == tokens[..., None])
        return Copied(self.share, self.generated + log_probs, begins)


def extend_mixture(
    points: Points,
    codes: jax.Array,
    log_probs: jax.Array,
    tokens: jax.Array | None,
    cache: dict | None,
    level: int,
) -> tuple[jax.Array, dict]:
    """The mixture's log-probabilities [B, W, K] of one more code for every beam, and what the next level needs.

    codes int32 [B, S, M] of the items, -1 for none; log_probs float32 [B, W, K]: the decoder's own; tokens int32 [B, W]
    of level - 1 and cache as for `jaxrec.models.contract.TargetModel.extend`.
    """
    copied = points.begin()
    if level:
        copied = cache["copied"].after(tokens, codes[..., level - 1], pick(cache["log_probs"], tokens))
    return copied.mix(log_probs, codes[..., level]), {"copied": copied, "log_probs": log_probs}


def _mixture(share: jax.Array, generated: jax.Array, copied: jax.Array) -> jax.Array:
    """log((1 - share) * exp(generated) + share * copied)."""
    # What is not copied adds nothing at all: a long text can be far less likely than the smallest float.
    of_copied = jnp.where(copied > 0, jnp.log(jnp.maximum(share * copied, TINY)), NOTHING)
    return jnp.logaddexp(jnp.log1p(-share) + generated, of_copied)


class PointerHead(nn.Module):
    """Weights of a history's items for each of L targets, from the decoder's states."""

    width: int

    @nn.compact
    def __call__(self, state: jax.Array, states: jax.Array, seen: jax.Array) -> Points:
        """state [B, L, D] that predicts a target's first code, states [B, S, D] of the items, seen bool [B, L, S].

        `seen` is left-aligned. Initially the weight of a place with n items after it is proportional to (1 + n)^-0.5;
        an item that occurs several times has the sum of its places. The initial share is one half.
        """
        query = Projection(self.width, ("embed", "mlp"), gain=0.01, name="query")(state)
        key = Projection(self.width, ("embed", "mlp"), name="key")(states)
        match = jnp.einsum("BLD,BSD->BLS", query, key).astype(jnp.float32) * self.width**-0.5
        ago = jnp.maximum(seen.sum(-1, keepdims=True) - 1 - jnp.arange(seen.shape[-1]), 0)
        match -= self.param("decay", nn.initializers.constant(0.5), ()) * jnp.log1p(ago.astype(jnp.float32))
        share = Projection(1, ("embed", None), bias=True, gain=0.01, name="share")(state)[..., 0]
        share = 0.999 * nn.sigmoid(share.astype(jnp.float32))
        return Points(masked_softmax(match, seen), jnp.where(seen.any(-1), share, 0.0))


class HabitHead(nn.Module):
    """Weights of the distinct items of a user's past, the same for all targets of the context."""

    width: int

    @nn.compact
    def __call__(
        self, tokens: jax.Array, habit: jax.Array, mask: jax.Array, state: jax.Array, user: jax.Array
    ) -> Points:
        """tokens [B, S, D] and habit [B, S, 4] of the items with mask [B, S]; state [B, D] of BOS; user [B, 4].

        The initial weights are the personal frequencies.
        """
        keys = Projection(self.width, ("embed", "mlp"), name="key")(tokens)
        query = Projection(self.width, ("embed", "mlp"), name="query")(RMSNorm()(state))
        match = jnp.einsum("BSD,BD->BS", keys, query) * self.width**-0.5
        hidden = nn.gelu(nn.Dense(32, name="habit_in")(habit))
        match += nn.Dense(1, name="habit_out", kernel_init=nn.initializers.normal(0.1))(hidden)[..., 0]
        match += habit[..., 0]  # the log of the count
        hidden = nn.gelu(nn.Dense(32, name="share_state")(state) + nn.Dense(32, name="share_user")(user))
        share = 0.999 * nn.sigmoid(nn.Dense(1, name="share_out")(hidden)[..., 0])
        share = jnp.where(mask.any(-1), share, 0.0)
        return Points(masked_softmax(match, mask)[:, None], share[:, None])


class CandidateHead(nn.Module):
    """Weights of given items, the same for all targets of the context: of a user's past, or popular with a query.

    What is known of each, such as how often it was taken, decides along with the context.
    """

    width: int

    @nn.compact
    def __call__(
        self, tokens: jax.Array, habits: jax.Array, mask: jax.Array, state: jax.Array, user: jax.Array
    ) -> Points:
        """tokens [B, C, D] and habits [B, C, F] of items with mask [B, C]; state [B, D] of the context; user [B, U].

        The first column of habits is the log of an item's initial weight.
        """
        state = RMSNorm(name="norm")(state)
        keys = Projection(self.width, ("embed", "mlp"), name="key")(RMSNorm(name="token_norm")(tokens))
        query = Projection(self.width, ("embed", "mlp"), gain=0.1, name="query")(state)
        match = jnp.einsum("BCD,BD->BC", keys, query).astype(jnp.float32) * self.width**-0.5
        asked = nn.Dense(64, name="habit_state")(state) + nn.Dense(64, use_bias=False, name="habit_user")(user)
        hidden = nn.gelu(nn.Dense(64, use_bias=False, name="habit_in")(habits) + asked[:, None])
        hidden = nn.gelu(nn.Dense(32, name="habit_hidden")(hidden))
        match += nn.Dense(1, name="habit_out", kernel_init=nn.initializers.normal(0.05))(hidden)[..., 0]
        match += habits[..., 0]
        hidden = nn.gelu(nn.Dense(32, name="share_state")(state) + nn.Dense(32, name="share_user")(user))
        share = nn.Dense(1, name="share_out", bias_init=nn.initializers.constant(1.0))(hidden)[..., 0]
        share = jnp.where(mask.any(-1), 0.999 * nn.sigmoid(share), 0.0)
        return Points(masked_softmax(match, mask)[:, None], share[:, None])
