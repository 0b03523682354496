"""DCN-v2: explicit crosses of all features (Wang et al. 2021, "DCN V2: Improved Deep & Cross Network").

    x_(l+1) = x_0 * (W_l x_l + b_l) + x_l                                         (Eq. 1; W = U V, Eq. 2, with a rank)

A history is the mean of its latest events, whatever the candidate: cheap, which is why the model pre-ranks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrec.config import check_least, check_shares
from jaxrec.models.ranking.din import Network
from jaxrec.models.ranking.inputs import Inputs
from jaxrec.nn.layers import Projection


@dataclass(frozen=True)
class DcnConfig:
    """A cross network beside a deep one."""

    length: int = 32
    """latest events whose mean is read"""
    crosses: int = 2
    """cross layers"""
    rank: int = 0
    """rank of their matrices; 0: full"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the deep network beside them"""
    dropout: float = 0.1
    """dropout of hidden layers in training"""

    def __post_init__(self):
        check_least(self, "ranking.model", length=1, crosses=1, rank=0, hidden=1)
        check_shares(self, "ranking.model", "dropout")


class CrossLayer(nn.Module):
    """x_0 * (W x + b) + x over the last axis (DCN-v2 Eq. 1); W = U V of the given rank, 0: W is full (Eq. 2)."""

    rank: int = 0

    @nn.compact
    def __call__(self, first: jax.Array, x: jax.Array) -> jax.Array:
        inner = Projection(self.rank, ("embed", None), name="down")(x) if self.rank else x
        return first * Projection(x.shape[-1], ("embed", "mlp"), bias=True, name="cross")(inner) + x


class Dcn(nn.Module):
    """States float32 [B, L, X + F] of candidates: those of the cross layers, and of the deep network."""

    config: DcnConfig

    @nn.compact
    def __call__(self, inputs: Inputs, train: bool = False) -> tuple[jax.Array, None]:
        config = self.config
        events, mask = inputs.events[:, : config.length], inputs.mask[:, : config.length]
        mean = events.sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]
        own = inputs.candidates
        past = jnp.broadcast_to(mean[:, None], own.shape)
        first = jnp.concatenate([own, past, own * past, inputs.plain], axis=-1)
        x = first
        for place in range(config.crosses):
            x = CrossLayer(config.rank, name=f"cross_{place}")(first, x)
        return jnp.concatenate([x, Network(config.hidden, config.dropout)(first, train)], axis=-1), None
