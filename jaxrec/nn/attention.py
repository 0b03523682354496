"""Attention of many short targets over one shared context.

A token of a target attends to the context and to the earlier tokens of its own target, and to nothing else (RankGR
Eq. 7). That mask is never built: the two parts are scored by two einsums and share one softmax, so the cost is
L*M*(S+M), not (S+L*M)^2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrec.nn.layers import Projection, RMSNorm

KeyValue = tuple[jax.Array, jax.Array]
NEVER = -1e30  # finite, so that a fully masked row gives zeros and not NaN


def packed_attention(
    query: jax.Array,
    *,
    context: KeyValue | None = None,
    context_mask: jax.Array | None = None,
    own: KeyValue | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> jax.Array:
    """Attend from every token of every target to the shared context and, causally, to its own target.

    query [B, L, M, N, H]; context: key and value [B, S, N, H] with mask [B, S], or [B, L, S] if each target sees
    a different part of it; own: key and value [B, L, T, N, H] with T >= M, where the queries are the last M of the T
    positions. Either part may be missing. Keys and values may have fewer heads, each shared by a group of
    consecutive heads of the queries (grouped-query attention), without being repeated. `bias` [N, L, M, S + T], L
    and M possibly 1, is added to the scores after they are multiplied by `scale`, H**-0.5 if None. Softmax in float32.
    Without `causal` the queries are not positions of `own`, and each attends to all of it.
    Returns [B, L, M, N, H] in the dtype of `query`; zeros where all is masked.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    length, heads = query.shape[2:4]
    group = heads // (own if context is None else context)[0].shape[-2]
    query = _fold_heads(query, group)
    scores, masks = [], []
    if context is not None:
        scores.append(_context_scores(query, context[0]))
        mask = jnp.ones(context[0].shape[:2], bool) if context_mask is None else context_mask
        mask = mask[:, None, None, None] if mask.ndim == 2 else mask[:, None, :, None]
        masks.append(jnp.broadcast_to(mask, scores[-1].shape))
    if own is not None:
        scores.append(_own_scores(query, own[0]))
        total = own[0].shape[2]
        seen = jnp.arange(total) <= jnp.repeat(jnp.arange(length), group)[:, None] + (total - length)
        masks.append(jnp.broadcast_to(seen | (not causal), scores[-1].shape))
    joined = jnp.concatenate(scores, -1) * scale
    if bias is not None:
        joined += _fold_bias(bias, group, length)
    weights = masked_softmax(joined, jnp.concatenate(masks, -1)).astype(query.dtype)
    split = 0 if context is None else context[0].shape[1]
    out = 0.0
    if context is not None:
        out += _context_values(weights[..., :split], context[1])
    if own is not None:
        out += _own_values(weights[..., split:], own[1])
    return _unfold_heads(out, group)


# The heads of a group read the same keys, as the tokens of a target do, so a group is folded into the tokens.
def _fold_heads(query: jax.Array, group: int) -> jax.Array:
    """[B, L, M, N, H] -> [B, L, M * group, N / group, H]."""
    if group == 1:
        return query
    *lead, length, heads, width = query.shape
    grouped = query.reshape(*lead, length, heads // group, group, width)
    return grouped.swapaxes(-3, -2).reshape(*lead, length * group, heads // group, width)


def _unfold_heads(out: jax.Array, group: int) -> jax.Array:
    """The reverse of `_fold_heads`."""
    if group == 1:
        return out
    *lead, length, heads, width = out.shape
    grouped = out.reshape(*lead, length // group, group, heads, width)
    return grouped.swapaxes(-3, -2).reshape(*lead, length // group, heads * group, width)


def _fold_bias(bias: jax.Array, group: int, length: int) -> jax.Array:
    """[N, L, 1 or M, X] -> [N / group, L, M * group, X], where `length` is M."""
    if group == 1:
        return bias
    heads, targets, _, positions = bias.shape
    bias = jnp.broadcast_to(bias, (heads, targets, length, positions))
    grouped = bias.reshape(heads // group, group, targets, length, positions)
    return jnp.moveaxis(grouped, 1, 3).reshape(heads // group, targets, length * group, positions)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def masked_softmax(scores: jax.Array, mask: jax.Array, axis: int = -1) -> jax.Array:
    """Softmax over `axis` where `mask`, in float32; a fully masked slice gives zeros."""
    scores = jnp.where(mask, scores.astype(jnp.float32), NEVER)
    weights = jnp.where(mask, jnp.exp(scores - scores.max(axis, keepdims=True)), 0.0)
    return weights / jnp.maximum(weights.sum(axis, keepdims=True), 1e-30)


@masked_softmax.defjvp
def _masked_softmax_tangent(axis: int, inputs: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # From the weights alone, which are kept anyway; automatic differentiation would read three arrays of their size.
    weights = masked_softmax(*inputs, axis)
    moved = weights * tangents[0].astype(jnp.float32)
    return weights, moved - weights * moved.sum(axis, keepdims=True)


# A context of a single token is treated as one more own token of every target.
def _context_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """[B, L, M, N, H] and [B, S, N, H] -> [B, N, L, M, S]."""
    if key.shape[1] == 1:
        return _own_scores(query, jnp.broadcast_to(key[:, None], (*query.shape[:2], *key.shape[1:])))
    return jnp.einsum("BLMNH,BSNH->BNLMS", query, key)


def _context_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """[B, N, L, M, S] and [B, S, N, H] -> [B, L, M, N, H]."""
    if value.shape[1] == 1:
        return _own_values(
            weights, jnp.broadcast_to(value[:, None], (value.shape[0], weights.shape[2], *value.shape[1:]))
        )
    # In this order: for one einsum the compiler swaps the operands and transposes, in twice the time.
    return jnp.moveaxis(jnp.einsum("BNLMS,BSNH->BNLMH", weights, value), 1, 3)


# A target has a few tokens, so these products are too small for a matrix routine: thousands of 3x3 blocks. One pass
# over memory for each key token is several times faster if it vectorises: sums over the last axis as a product with
# ones, and gradients in the same form, hence the custom rules. Each function is the other's gradient. Above UNROLLED
# tokens a matrix routine is faster again.
UNROLLED = 8


@jax.custom_vjp
def _own_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """[B, L, M, N, H] and [B, L, T, N, H] -> float32 [B, N, L, M, T]."""
    if max(query.shape[2], key.shape[2]) > UNROLLED:
        return jnp.einsum("BLMNH,BLTNH->BNLMT", query, key, preferred_element_type=jnp.float32)
    ones = jnp.ones(query.shape[-1], query.dtype)
    scores = [
        jnp.matmul(query * key[:, :, t : t + 1], ones, preferred_element_type=jnp.float32) for t in range(key.shape[2])
    ]
    return jnp.stack([jnp.moveaxis(each, 3, 1) for each in scores], axis=-1)


@jax.custom_vjp
def _own_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """[B, N, L, M, T] and [B, L, T, N, H] -> [B, L, M, N, H]."""
    if max(weights.shape[-2:]) > UNROLLED:
        return jnp.einsum("BNLMT,BLTNH->BLMNH", weights, value)
    weights = jnp.moveaxis(weights, 1, -1)[..., None]  # [B, L, M, T, N, 1]
    return sum(weights[:, :, :, t] * value[:, :, t : t + 1] for t in range(value.shape[2]))


def _scores_gradient(inputs: KeyValue, gradient: jax.Array) -> KeyValue:
    query, key = inputs
    gradient = gradient.astype(query.dtype)
    return _own_values(gradient, key), _own_values(gradient.swapaxes(-1, -2), query)


def _values_gradient(inputs: KeyValue, gradient: jax.Array) -> KeyValue:
    weights, value = inputs
    return _own_scores(gradient, value).astype(weights.dtype), _own_values(weights.swapaxes(-1, -2), gradient)


_own_scores.defvjp(lambda query, key: (_own_scores(query, key), (query, key)), _scores_gradient)
_own_values.defvjp(lambda weights, value: (_own_values(weights, value), (weights, value)), _values_gradient)


class TargetAttention(nn.Module):
    """Pre-norm attention block of packed targets, residual included.

    Call with x [B, L, M, D] and the keys and values it attends to; `context_kv` computes the shared ones once.
    """

    heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape, axes = (self.heads, self.head_dim), ("embed", "heads", "head_dim")
        self.norm = RMSNorm()
        self.query = Projection(shape, axes, self.dtype)
        self.key = Projection(shape, axes, self.dtype)
        self.value = Projection(shape, axes, self.dtype)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: KeyValue | None = None,
        context_mask: jax.Array | None = None,
        own: KeyValue | None = None,
        causal: bool = True,
    ) -> jax.Array:
        query = nn.with_logical_constraint(
            self.query(self.norm(x)), ("act_batch", "act_targets", None, "act_heads", None)
        )
        attended = packed_attention(query, context=context, context_mask=context_mask, own=own, causal=causal)
        flat = attended.reshape(*attended.shape[:-2], -1)
        return x + Projection(x.shape[-1], ("heads", "embed"), self.dtype, name="out")(flat)

    def context_kv(self, memory: jax.Array) -> KeyValue:
        """Key and value [B, S, N, H] of a memory [B, S, D] that every target shares."""
        axes = ("act_batch", "act_length", "act_heads", None)
        return nn.with_logical_constraint(self.key(memory), axes), nn.with_logical_constraint(self.value(memory), axes)

    def own_kv(self, x: jax.Array) -> KeyValue:
        """Key and value [B, L, M, N, H] of the targets' own tokens x [B, L, M, D]."""
        normed = self.norm(x)
        return self.key(normed), self.value(normed)
