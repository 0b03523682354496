"""Habits: people buy again what they bought, and a decoder that reads a compressed past copies it badly.

Beside the decoder's distribution over IDs stands one over the items of the user's own past. The two are mixed as
distributions over whole IDs; `mixture` gives the joint probability of any prefix, and each level's probability follows
by the chain rule, so that training, scoring and the beam stay exact.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrec.nn.attention import masked_softmax
from jaxrec.nn.layers import Projection, RMSNorm

TINY = 1e-30


class HabitHead(nn.Module):
    """Which item of the past comes again, and whether one does: weights [B, S] that sum to 1, and share [B]."""

    width: int

    @nn.compact
    def __call__(self, tokens, habit, mask, state, user):
        """tokens [B, S, D], habit [B, S, 4], mask [B, S], state [B, D] (BOS after the decoder), user [B, 4]."""
        keys = Projection(self.width, ("embed", "mlp"), name="key")(tokens)
        query = Projection(self.width, ("embed", "mlp"), name="query")(RMSNorm()(state))
        match = jnp.einsum("BSD,BD->BS", keys, query) * self.width**-0.5
        hidden = nn.gelu(nn.Dense(32, name="habit_in")(habit))
        match += nn.Dense(1, name="habit_out", kernel_init=nn.initializers.normal(0.1))(hidden)[..., 0]
        match += habit[..., 0]  # the log of the count: start out as the personal frequency
        hidden = nn.gelu(nn.Dense(32, name="share_state")(state) + nn.Dense(32, name="share_user")(user))
        share = 0.999 * nn.sigmoid(nn.Dense(1, name="share_out")(hidden)[..., 0])
        return masked_softmax(match, mask), jnp.where(mask.any(-1), share, 0.0)


def mixture(share: jax.Array, generated: jax.Array, habit: jax.Array) -> jax.Array:
    """log((1 - share) * exp(generated) + share * habit): the decoder's and the habit's distribution over whole IDs."""
    return jnp.logaddexp(jnp.log1p(-share) + generated, jnp.log(share * habit + TINY))
