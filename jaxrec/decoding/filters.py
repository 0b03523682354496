"""Which items each request allows, in a form that counts the allowed items of any node in constant time.

The allowed items in trie order are bits of 32-bit words, with the number of set bits before every word beside them.
Counting up to a position is one word and one popcount, so a filter costs one pass over the items, none over the trie.
"""

import flax.struct
import jax
import jax.numpy as jnp

from jaxrec.config import UserError
from jaxrec.decoding.trie import Trie

WORD = 32


@flax.struct.dataclass
class ItemFilter:
    """Allowed items of B requests as bits in trie order."""

    words: jax.Array
    """uint32 [B, capacity / 32 + 1], bit i of word w = the item at position 32 w + i is allowed."""
    before: jax.Array
    """int32 [B, capacity / 32 + 1], set bits before each word."""

    def count_before(self, positions: jax.Array) -> jax.Array:
        """Allowed items before each position: int32 [B, ...] -> int32 [B, ...]."""
        batch, words = self.words.shape
        row = jnp.arange(batch).reshape(batch, *(1,) * (positions.ndim - 1))
        index = row * words + (positions >> 5)  # / WORD
        word = self.words.reshape(-1).at[index].get(mode="promise_in_bounds")
        before = self.before.reshape(-1).at[index].get(mode="promise_in_bounds")
        return before + _popcount(word & ((jnp.uint32(1) << (positions & 31).astype(jnp.uint32)) - 1))

    def select(self, ranks: jax.Array) -> jax.Array:
        """The position of the allowed item of each rank, 0 = first: int32 [B, n] -> int32 [B, n]; any if there is none.

        Finds the last word that begins at or below the rank, then halves that word five times.
        """
        search = jax.vmap(lambda before, rank: jnp.searchsorted(before, rank, side="right"))
        index = jnp.maximum(search(self.before, ranks) - 1, 0)
        word = jnp.take_along_axis(self.words, index, axis=1)
        rank = ranks - jnp.take_along_axis(self.before, index, axis=1)
        bit = jnp.zeros_like(ranks)
        for half in (16, 8, 4, 2, 1):
            low = _popcount((word >> bit.astype(jnp.uint32)) & jnp.uint32(2**half - 1))
            upper = rank >= low
            bit, rank = jnp.where(upper, bit + half, bit), jnp.where(upper, rank - low, rank)
        return index * WORD + bit


def build_filter(trie: Trie, allowed: jax.Array) -> ItemFilter:
    """The filter of allowed bool [B, I]; an item that has no column is not allowed.

    For shapes that outlive a catalogue refresh give `allowed` [B, trie.capacity].

    Raises:
        UserError: `allowed` isn't bool [B, I].
    """
    if allowed.ndim != 2 or allowed.dtype != jnp.bool_:
        raise UserError(f"`allowed` is {allowed.dtype}{list(allowed.shape)}: expected bool [requests, items].")
    in_order = jnp.take(allowed, trie.items, axis=1, mode="fill", fill_value=False)
    # One word more than needed, so that the end position of the last node has a word as well.
    in_order = jnp.pad(in_order, ((0, 0), (0, WORD - trie.capacity % WORD)))
    bits = in_order.reshape(in_order.shape[0], -1, WORD).astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)
    words = bits.sum(-1, dtype=jnp.uint32)
    counts = _popcount(words)
    return ItemFilter(words=words, before=jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts)


def _popcount(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype(jnp.int32)
