"""The basic layers: projection, norm, embedding, feed-forward.

Every parameter names its axes (`embed`, `heads`, `head_dim`, `mlp`, `vocab`, `expert`, `queries`);
`training/sharding.py` maps these names to the mesh. Layers are independent of the mesh.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers as init

DTYPES = ("float32", "bfloat16", "float16")
"""types of activations"""


DRAWS = 1 << 16
"""values that a random draw of `Dropout` takes"""


def partitioned(initializer, *axes: str | None):
    """The initializer, with a logical name for each axis of its result."""
    return nn.with_logical_partitioning(initializer, axes)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product over the last axis of x and the first of weight: [..., D] and [D, ...] -> [..., ...].

    Computed as a product of two matrices: with more axes, the gradients would contract several axes at once, for which
    XLA on a CPU writes transposed copies of the activations, element by element.
    """
    flat = jnp.dot(x.reshape(-1, x.shape[-1]), weight.reshape(len(weight), -1))
    return flat.reshape(*x.shape[:-1], *weight.shape[1:])


class Projection(nn.Module):
    """A matrix over the last axis: [..., D] -> [..., *features], with an optional bias.

    `axes` names the axes of the weight, the input's first; initial outputs have a standard deviation of `gain`.
    """

    features: int | Sequence[int]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype = jnp.float32
    bias: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        fan_in = init.variance_scaling(
            self.gain**2, "fan_in", "truncated_normal", in_axis=0, out_axis=range(1, 1 + len(features))
        )
        weight = self.param("weight", partitioned(fan_in, *self.axes), (x.shape[-1], *features))
        out = project(x.astype(self.dtype), weight.astype(self.dtype))
        if self.bias:
            out += self.param("bias", partitioned(init.zeros, *self.axes[1:]), features).astype(self.dtype)
        return out


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32."""

    epsilon: float = 1e-6
    axis: str = "embed"
    """name of the last axis"""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", partitioned(init.ones, self.axis), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation * scale + bias over the last axis, computed in float32."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", partitioned(init.ones, "embed"), (x.shape[-1],))
        bias = self.param("bias", partitioned(init.zeros, "embed"), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale + bias).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes a share of the values in training and scales the others up; drawn from the stream "dropout".

    As `flax.linen.Dropout`, in a fifth of its time on CPU: a value takes 16 random bits, two of the last axis one word.
    The share is then exact to 1 / 65,536.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """x [..., D] of any shape."""
        kept = DRAWS - round(self.rate * DRAWS)
        if deterministic or kept == DRAWS:
            return x
        words = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*words.shape[:-1], -1)[..., : x.shape[-1]]
        return jnp.where(halves < kept, x * jnp.asarray(DRAWS / kept, x.dtype), jnp.zeros_like(x))


class Embedding(nn.Module):
    """A table [V, D]; call it with int ids of any shape, or `attend` with [..., D] for tied logits [..., V]."""

    size: int
    width: int
    dtype: jnp.dtype = jnp.float32
    scale: float = 0.02

    def setup(self):
        self.table = self.param(
            "table", partitioned(init.normal(self.scale), "vocab", "embed"), (self.size, self.width)
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.table, ids, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits in float32."""
        return project(x.astype(jnp.float32), self.table.astype(jnp.float32).T)


class FeedForward(nn.Module):
    """GELU feed-forward: [..., D] -> [..., D] through width F."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(Projection(self.hidden, ("embed", "mlp"), self.dtype, name="up")(x))
        return Projection(x.shape[-1], ("mlp", "embed"), self.dtype, name="down")(hidden)
