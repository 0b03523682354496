"""A catalogue's targets, semantic IDs or texts, as a trie of flat arrays.

The distinct targets are sorted, so that every prefix (a node) is one range of items and the children of a node are
consecutive in the level below. With the nodes of each level numbered in that order, a level is three arrays:

    children [nodes above + 1]   node n of the level above has the children children[n] .. children[n + 1] - 1
    tokens   [nodes]             the code that leads to a node
    starts   [nodes + 1]         node n holds the items at positions starts[n] .. starts[n + 1] - 1 of `items`

A complete target is called a leaf; leaves are numbered in sorted order. All IDs have M codes, so their leaves are the
nodes of the last level. Texts have different lengths: a node whose token is `eos` has no children, and an ended text
has no node in later levels. So between node n and the next node of its level, which may have another parent, there may
be items of ended texts: the range of a parent's last child ends with the parent's range (`Trie.node_ends`).

No array has K x K entries, and node order is target order. All arrays are padded to a capacity, so a refreshed
catalogue has the same shapes and nothing recompiles.
"""

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError

WORD = 32


@flax.struct.dataclass
class Trie:
    """Sorted distinct targets, level by level; a pytree: pass it to a jitted function, don't close over it."""

    children: tuple[jax.Array, ...]
    """Per level: int32 [nodes above + 1], the first child of every node of the level above (of the root at 0)."""
    tokens: tuple[jax.Array, ...]
    """Per level: uint16 or int32 [nodes + branching], the code of every node; the padding makes the children of
    any node a slice of fixed length."""
    starts: tuple[jax.Array, ...]
    """Per level: int32 [nodes + branching + 1], the first position in `items` of every node, padded as `tokens`."""
    bits: tuple[jax.Array | None, ...]
    """Per level: uint32 [nodes above, K / 32], the codes that follow a node as bits; None on sparse levels."""
    items: jax.Array
    """int32 [capacity], item indices in target order; items of one target by falling `order`, then index."""
    leaf_starts: jax.Array | None
    """int32 [capacity + 1], the first position in `items` of every leaf, for texts; None for IDs: see `starts[-1]`."""
    num_items: jax.Array
    """int32 scalar, the number of real positions of `items`."""
    num_leaves: jax.Array
    """int32 scalar, the number of distinct targets."""
    codebook_sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """K of every level (for texts the vocabulary)."""
    branching: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """Per level: a bound, rounded up, on the children of one node of the level above."""
    eos: int | None = flax.struct.field(pytree_node=False, default=None)
    """The token that ends a text; None when every target has a code at every level."""

    @property
    def levels(self) -> int:
        """M, the number of codes in an ID, or the length of the longest text with its end token."""
        return len(self.codebook_sizes)

    @property
    def capacity(self) -> int:
        """The number of items that the arrays have room for."""
        return self.items.shape[0]

    def nodes(self, level: int) -> int:
        """The number of nodes of `level` that the arrays have room for."""
        return self.tokens[level].shape[0] - self.branching[level]

    def node_ends(self, level: int, nodes: jax.Array, parents: jax.Array, parent_ends: jax.Array) -> jax.Array:
        """The end of the items of nodes int32 [...] of `level`, given their parents and the ends of these."""
        after = self.starts[level][nodes + 1]
        if self.eos is None:
            return after
        return jnp.where(nodes + 1 == self.children[level][parents + 1], parent_ends, after)

    def leaf_ranges(self, leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The positions in `items` of leaves int32 [...]: (first, after the last)."""
        starts = self.starts[-1] if self.leaf_starts is None else self.leaf_starts
        return starts[leaves], starts[leaves + 1]

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
    unique: bool = False,
) -> Trie:
    """Builds the trie of codes int [I, M], row = item index; items under one ID go by falling `order` [I], then index.

    Args:
        codes: 0 <= codes[:, m] < codebook_sizes[m].
        codebook_sizes: K of every level; they may differ.
        order: for example the popularity of each item; None lists items by index.
        capacity: items the arrays are padded to; by default I rounded up to an eighth of a power of two.
        like: an earlier trie. Its capacity and branching are kept, so functions compiled for it are reused; arrays that
            are too small grow, which costs one compilation.
        unique: refuse items that share an ID.

    Raises:
        UserError: an empty catalogue, a wrong shape or dtype, a code outside its codebook, more items than capacity,
            two items of one ID if `unique`.
    """
    codes = np.asarray(codes)
    codebook_sizes = tuple(int(size) for size in codebook_sizes)
    _check_codes(codes, codebook_sizes)
    if like is not None and (like.codebook_sizes != codebook_sizes or like.eos is not None):
        raise UserError(
            f"the new catalogue has codebooks {codebook_sizes}, the one it replaces {like.codebook_sizes}"
            f"{'' if like.eos is None else ' and texts'}: IDs of other codebooks need a model trained on them."
        )
    return _build(codes, None, codebook_sizes, None, order, capacity, like, unique)


def build_text_trie(
    rows: np.ndarray | Sequence[Sequence[int]],
    vocabulary: int,
    eos: int,
    *,
    lengths: np.ndarray | None = None,
    max_length: int | None = None,
    order: np.ndarray | None = None,
    capacity: int | None = None,
    like: Trie | None = None,
    unique: bool = False,
) -> Trie:
    """Builds the trie of texts that end in `eos`, as lists of tokens or padded int [I, M] with lengths int [I].

    Equal rows are one leaf; its items go by falling `order` [I], then by index. Otherwise as `build_trie`; each level
    has room for a quarter more nodes than these rows need in proportion to the capacity, and grows when needed.

    Args:
        rows: 0 <= token < vocabulary, with `eos` once, at the end of each row.
        vocabulary: V.
        eos: the token that ends a text.
        lengths: the number of real tokens of each padded row, `eos` included; not for lists.
        max_length: M of the trie; by default the longest row, or that of `like`.

    Raises:
        UserError: no rows, a row that is empty, too long, or without `eos` at its end and only there, a token outside
            the vocabulary, lengths missing or wrong, more rows than capacity, two equal rows if `unique`.
    """
    tokens, lengths = _padded_rows(rows, lengths)
    _check_rows(tokens, lengths, vocabulary, eos)
    longest = int(lengths.max())
    if max_length is None:
        max_length = longest if like is None else max(longest, like.levels)
    if longest > max_length:
        row = int(lengths.argmax())
        raise UserError(f"row {row} has {longest} tokens but max_length={max_length}: cut it or raise max_length.")
    if like is not None and (like.eos != eos or like.codebook_sizes[0] != vocabulary):
        raise UserError(
            f"the new texts have vocabulary={vocabulary} and eos={eos}, the trie they replace "
            f"{like.codebook_sizes[0]} and {like.eos}: texts of another tokenizer need a model trained on them."
        )
    if like is not None and like.levels != max_length:
        like = None  # another number of levels has other shapes
    columns = np.arange(max_length)
    tokens = np.pad(tokens[:, :max_length], ((0, 0), (0, max(0, max_length - tokens.shape[1]))))
    tokens = np.where(columns < lengths[:, None], tokens, 0)
    return _build(tokens, lengths, (vocabulary,) * max_length, eos, order, capacity, like, unique)


def _build(codes, lengths, codebook_sizes, eos, order, capacity, like, unique) -> Trie:
    count = len(codes)
    padded_to = _capacity(count, capacity, like)
    items, differs = _sorted_rows(codes, codebook_sizes, order)
    if unique:
        _check_unique(items, differs[-1])
    room = 1.25 * padded_to / count  # the levels of texts grow unevenly
    lengths = None if lengths is None else lengths[items]
    above, nodes_above = np.zeros(1, np.int64), 1
    children, tokens, starts, bits, branching = [], [], [], [], []
    for level, size in enumerate(codebook_sizes):
        begins = differs[level] if lengths is None else differs[level] & (lengths > level)
        start = np.flatnonzero(begins)
        before = np.cumsum(begins, dtype=np.int32) - begins
        first_child = np.append(before[above], len(start))
        width = _branching(
            int(np.diff(first_child).max(initial=0)), size, like.branching[level] if like is not None else 0
        )
        if lengths is None:
            nodes = min(padded_to, math.prod(codebook_sizes[: level + 1]))
        elif like is not None and padded_to == like.capacity and len(start) <= like.nodes(level):
            nodes = like.nodes(level)
        else:
            nodes = min(padded_to, _round_up(int(len(start) * room)), math.prod(codebook_sizes[: level + 1]))
        token = codes[items[start], level]
        children.append(_padded(first_child, nodes_above + 1, len(start)))
        tokens.append(_padded(token, nodes + width, 0, np.uint16 if size <= 2**16 else np.int32))
        starts.append(_padded(start, nodes + width + 1, count))
        dense = eos is None and _is_dense(nodes_above, width, size, padded_to)
        dense &= like is None or like.bits[level] is not None
        bits.append(_bits(first_child, token, nodes_above, size) if dense else None)
        branching.append(width)
        above, nodes_above = start, nodes
    leaf_starts = np.flatnonzero(differs[-1])
    return Trie(
        children=tuple(children),
        tokens=tuple(tokens),
        starts=tuple(starts),
        bits=tuple(bits),
        items=_padded(items, padded_to, 0),
        leaf_starts=None if eos is None else _padded(leaf_starts, padded_to + 1, count),
        num_items=jnp.int32(count),
        num_leaves=jnp.int32(len(leaf_starts)),
        codebook_sizes=codebook_sizes,
        branching=tuple(branching),
        eos=eos,
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
    if codes.min() >= 0 and (codes.max(axis=0) < codebook_sizes).all():
        return
    wrong = (codes < 0) | (codes >= np.array(codebook_sizes))
    row, level = np.argwhere(wrong)[0]
    raise UserError(
        f"item row {row} has the code {codes[row, level]} at level {level}, whose codebook is "
        f"0..{codebook_sizes[level] - 1} ({wrong.any(1).sum()} such items): were the IDs made with other codebooks?"
    )


def _padded_rows(rows, lengths: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Lists of tokens or a padded matrix -> tokens int [I, M], lengths int [I]."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        if not len(rows):
            raise UserError("there are no rows: a trie needs at least one text.")
        if not np.issubdtype(rows.dtype, np.integer):
            raise UserError(f"the rows have dtype {rows.dtype}: tokens are integers.")
        if lengths is None or np.shape(lengths) != (len(rows),):
            raise UserError(f"`lengths` has shape {np.shape(lengths)}: give one number for each of {len(rows)} rows.")
        lengths = np.asarray(lengths)
        wrong = np.flatnonzero((lengths < 1) | (lengths > rows.shape[1]))
        if len(wrong):
            raise UserError(f"row {wrong[0]} has length {lengths[wrong[0]]}: lengths go from 1 to {rows.shape[1]}.")
        return rows, lengths
    if lengths is not None:
        raise UserError("`lengths` goes with a padded matrix: leave it out for lists of tokens.")
    lengths = np.array([len(row) for row in rows], np.int64)
    if not len(lengths):
        raise UserError("there are no rows: a trie needs at least one text.")
    if not lengths.all():
        raise UserError(f"row {int(lengths.argmin())} is empty: a text has at least its end token.")
    flat = np.concatenate([np.asarray(row) for row in rows])
    if not np.issubdtype(flat.dtype, np.integer):
        raise UserError(f"the rows have dtype {flat.dtype}: tokens are integers.")
    tokens = np.zeros((len(lengths), int(lengths.max())), flat.dtype)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    return tokens, lengths


def _check_rows(tokens: np.ndarray, lengths: np.ndarray, vocabulary: int, eos: int) -> None:
    if not 0 <= eos < vocabulary:
        raise UserError(f"eos is {eos}: give one of the {vocabulary} tokens, 0..{vocabulary - 1}.")
    place = np.arange(tokens.shape[1])
    real = place < lengths[:, None]
    outside = real & ((tokens < 0) | (tokens >= vocabulary))
    if outside.any():
        row, level = np.argwhere(outside)[0]
        raise UserError(
            f"row {row} has the token {tokens[row, level]} at place {level}, the vocabulary is 0..{vocabulary - 1} "
            f"({outside.any(1).sum()} such rows): was it made with another tokenizer?"
        )
    wrong = (real & ((tokens == eos) != (place == lengths[:, None] - 1))).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"row {row} is {tokens[row, : lengths[row]].tolist()} ({wrong.sum()} such rows): "
            f"put eos={eos} at its end, and only there."
        )


def _sorted_rows(
    codes: np.ndarray, codebook_sizes: tuple[int, ...], order: np.ndarray | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows sorted by code, then by falling `order`, then by index: (int64 [I], per level where a new prefix begins).

    As many levels as fit are packed into one int64 with the position of the row, so that a plain sort of numbers, which
    is several times faster than an argsort, is stable. Longer IDs take more passes, the last levels first.
    """
    count = len(codes)
    place_bits = max(1, (count - 1).bit_length())
    items = None if order is None else np.argsort(-_checked_order(order, count), kind="stable")
    place = np.arange(count)
    groups = []
    for levels in _packed_levels(codebook_sizes, 63 - place_bits)[::-1]:
        key = np.zeros(count, np.int64)
        for level in levels:
            key <<= _bit_length(codebook_sizes[level])
            key |= codes[:, level]
        mixed = ((key if items is None else key[items]) << place_bits) | place
        mixed.sort()
        moved = mixed & ((1 << place_bits) - 1)
        items = moved if items is None else items[moved]
        groups.append((levels, key))
    differs, begins = [], np.zeros(count, bool)
    begins[0] = True
    for number, (levels, key) in enumerate(groups[::-1]):
        ordered = mixed >> place_bits if number == 0 else key[items]
        shift = sum(_bit_length(codebook_sizes[level]) for level in levels)
        for level in levels:
            shift -= _bit_length(codebook_sizes[level])
            prefix = ordered >> shift
            begins = begins.copy()
            begins[1:] |= prefix[1:] != prefix[:-1]
            differs.append(begins)
    return items, differs


def _packed_levels(codebook_sizes: tuple[int, ...], room: int) -> list[list[int]]:
    """Neighbouring levels in groups of at most `room` bits."""
    groups, used = [[]], 0
    for level, size in enumerate(codebook_sizes):
        if groups[-1] and used + _bit_length(size) > room:
            groups.append([])
            used = 0
        groups[-1].append(level)
        used += _bit_length(size)
    return groups


def _bit_length(size: int) -> int:
    return max(1, (size - 1).bit_length())


def _checked_order(order: np.ndarray, count: int) -> np.ndarray:
    order = np.asarray(order, np.float64)
    if order.shape != (count,) or np.isnan(order).any():
        raise UserError(f"`order` has shape {order.shape}: give one number, not NaN, for each of {count} items.")
    return order


def _check_unique(items: np.ndarray, begins: np.ndarray) -> None:
    repeated = np.flatnonzero(~begins)
    if len(repeated):
        pairs = np.stack([items[repeated - 1], items[repeated]], axis=1)
        first, second = sorted(pairs[pairs.max(axis=1).argmin()].tolist())
        raise UserError(f"rows {first} and {second} are the same ({len(repeated)} repeats): keep one of them.")


def _capacity(count: int, capacity: int | None, like: Trie | None) -> int:
    if capacity is None and like is not None and count <= like.capacity:
        return like.capacity
    if capacity is None:
        return _round_up(count)
    if count > capacity:
        raise UserError(f"the catalogue has {count} items but capacity={capacity}: raise the capacity.")
    return capacity


def _round_up(count: int) -> int:
    """Rounds up to an eighth of a power of two, at least 8."""
    step = max(8, 2 ** (count.bit_length() - 4))
    return max(1, -(-count // step)) * step


def _branching(largest: int, codebook_size: int, like: int) -> int:
    """The bound on children, rounded up to a quarter of a power of two, so that it seldom changes; at most K."""
    step = max(8, 2 ** (largest.bit_length() - 3))
    return max(like, min(codebook_size, max(1, -(-largest // step)) * step))


def _is_dense(nodes_above: int, branching: int, size: int, capacity: int) -> bool:
    """Whether to store a bit for every code of every node: K fills whole words, and `bits` is no larger than
    `tokens`."""
    return size % WORD == 0 and 2 * branching > size and nodes_above * size <= 8 * 4 * max(capacity, size)


def _bits(first_child: np.ndarray, tokens: np.ndarray, nodes_above: int, size: int) -> jax.Array:
    parent = np.repeat(np.arange(len(first_child) - 1), np.diff(first_child))
    place = parent * size + tokens
    word = place // WORD
    begins = np.flatnonzero(np.diff(word, prepend=-1))
    words = np.zeros(nodes_above * size // WORD, np.uint32)
    bit = np.uint32(1) << (place % WORD).astype(np.uint32)
    words[word[begins]] = np.bitwise_or.reduceat(bit, begins)
    return jnp.asarray(words.reshape(nodes_above, size // WORD))


def _padded(values: np.ndarray, size: int, fill: int, dtype: type = np.int32) -> jax.Array:
    padded = np.full(size, fill, dtype)
    padded[: len(values)] = values
    return jnp.asarray(padded)
