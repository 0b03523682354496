"""Transformer blocks that the encoder-decoder (T5, BART) and the causal model (Qwen2) share.

Every block adds its output to its input, which it normalises first (pre-norm); with `pre_norm=False` there is no norm
in it, and the layer around it normalises the sum (`nn/post_norm.py`). Attention is `packed_attention` throughout:
self-attention of a sequence is S targets of one token each over a shared context of S. Query, key and value have three
matrices: splitting the product of a joint one takes longer on a CPU than two more products.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import initializers as init

from jaxrec.nn.attention import KeyValue, packed_attention
from jaxrec.nn.layers import Dropout, Projection, RMSNorm, partitioned

Activation = Literal["relu", "gelu", "gelu_erf", "silu"]
# nn.gelu is the tanh approximation.
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "gelu_erf": partial(nn.gelu, approximate=False), "silu": nn.silu}


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary embedding: x [..., N, H] rotated by its position, int32 [...] (broadcast to x's leading axes).

    Dimensions h and h + H/2 are a pair, rotated by the angle position / base**(2h/H). The product of a query and a key
    then depends on the difference of their positions alone. Computed in float32, returned in x's dtype.
    """
    half = x.shape[-1] // 2
    frequencies = np.float32(base) ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def relative_buckets(distance: np.ndarray, *, both_sides: bool, buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket, int32, of each distance = key position - query position.

    With `both_sides` the upper half of the buckets is for keys that come later; without, later keys fall into bucket 0.
    On each side, the nearer half of the buckets hold one distance each; the others grow logarithmically up to
    `max_distance`, beyond which all distances share the last bucket.
    """
    later = np.zeros(distance.shape, np.int32)
    if both_sides:
        buckets //= 2
        later = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # In float32 and in this order: rounding matters at the edges of buckets.
    log = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (log / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int32)
    return (later + np.where(distance < exact, distance, np.minimum(far, buckets - 1))).astype(np.int32)


class RelativeBias(nn.Module):
    """T5's learned bias of attention scores, one value a head and a bucket of distances."""

    heads: int
    buckets: int
    max_distance: int
    both_sides: bool

    @nn.compact
    def __call__(self, queries: np.ndarray, keys: np.ndarray) -> jax.Array:
        """Positions of queries int [X] and of keys int [Y], known when compiling -> float32 [N, X, Y]."""
        table = self.param("table", partitioned(init.normal(0.02), None, "heads"), (self.buckets, self.heads))
        distance = np.asarray(keys)[None, :] - np.asarray(queries)[:, None]
        bucket = relative_buckets(
            distance, both_sides=self.both_sides, buckets=self.buckets, max_distance=self.max_distance
        )
        return jnp.take(table.T, bucket, axis=1)


class SelfAttention(nn.Module):
    """Self-attention, residual included: of a whole sequence, or of packed targets after a context."""

    width: int
    heads: int
    groups: int
    head_dim: int
    bias: bool = False
    """query, key and value have a bias"""
    rotary_base: float | None = None
    """base of the rotary embedding; None for none"""
    scale: float | None = None
    """factor of the scores; None for H**-0.5"""
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    out_gain: float = 1.0
    """initial standard deviation of the residual"""
    out_bias: bool = False
    """the output has a bias"""
    pre_norm: bool = True
    """the input is normalised first"""
    head_norm: bool = False
    """every head's query and key are normalised (RMSNorm), before the rotary embedding"""

    def setup(self):
        self.norm = RMSNorm(self.epsilon) if self.pre_norm else None
        if self.head_norm:
            self.query_norm, self.key_norm = RMSNorm(self.epsilon, "head_dim"), RMSNorm(self.epsilon, "head_dim")
        # Initial scores have the same variance as under the usual scale.
        gain = 1.0 if self.scale is None else self.head_dim**-0.5 / self.scale
        axes = ("embed", "heads", "head_dim")
        self.query = Projection((self.heads, self.head_dim), axes, self.dtype, self.bias, gain)
        self.key = Projection((self.groups, self.head_dim), axes, self.dtype, self.bias)
        self.value = Projection((self.groups, self.head_dim), axes, self.dtype, self.bias)
        self.out = Projection(self.width, ("heads", "embed"), self.dtype, self.out_bias, self.out_gain)

    def sequence(
        self, x: jax.Array, mask: jax.Array, bias: jax.Array | None = None, positions: jax.Array | None = None
    ) -> tuple[jax.Array, KeyValue]:
        """x [B, S, D]; each position attends to the positions in `mask`: [B, S], the same for all, or [B, S, S].

        bias [N, S, S]; positions int32 [B, S] for the rotary embedding. Returns x and its key and value [B, S, G, H].
        """
        query, own = self._project(x, positions)
        bias = None if bias is None else bias[:, :, None]
        attended = packed_attention(query[:, :, None], context=own, context_mask=mask, bias=bias, scale=self.scale)
        return self._add(x, attended[:, :, 0]), own

    def targets(
        self,
        x: jax.Array,
        *,
        context: KeyValue | None = None,
        context_mask: jax.Array | None = None,
        past: KeyValue | None = None,
        bias: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """x [B, L, M, D]; each token attends to the context and to its own target's earlier tokens.

        context: key and value [B, S, G, H]; past: [B, L, t, G, H] of each target's earlier tokens; bias
        [N, 1, M, S + t + M]; positions int32 [B, 1 or L, M]. Returns x and the targets' key and value
        [B, L, t + M, G, H].
        """
        query, own = self._project(x, positions)
        if past is not None:
            own = tuple(jnp.concatenate([p, o], axis=2) for p, o in zip(past, own, strict=True))
        attended = packed_attention(
            query, context=context, context_mask=context_mask, own=own, bias=bias, scale=self.scale
        )
        return self._add(x, attended), own

    def _project(self, x: jax.Array, positions: jax.Array | None) -> tuple[jax.Array, KeyValue]:
        normed = self.norm(x) if self.pre_norm else x
        query, key = self.query(normed), self.key(normed)
        if self.head_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary_base is not None:
            query, key = (rotate(part, positions, self.rotary_base) for part in (query, key))
        return query, (key, self.value(normed))

    def _add(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        return x + self.out(attended.reshape(*attended.shape[:-2], -1))


class CrossAttention(nn.Module):
    """Attention of packed targets to a memory, residual included."""

    width: int
    heads: int
    head_dim: int
    scale: float | None = None
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    out_gain: float = 1.0
    """initial standard deviation of the residual"""
    bias: bool = False
    """query, key, value and output have a bias"""
    pre_norm: bool = True
    """the targets are normalised first"""

    def setup(self):
        shape, axes = (self.heads, self.head_dim), ("embed", "heads", "head_dim")
        gain = 1.0 if self.scale is None else self.head_dim**-0.5 / self.scale
        self.norm = RMSNorm(self.epsilon) if self.pre_norm else None
        self.query = Projection(shape, axes, self.dtype, self.bias, gain)
        self.key = Projection(shape, axes, self.dtype, self.bias)
        self.value = Projection(shape, axes, self.dtype, self.bias)
        self.out = Projection(self.width, ("heads", "embed"), self.dtype, self.bias, self.out_gain)

    def __call__(self, x: jax.Array, memory: KeyValue, mask: jax.Array) -> jax.Array:
        """x [B, L, M, D] over the key and value [B, S, N, H] of `key_value`, with mask [B, S]."""
        query = self.query(self.norm(x) if self.pre_norm else x)
        attended = packed_attention(query, context=memory, context_mask=mask, scale=self.scale)
        return x + self.out(attended.reshape(*attended.shape[:-2], -1))

    def key_value(self, memory: jax.Array) -> KeyValue:
        """Key and value [B, S, N, H] of a memory [B, S, D] that every target shares."""
        axes = ("act_batch", "act_length", "act_heads", None)
        return nn.with_logical_constraint(self.key(memory), axes), nn.with_logical_constraint(self.value(memory), axes)


class FeedForwardBlock(nn.Module):
    """Feed-forward through width F, residual included: down(act(up x)), or down(act(gate x) * up x) when gated."""

    hidden: int
    activation: Activation = "gelu"
    gated: bool = False
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    out_gain: float = 1.0
    """initial standard deviation of the residual"""
    bias: bool = False
    """every matrix has a bias"""
    pre_norm: bool = True
    """the input is normalised first"""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act, normed = ACTIVATIONS[self.activation], RMSNorm(self.epsilon, name="norm")(x) if self.pre_norm else x
        hidden = Projection(self.hidden, ("embed", "mlp"), self.dtype, self.bias, name="up")(normed)
        if self.gated:
            hidden *= act(Projection(self.hidden, ("embed", "mlp"), self.dtype, self.bias, name="gate")(normed))
        else:
            hidden = act(hidden)
        down = Projection(x.shape[-1], ("mlp", "embed"), self.dtype, self.bias, self.out_gain, name="down")
        return x + down(hidden)


def dropped(before: jax.Array, after: jax.Array, drop: Dropout, train: bool) -> jax.Array:
    """`after`, with dropout of a block's residual `after - before`."""
    return before + drop(after - before, deterministic=False) if train and drop.rate else after
