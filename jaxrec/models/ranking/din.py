"""DIN: the history as a candidate sees it.

Zhou et al. 2018, "Deep Interest Network for Click-Through Rate Prediction":

    interest(candidate) = sum over events of a(candidate, event) event            (Eq. 3)

`a` is a small network of the two vectors and their product, the *activation unit*. Its outputs are not normalised, so
that many events of one kind weigh more than few. Of the paper there is no Dice (here GELU) and no mini-batch aware
regularisation (the optimiser's weight decay).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers as init

from jaxrec.config import check_least, check_shares
from jaxrec.models.ranking.inputs import Inputs
from jaxrec.nn.layers import Dropout, Projection, partitioned


@dataclass(frozen=True)
class DinConfig:
    """Target attention over the latest events, then a network of all features."""

    length: int = 32
    """latest events that are attended to"""
    unit: int = 16
    """width of the activation unit's hidden layer"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the network behind it"""
    dropout: float = 0.1
    """dropout of hidden layers in training"""

    def __post_init__(self):
        check_least(self, "ranking.model", length=1, unit=1, hidden=1)
        check_shares(self, "ranking.model", "dropout")


class ActivationUnit(nn.Module):
    """Weights float32 [B, L, S] of events [B, S, D] for candidates [B, L, D]; 0 where the mask [B, S] is False.

    The hidden layer of [q; k; q * k] is computed as q A + k B + (q * C) k: the products of all pairs are one matrix
    product, and no array [B, L, S, 3 D] is built.
    """

    hidden: int

    @nn.compact
    def __call__(self, candidates: jax.Array, events: jax.Array, mask: jax.Array) -> jax.Array:
        shape = candidates.shape[-1], self.hidden
        fan_in = init.variance_scaling(1.0, "fan_in", "truncated_normal")
        product = self.param("product", partitioned(fan_in, "embed", "mlp"), shape)
        query = Projection(self.hidden, ("embed", "mlp"), bias=True, name="candidate")(candidates)
        key = Projection(self.hidden, ("embed", "mlp"), name="event")(events)
        crossed = (candidates[..., None] * product).swapaxes(-1, -2)  # [B, L, F, D]
        both = jnp.einsum("BLFD,BSD->BLSF", crossed, events)
        hidden = nn.gelu(both + query[:, :, None] + key[:, None])
        weight = Projection(1, ("mlp", None), bias=True, gain=0.3, name="out")(hidden)[..., 0]
        return jnp.where(mask[:, None], weight, 0.0)


class Interest(nn.Module):
    """The sum of the latest events, weighted by the activation unit: float32 [B, L, D] (DIN Eq. 3)."""

    length: int
    unit: int

    @nn.compact
    def __call__(self, inputs: Inputs) -> jax.Array:
        events, mask = inputs.events[:, : self.length], inputs.mask[:, : self.length]
        weights = ActivationUnit(self.unit, name="unit")(inputs.candidates, events, mask)
        return jnp.einsum("BLS,BSD->BLD", weights, events)


class Network(nn.Module):
    """Hidden layers with GELU and dropout: [..., X] -> [..., hidden[-1]]."""

    hidden: tuple[int, ...]
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for place, width in enumerate(self.hidden):
            x = nn.gelu(Projection(width, ("embed", "mlp"), bias=True, gain=2**0.5, name=f"hidden_{place}")(x))
            x = Dropout(self.dropout)(x, deterministic=not train)
        return x


class Din(nn.Module):
    """States float32 [B, L, F] of candidates."""

    config: DinConfig

    @nn.compact
    def __call__(self, inputs: Inputs, train: bool = False) -> tuple[jax.Array, None]:
        interest = Interest(self.config.length, self.config.unit, name="interest")(inputs)
        parts = [inputs.candidates, interest, inputs.candidates * interest, inputs.plain]
        return Network(self.config.hidden, self.config.dropout)(jnp.concatenate(parts, axis=-1), train), None
