"""Exact top-k of long rows, in the order of `jax.lax.top_k`: by falling score, then by index.

`lax.top_k` puts every element through a heap, which on CPU is 15 times as slow as a maximum. So long rows are cut into
blocks: the k best elements lie in the k blocks of highest maximum (of equal maxima the lower block), since any element
of another block is below the maximum of each of these. Only those k blocks are searched.
"""

import jax
import jax.numpy as jnp

SHORT = 16_384


def top(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of each row of scores [B, n], best first: (scores [B, k], index int32 [B, k]); k <= n, no NaN."""
    block = _block_size(scores.shape[1], k)
    if block == 1:
        return jax.lax.top_k(scores, k)
    blocks = _blocks(scores, block)
    _, chosen = top(blocks.max(-1), k)
    values, index = _members(blocks, jnp.sort(chosen, axis=1))
    best, place = jax.lax.top_k(values, k)
    return best, jnp.take_along_axis(index, place, axis=1)


def top_capped(scores: jax.Array, groups: jax.Array, cap: int, k: int) -> tuple[jax.Array, jax.Array]:
    """As `top` of scores [B, W, n] in one row, at most `cap` of each group int32 [B, W]; padded with -inf.

    Only the `cap` best of each of the W rows can be chosen. Returns at most W * min(cap, n) elements.
    """
    batch, width, places = scores.shape
    best, place = jax.lax.top_k(scores, min(cap, places))
    place = jnp.sort(place, axis=2)
    values = jnp.take_along_axis(scores, place, axis=2).reshape(batch, -1)
    index = (place + jnp.arange(width, dtype=jnp.int32)[:, None] * places).reshape(batch, -1)
    values = capped(values, jnp.repeat(groups, best.shape[2], axis=1), cap)
    best, chosen = top(values, min(k, values.shape[1]))
    return best, jnp.take_along_axis(index, chosen, axis=1)


def capped(scores: jax.Array, groups: jax.Array, cap: int) -> jax.Array:
    """scores [B, n], -inf where `cap` better (or equal and earlier) ones have the same group int32 [B, n]."""
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    groups, _, order = jax.lax.sort((groups, -scores, place), dimension=1, num_keys=3)
    begins = jnp.pad(groups[:, 1:] != groups[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    rank = place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    keep = jnp.zeros(scores.shape, bool).at[jnp.arange(scores.shape[0])[:, None], order].set(rank < cap)
    return jnp.where(keep, scores, -jnp.inf)


def _block_size(n: int, k: int) -> int:
    """About sqrt(n / k), so that both steps take equally long; 1 for rows too short to gain."""
    if n <= SHORT or n < 256 * k:
        return 1
    return 2 ** max(1, (n // k).bit_length() // 2)


def _blocks(scores: jax.Array, block: int) -> jax.Array:
    """[B, n] -> [B, n / block, block], with -inf after the end."""
    spare = -scores.shape[1] % block
    if spare:
        scores = jnp.pad(scores, ((0, 0), (0, spare)), constant_values=-jnp.inf)
    return scores.reshape(scores.shape[0], -1, block)


def _members(blocks: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All elements of the chosen blocks int32 [B, m], in order: (values [B, m * block], their index in the row)."""
    batch, _, block = blocks.shape
    values = jnp.take_along_axis(blocks, chosen[..., None], axis=1, mode="promise_in_bounds")
    index = chosen[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    return values.reshape(batch, -1), index.reshape(batch, -1)
