"""A catalogue's semantic IDs as a trie of flat arrays.

The distinct IDs are sorted, so that every prefix (a node) is one range of IDs and the children of a node stand beside
each other in the level below. Numbering the nodes of each level in that order makes the trie three arrays a level:

    children [nodes above + 1]   node n of the level above has the children children[n] .. children[n + 1] - 1
    tokens   [nodes]             the code that leads to a node
    starts   [nodes + 1]         node n holds the items at positions starts[n] .. starts[n + 1] - 1 of `items`

A node of the last level is a whole ID, called a leaf. Nothing is dense in K x K, and node order is ID order.
All arrays are padded to a capacity, so a refreshed catalogue has the same shapes and nothing recompiles.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError


@flax.struct.dataclass
class Trie:
    """Sorted distinct IDs of M codes, level by level; a pytree: pass it to a jitted function, don't close over it."""

    children: tuple[jax.Array, ...]
    """Per level: int32 [nodes above + 1], the first child of every node of the level above (of the root at 0)."""
    tokens: tuple[jax.Array, ...]
    """Per level: int32 [nodes + branching], the code of every node; with the tail any node's children are a slice."""
    starts: tuple[jax.Array, ...]
    """Per level: int32 [nodes + branching + 1], the first position in `items` of every node; the tail as above."""
    items: jax.Array
    """int32 [capacity], item indices in the order of their IDs; items under one ID in the stated order."""
    num_items: jax.Array
    """int32 scalar, how many positions of `items` are real."""
    num_leaves: jax.Array
    """int32 scalar, how many distinct IDs there are."""
    codebook_sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """K of every level."""
    branching: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """Per level: a bound, rounded up, on the children of one node of the level above."""

    @property
    def levels(self) -> int:
        """M, the number of codes in an ID."""
        return len(self.codebook_sizes)

    @property
    def capacity(self) -> int:
        """How many items the arrays can hold."""
        return self.items.shape[0]

    def nodes(self, level: int) -> int:
        """How many nodes of `level` the arrays can hold."""
        return self.tokens[level].shape[0] - self.branching[level]

    def nbytes(self) -> int:
        """Memory of all arrays in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def build_trie(
    codes: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    order: np.ndarray | None = None,
    capacity: int | None = None,
    like: Trie | None = None,
) -> Trie:
    """Builds the trie of codes int [I, M], row = item index; items under one ID go by falling `order` [I], then index.

    Args:
        codes: 0 <= codes[:, m] < codebook_sizes[m].
        codebook_sizes: K of every level; they may differ.
        order: for example the popularity of each item; None lists items by index.
        capacity: items the arrays are padded to; by default I rounded up to an eighth of a power of two.
        like: an earlier trie. Its capacity and branching are taken over, so functions compiled for it are reused;
            what has outgrown them grows, which costs one compilation.

    Raises:
        UserError: an empty catalogue, a wrong shape or dtype, a code outside its codebook, more items than capacity.
    """
    codes = np.asarray(codes)
    codebook_sizes = tuple(int(size) for size in codebook_sizes)
    _check_codes(codes, codebook_sizes)
    if like is not None and like.codebook_sizes != codebook_sizes:
        raise UserError(
            f"the new catalogue has codebooks {codebook_sizes}, the one it replaces {like.codebook_sizes}: "
            "IDs of other codebooks need a model trained on them."
        )
    count = len(codes)
    capacity = _capacity(count, capacity, like)
    items = _sorted_items(codes, order)
    codes = codes[items]

    # A row begins a node of a level when it differs from the row before in this level's code or in one above.
    begins = np.zeros(count, bool)
    begins[0] = True
    above = np.zeros(1, np.int64)
    children, tokens, starts, branching = [], [], [], []
    for level, size in enumerate(codebook_sizes):
        begins[1:] |= codes[1:, level] != codes[:-1, level]
        start = np.flatnonzero(begins)
        first_child = np.append(np.searchsorted(start, above), len(start))
        width = _branching(int(np.diff(first_child).max()), size, like.branching[level] if like is not None else 0)
        nodes_above = min(capacity, math.prod(codebook_sizes[:level]))
        nodes = min(capacity, nodes_above * size)
        children.append(_padded(first_child, nodes_above + 1, len(start)))
        tokens.append(_padded(codes[start, level], nodes + width, 0))
        starts.append(_padded(start, nodes + width + 1, count))
        branching.append(width)
        above = start
    return Trie(
        children=tuple(children),
        tokens=tuple(tokens),
        starts=tuple(starts),
        items=_padded(items, capacity, 0),
        num_items=jnp.int32(count),
        num_leaves=jnp.int32(len(above)),
        codebook_sizes=codebook_sizes,
        branching=tuple(branching),
    )


def _check_codes(codes: np.ndarray, codebook_sizes: tuple[int, ...]) -> None:
    if not codebook_sizes or min(codebook_sizes) < 1:
        raise UserError(f"codebook_sizes is {codebook_sizes}: give a size of at least 1 for every level.")
    if codes.ndim != 2 or codes.shape[1] != len(codebook_sizes):
        raise UserError(
            f"the codes have shape {codes.shape}: give one column for each of the codebooks {codebook_sizes}."
        )
    if not len(codes):
        raise UserError("the catalogue is empty: a trie needs the codes of at least one item.")
    if not np.issubdtype(codes.dtype, np.integer):
        raise UserError(f"the codes have dtype {codes.dtype}: semantic IDs are integers.")
    wrong = (codes < 0) | (codes >= np.array(codebook_sizes))
    if wrong.any():
        row, level = np.argwhere(wrong)[0]
        raise UserError(
            f"item row {row} has the code {codes[row, level]} at level {level}, whose codebook is "
            f"0..{codebook_sizes[level] - 1} ({wrong.any(1).sum()} such items): were the IDs made with other codebooks?"
        )


def _sorted_items(codes: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Item indices sorted by ID, then by falling `order`, then by index."""
    keys = list(codes.T[::-1])  # lexsort is stable and its last key counts most
    if order is not None:
        order = np.asarray(order, np.float64)
        if order.shape != (len(codes),) or np.isnan(order).any():
            raise UserError(
                f"`order` has shape {order.shape}: give one number, not NaN, for each of {len(codes)} items."
            )
        keys.insert(0, -order)
    return np.lexsort(keys)


def _capacity(count: int, capacity: int | None, like: Trie | None) -> int:
    if capacity is None and like is not None and count <= like.capacity:
        return like.capacity
    if capacity is None:
        step = max(8, 2 ** (count.bit_length() - 4))
        return -(-count // step) * step
    if count > capacity:
        raise UserError(f"the catalogue has {count} items but capacity={capacity}: raise the capacity.")
    return capacity


def _branching(largest: int, codebook_size: int, like: int) -> int:
    """The bound on children: a power of two up to the codebook, so that small changes of a catalogue don't move it."""
    return max(like, min(codebook_size, max(8, 2 ** (largest - 1).bit_length())))


def _padded(values: np.ndarray, size: int, fill: int) -> jax.Array:
    padded = np.full(size, fill, np.int32)
    padded[: len(values)] = values
    return jnp.asarray(padded)
