"""BART's layers: LayerNorm after every block, biases everywhere, and learned absolute positions.

    x ──▶ attention ──▶ + x ──▶ LayerNorm ──▶ (cross-attention, + , LayerNorm) ──▶ feed-forward, +, LayerNorm

Dropout is of what a block adds, before the norm of the sum. The layers take it as `keep(before, after)`, which returns
`after` with dropout of `after - before` (`nn.transformer.dropped`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers as init

from jaxrec.nn.attention import KeyValue
from jaxrec.nn.layers import LayerNorm, partitioned
from jaxrec.nn.transformer import Activation, CrossAttention, FeedForwardBlock, SelfAttention

Keep = Callable[[jax.Array, jax.Array], jax.Array]
OFFSET = 2
"""rows of BART's table of positions that come before position 0; no position has them"""


class LearnedPositions(nn.Module):
    """A vector for every absolute position: a table [OFFSET + size, D], as BART's files hold it."""

    size: int
    width: int
    dtype: jnp.dtype = jnp.float32
    scale: float = 0.02

    @nn.compact
    def __call__(self, positions: jax.Array) -> jax.Array:
        """Positions int [...] below `size` -> [..., D]."""
        shape = (OFFSET + self.size, self.width)
        table = self.param("table", partitioned(init.normal(self.scale), None, "embed"), shape)
        return jnp.take(table, positions + OFFSET, axis=0).astype(self.dtype)


class _PostNorm(nn.Module):
    """What both sides' layers have: self-attention and a feed-forward."""

    width: int
    heads: int
    head_dim: int
    hidden: int
    activation: Activation = "gelu_erf"
    gated: bool = False
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        parts = {"dtype": self.dtype, "bias": True, "pre_norm": False}
        self.attention = SelfAttention(self.width, self.heads, self.heads, self.head_dim, out_bias=True, **parts)
        self.feed_forward = FeedForwardBlock(self.hidden, self.activation, self.gated, **parts)
        self.attention_norm, self.feed_forward_norm = LayerNorm(self.epsilon), LayerNorm(self.epsilon)

    def _fed(self, x: jax.Array, keep: Keep) -> jax.Array:
        return self.feed_forward_norm(keep(x, self.feed_forward(x)))


class PostNormEncoderLayer(_PostNorm):
    """Self-attention over the whole context and a feed-forward."""

    def __call__(self, x: jax.Array, mask: jax.Array, bias: None, keep: Keep) -> jax.Array:
        """x [B, S, D], mask bool [B, S] or [B, S, S]; scores have no bias."""
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        attended, _ = self.attention.sequence(x, mask, bias)
        return self._fed(self.attention_norm(keep(x, attended)), keep)


class PostNormDecoderLayer(_PostNorm):
    """Self-attention within each target, cross-attention to the context, and a feed-forward."""

    def setup(self):
        super().setup()
        parts = {"dtype": self.dtype, "bias": True, "pre_norm": False}
        self.cross = CrossAttention(self.width, self.heads, self.head_dim, **parts)
        self.cross_norm = LayerNorm(self.epsilon)

    def __call__(self, x, cross: KeyValue, mask, bias: None, start: KeyValue | None, past: KeyValue | None, keep: Keep):
        """x [B, L, M, D] -> x, and the targets' own K/V [B, L, t + M, N, H] with `past` [B, L, t, N, H] in front."""
        x = nn.with_logical_constraint(x, ("act_batch", "act_targets", None, "act_embed"))
        attended, own = self.attention.targets(x, context=start, past=past, bias=bias)
        x = self.attention_norm(keep(x, attended))
        x = self.cross_norm(keep(x, self.cross(x, cross, mask)))
        return self._fed(x, keep), own
