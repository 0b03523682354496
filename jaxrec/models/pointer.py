"""A pointer into the history: people come back to what they looked at or bought, and a decoder copies it badly.

Beside the decoder's distribution over IDs stands one over the items of the history (See et al. 2017, pointer-generator
networks). The two are mixed as distributions over whole IDs, as OneMall's habits are (`jaxrec.models.habit`), and each
level's probability follows by the chain rule:

    points  = head(state, states, seen)              where the readers of a history point, and how much they copy
    copied  = points.begin()                         then at every level, given the decoder's log-probabilities:
    mixed   = copied.mix(log_probs, codes of the level)
    copied  = copied.after(tokens, codes of the level, log_probs)
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.models.habit import mixture
from jaxrec.nn.attention import masked_softmax
from jaxrec.nn.layers import Projection


@struct.dataclass
class Points:
    """Where L readers point: weights float32 [B, L, S] of a history's items, which sum to 1, and their share [B, L]."""

    weights: jax.Array
    share: jax.Array

    def begin(self) -> "Copied":
        """The empty prefix."""
        return Copied(self.share, jnp.zeros_like(self.share), self.weights)

    def along(self, log_probs: jax.Array, targets: jax.Array, codes: jax.Array) -> jax.Array:
        """The mixture's log-probabilities [B, L, M] of targets int32 [B, L, M], from the decoder's own, [B, L, M].

        codes int32 [B, S, M] of the history's items. One reader may have all targets.
        """
        same = codes[:, None] == targets[:, :, None]
        begins = jnp.cumprod(same.astype(jnp.float32), axis=-1)  # [B, L, S, M]
        copied = (begins * self.weights[..., None]).sum(2)
        joint = mixture(self.share[..., None], jnp.cumsum(log_probs, axis=-1), copied)
        return jnp.diff(joint, prepend=0.0, axis=-1)


@struct.dataclass
class Copied:
    """L prefixes of IDs: the share [B, L], the log-probability of the prefix under the decoder alone, [B, L], and the
    weights [B, L, S] of the history's items that begin with it (0 for the others)."""

    share: jax.Array
    generated: jax.Array
    begins: jax.Array

    def mix(self, log_probs: jax.Array, codes: jax.Array) -> jax.Array:
        """The mixture's log-probabilities [B, L, K] of the next code, from the decoder's own; codes int32 [B, S]."""
        there = jax.nn.one_hot(codes, log_probs.shape[-1])
        copied = jnp.einsum("BLS,BSK->BLK", self.begins, there)
        joint = mixture(self.share[..., None], self.generated[..., None] + log_probs, copied)
        return joint - mixture(self.share, self.generated, self.begins.sum(-1))[..., None]

    def after(self, tokens: jax.Array, codes: jax.Array, log_probs: jax.Array) -> "Copied":
        """One code longer: tokens int32 [B, L], of which the decoder's own log-probabilities were [B, L, K]."""
        chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        begins = self.begins * (codes[:, None] == tokens[..., None])
        return Copied(self.share, self.generated + chosen, begins)


class PointerHead(nn.Module):
    """Which item of the history comes again, and whether one does."""

    width: int

    @nn.compact
    def __call__(self, state: jax.Array, states: jax.Array, seen: jax.Array) -> Points:
        """state [B, L, D] of L readers, states [B, S, D] of the items, seen bool [B, L, S], aligned left.

        At first every reader points at the items it sees by how lately they came, wherever one came more than once.
        """
        query = Projection(self.width, ("embed", "mlp"), gain=0.01, name="query")(state)
        key = Projection(self.width, ("embed", "mlp"), name="key")(states)
        match = jnp.einsum("BLD,BSD->BLS", query, key).astype(jnp.float32) * self.width**-0.5
        ago = jnp.maximum(seen.sum(-1, keepdims=True) - 1 - jnp.arange(seen.shape[-1]), 0)
        match -= self.param("decay", nn.initializers.constant(0.5), ()) * jnp.log1p(ago.astype(jnp.float32))
        share = Projection(1, ("embed", None), bias=True, gain=0.01, name="share")(state)[..., 0]
        share = 0.999 * nn.sigmoid(share.astype(jnp.float32))
        return Points(masked_softmax(match, seen), jnp.where(seen.any(-1), share, 0.0))
