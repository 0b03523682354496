"""The allowed items of each request, in a form that counts those of any node in constant time.

The allowed items in trie order are bits of 32-bit words, with the number of set bits before every word. The count up to
a position takes one word and one popcount, so a filter costs one pass over the items and none over the trie.

A filter is built from bool [B, I] (`build_filter`), or from masks that are kept between requests:

    order = ItemOrder(trie)
    shoes, in_stock = order.mask(category == "shoes"), order.mask(stock > 0)      # built once, 1/8 byte an item
    requests = [order.allowed(shoes & in_stock, blocked=[7, 7, 12]), order.allowed(only=[3, 5])]
    beam_search(..., allowed=stack(requests))                                     # a few words a request are written
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.decoding.trie import Trie

WORD = 32
LISTED = 8
"""Lists of blocked or allowed items are padded to a power of this, so that few shapes are compiled."""


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
    """The filter of allowed bool [B, I]; items beyond I are not allowed.

    Give `allowed` [B, trie.capacity] to keep the shapes when the catalogue is refreshed.

    Raises:
        UserError: `allowed` isn't bool [B, I].
    """
    if allowed.ndim != 2 or allowed.dtype != jnp.bool_:
        raise UserError(f"`allowed` is {allowed.dtype}{list(allowed.shape)}: expected bool [requests, items].")
    in_order = jnp.take(allowed, trie.items, axis=1, mode="fill", fill_value=False)
    in_order &= jnp.arange(trie.capacity) < trie.num_items
    # One more word, so that the end position of the last node has a word too.
    in_order = jnp.pad(in_order, ((0, 0), (0, WORD - trie.capacity % WORD)))
    bits = in_order.reshape(in_order.shape[0], -1, WORD).astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)
    words = bits.sum(-1, dtype=jnp.uint32)
    return ItemFilter(words=words, before=_set_before(words))


@dataclass(frozen=True, eq=False)
class Mask:
    """A set of items as bits in trie order, kept in the host's memory and, after its first use there, on the device."""

    words: np.ndarray
    """uint32 [capacity / 32 + 1], as in `ItemFilter`."""

    @cached_property
    def count(self) -> int:
        """The number of items."""
        return int(np.bitwise_count(self.words).sum(dtype=np.int64))

    @cached_property
    def on_device(self) -> jax.Array:
        """`words` as an array of JAX."""
        return jnp.asarray(self.words)

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(self.words & other.words)

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """Whether the mask holds the items at positions int [...]: bool [...]."""
        return (self.words[positions >> 5] >> (positions & 31).astype(np.uint32)) & np.uint32(1) == 1


@dataclass(frozen=True, eq=False)
class Allowed:
    """The allowed items of one request: a mask with a few flipped bits."""

    mask: Mask
    flipped: np.ndarray
    """int32 [n], positions of the flipped bits in trie order, rising, each once."""
    count: int
    """The number of allowed items."""

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """Whether the items at positions int [...] are allowed: bool [...]."""
        return self.mask.holds(positions) ^ np.isin(positions, self.flipped)


class ItemOrder:
    """The order of a trie's items; builds masks from item indices."""

    def __init__(self, trie: Trie):
        self.capacity = trie.capacity
        self.items = np.asarray(trie.items)[: int(trie.num_items)]
        """int32 [items], item indices in trie order."""
        self.positions = np.full(int(self.items.max()) + 1, -1, np.int32)
        """int32 [I], the position of each item index; -1 = not in the trie."""
        self.positions[self.items] = np.arange(len(self.items), dtype=np.int32)

    @cached_property
    def all(self) -> Mask:
        """Every item of the trie."""
        return self._pack(np.ones(len(self.items), bool))

    @cached_property
    def none(self) -> Mask:
        """No item."""
        return Mask(np.zeros(num_words(self.capacity), np.uint32))

    def mask(self, allowed: np.ndarray) -> Mask:
        """The mask of bool [I]; items beyond I are not allowed.

        Raises:
            UserError: not bool, or not of one axis.
        """
        allowed = np.asarray(allowed)
        if allowed.ndim != 1 or allowed.dtype != bool:
            raise UserError(f"a mask of items is {allowed.dtype}{list(allowed.shape)}: expected bool [items].")
        if len(allowed) < len(self.positions):
            allowed = np.concatenate([allowed, np.zeros(len(self.positions) - len(allowed), bool)])
        return self._pack(allowed[self.items])

    def allowed(
        self, mask: Mask | None = None, *, blocked: Sequence[int] = (), only: Sequence[int] | None = None
    ) -> Allowed:
        """The items of a mask (None = all), without `blocked` and, if given, only those in `only`.

        Both are item indices, in any order, possibly repeated; indices that are not in the trie are ignored.
        """
        mask = mask or self.all
        out = np.unique(self._found(blocked))
        out = out[mask.holds(out)]
        if only is None:
            return Allowed(mask, out, mask.count - len(out))
        listed = np.unique(self._found(only))
        listed = np.setdiff1d(listed[mask.holds(listed)], out, assume_unique=True)
        return Allowed(self.none, listed, len(listed))

    def without(self, allowed: Allowed, blocked: Sequence[int]) -> Allowed:
        """What is allowed in this order but for `blocked`, item indices as in `allowed`."""
        out = np.unique(self._found(blocked))
        out = out[allowed.holds(out)]
        flipped = np.setxor1d(allowed.flipped, out, assume_unique=True).astype(np.int32)
        return Allowed(allowed.mask, flipped, allowed.count - len(out))

    def places(self, items: Sequence[int]) -> np.ndarray:
        """The position of each item index int [n], -1 where it is not in the trie: int32 [n]."""
        items = np.asarray(items, np.int64)
        known = (items >= 0) & (items < len(self.positions))
        return np.where(known, self.positions[np.where(known, items, 0)], -1)

    def _found(self, items: Sequence[int]) -> np.ndarray:
        positions = self.places(items)
        return positions[positions >= 0]

    def _pack(self, in_order: np.ndarray) -> Mask:
        packed = np.packbits(in_order, bitorder="little")
        words = np.zeros(num_words(self.capacity), "<u4")
        words.view(np.uint8)[: len(packed)] = packed
        return Mask(words.astype(np.uint32, copy=False))


def num_words(capacity: int) -> int:
    """Words of a filter: one more than the bits need, so that the end position of the last node has a word too."""
    return capacity // WORD + 1


def stack(requests: Sequence[Allowed]) -> ItemFilter:
    """The filter of a batch: one row a request. Shared masks are packed and transferred once.

    On a CPU device NumPy sums the counts, which is several times as fast there.
    """
    if jax.default_backend() == "cpu":
        return _stack_on_host(requests)
    longest = max(len(request.flipped) for request in requests)
    room = LISTED
    while room < longest:
        room *= LISTED
    beyond = WORD * len(requests[0].mask.words)
    flipped = np.full((len(requests), room), beyond, np.int32)
    for row, request in enumerate(requests):
        flipped[row, : len(request.flipped)] = request.flipped
    return _stack_on_device(tuple(request.mask.on_device for request in requests), flipped)


def _stack_on_host(requests: Sequence[Allowed]) -> ItemFilter:
    words = np.stack([request.mask.words for request in requests])
    for row, request in zip(words, requests, strict=True):
        np.bitwise_xor.at(row, request.flipped >> 5, np.uint32(1) << (request.flipped & 31).astype(np.uint32))
    counts = np.bitwise_count(words)
    before = np.cumsum(counts, axis=1, dtype=np.int32)
    before -= counts
    return ItemFilter(words=jnp.asarray(words), before=jnp.asarray(before))


@jax.jit
def _stack_on_device(rows: tuple[jax.Array, ...], flipped: jax.Array) -> ItemFilter:
    """rows uint32 [words] of B requests; flipped int32 [B, n], padded with positions beyond the last word.

    Every position is listed once, so subtracting the value of a set bit, or adding that of a clear one, flips that bit
    alone.
    """
    words = jnp.stack(rows)
    row, word = jnp.arange(len(rows))[:, None], flipped >> 5
    bits = jnp.uint32(1) << (flipped & 31).astype(jnp.uint32)
    is_set = (words.at[row, word].get(mode="clip") & bits) != 0
    words = words.at[row, word].add(jnp.where(is_set, jnp.uint32(0) - bits, bits), mode="drop")
    return ItemFilter(words=words, before=_set_before(words))


def _set_before(words: jax.Array) -> jax.Array:
    counts = _popcount(words)
    return jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts


def _popcount(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype(jnp.int32)
