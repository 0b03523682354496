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


def top_of_rows(values: jax.Array, added: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """As `top` of values [B, W, n] + added [B, W] in one row; a row where `added` is -inf has no candidate.

    Only to the blocks' maxima and to the members of the best blocks is anything added, so that the values are read once
    and nothing of their size is written.
    """
    batch, width, places = values.shape
    block = _block_in_rows(width, places, k)
    if places % block:
        values = jnp.pad(values, ((0, 0), (0, 0), (0, -places % block)), constant_values=-jnp.inf)
    blocks = values.reshape(batch, width, -1, block)
    there = (added > -jnp.inf)[..., None]
    maxima = jnp.where(there, blocks.max(-1), -jnp.inf)
    scores = (maxima + jnp.where(there, added[..., None], 0.0)).reshape(batch, -1)
    if block == 1:
        return jax.lax.top_k(scores, k)
    _, chosen = top(scores, k)
    chosen = jnp.sort(chosen, axis=1)
    row, place = chosen // blocks.shape[2], chosen % blocks.shape[2]
    found = jnp.take_along_axis(blocks.reshape(batch, -1, block), chosen[..., None], axis=1, mode="promise_in_bounds")
    found = jnp.where(jnp.take_along_axis(there[..., 0], row, axis=1)[..., None], found, -jnp.inf)
    found += jnp.take_along_axis(added, row, axis=1)[..., None]
    index = (row * places + place * block)[..., None] + jnp.arange(block, dtype=jnp.int32)
    best, at = jax.lax.top_k(found.reshape(batch, -1), k)
    # Where there is no candidate any more, padding can be chosen.
    index = jnp.minimum(index, width * places - 1).reshape(batch, -1)
    return best, jnp.take_along_axis(index, at, axis=1)


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


def _block_in_rows(width: int, places: int, k: int) -> int:
    """As `_block_size` of all rows together; if there is one near it, a size that divides a row."""
    wanted = _block_size(width * places, k)
    if wanted == 1 or places < 2 * wanted:
        return 1
    return next((size for size in range(2 * wanted, wanted // 2, -1) if places % size == 0), wanted)


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
