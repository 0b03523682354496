"""The trie's arrays against a plain dictionary of prefixes; filters against counting."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.decoding.filters import ItemFilter, build_filter
from jaxrec.decoding.trie import Trie, _sorted_rows, build_text_trie, build_trie

SIZES = (3, 5, 4)


def random_codes(seed: int, count: int, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, sizes, (count, len(sizes)))


def read_back(trie: Trie) -> dict[tuple[int, ...], list[int]]:
    """Every ID with its items, in trie order, found by walking from the root."""
    found = {}

    def walk(level: int, node: int, prefix: tuple[int, ...]) -> None:
        if level == trie.levels:
            starts = trie.starts[-1]
            found[prefix] = trie.items[int(starts[node]) : int(starts[node + 1])].tolist()
            return
        for child in range(int(trie.children[level][node]), int(trie.children[level][node + 1])):
            walk(level + 1, child, (*prefix, int(trie.tokens[level][child])))

    trie = jax.tree.map(np.asarray, trie)
    walk(0, 0, ())
    return found


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    spare=st.integers(0, 20),
)
def test_walking_the_arrays_gives_the_sorted_ids_and_their_items(seed, count, sizes, spare):
    codes = random_codes(seed, count, sizes)
    order = np.random.default_rng(seed).integers(0, 3, count)
    trie = build_trie(codes, sizes, order=order, capacity=count + spare)
    expected = {}
    for item in sorted(range(count), key=lambda item: (*codes[item], -order[item], item)):
        expected.setdefault(tuple(codes[item].tolist()), []).append(item)
    assert list(read_back(trie).items()) == list(expected.items())
    assert (int(trie.num_items), int(trie.num_leaves)) == (count, len(expected))


def test_every_node_is_the_range_of_its_items():
    codes = random_codes(0, 50)
    trie = build_trie(codes, SIZES)
    for level in range(3):
        prefixes = np.unique(codes[:, : level + 1], axis=0)
        for node, prefix in enumerate(prefixes):
            start, end = trie.starts[level][node : node + 2]
            held = np.asarray(trie.items[int(start) : int(end)])
            np.testing.assert_array_equal(
                np.sort(held), np.flatnonzero((codes[:, : level + 1] == prefix).all(1)), err_msg=f"{level} {prefix}"
            )


def test_items_under_one_id_go_by_falling_order_then_by_index():
    codes = np.array([[1, 1, 1]] * 4 + [[0, 0, 0]])
    assert read_back(build_trie(codes, SIZES, order=np.array([2, 9, 2, 9, 0]))) == {
        (0, 0, 0): [4],
        (1, 1, 1): [1, 3, 0, 2],
    }
    assert read_back(build_trie(codes, SIZES))[(1, 1, 1)] == [0, 1, 2, 3]


def test_a_refreshed_catalogue_keeps_shapes_and_static_sizes():
    first = build_trie(random_codes(0, 30), SIZES, capacity=64)
    refreshed = build_trie(random_codes(1, 45), SIZES, like=first)
    assert jax.tree.structure(first) == jax.tree.structure(refreshed)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, refreshed)
    assert build_trie(random_codes(1, 65), SIZES, like=first).capacity > 64


def test_branching_grows_with_the_catalogue_that_outgrows_it():
    sparse = build_trie(np.array([[0, 0]]), (2, 100), capacity=200)
    full = build_trie(np.array(list(itertools.product(range(2), range(100)))), (2, 100), like=sparse)
    assert (sparse.branching, full.branching) == ((2, 8), (2, 100))


def test_a_large_codebook_costs_no_dense_table():
    sizes = (8192, 8192, 8192)
    trie = build_trie(random_codes(0, 1000, sizes), sizes)
    assert trie.nbytes() < 100_000


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (
            [[0, 0], [0, 5], [9, 9]],
            (3, 5),
            "item row 1 has the code 5 at level 1, whose codebook is 0..4 (2 such items)",
        ),
        ([[0, 0], [-1, 0]], (3, 5), "item row 1 has the code -1 at level 0"),
        ([[0, 0, 0]], (3, 5), "shape (1, 3)"),
        ([0, 1], (3, 5), "shape (2,)"),
        (np.zeros((0, 2), int), (3, 5), "empty"),
        ([[0.0, 1.0]], (3, 5), "float64"),
        ([[0, 0]], (3, 0), "at least 1"),
    ],
)
def test_bad_codes_are_named(codes, sizes, message):
    with pytest.raises(UserError) as error:
        build_trie(np.asarray(codes), sizes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 3}, "4 items but capacity=3"),
        ({"order": np.zeros(3)}, "`order` has shape (3,)"),
        ({"order": np.array([0, 1, np.nan, 2])}, "not NaN"),
        ({"like": build_trie(np.zeros((1, 2), int), (3, 5))}, "codebooks (3, 5, 4), the one it replaces (3, 5)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        build_trie(random_codes(0, 4), SIZES, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("count", [1, 32, 100])
def test_filters_count_and_select_exactly(count):
    codes = random_codes(count, count)
    trie = build_trie(codes, SIZES, capacity=count)
    generator = np.random.default_rng(count)
    allowed = np.stack([generator.random(count) < share for share in (0.5, 0.05, 1.0, 0.0)])
    item_filter = jax.jit(build_filter)(trie, jnp.asarray(allowed))

    in_order = allowed[:, np.asarray(trie.items)]
    positions = np.tile(np.arange(count + 1), (4, 1))
    expected = np.concatenate([np.zeros((4, 1), int), in_order.cumsum(1)], axis=1)
    np.testing.assert_array_equal(item_filter.count_before(jnp.asarray(positions)), expected)

    selected = np.asarray(jax.jit(ItemFilter.select)(item_filter, jnp.tile(jnp.arange(count), (4, 1))))
    for row in range(4):
        where = np.flatnonzero(in_order[row])
        np.testing.assert_array_equal(selected[row, : len(where)], where)


def test_items_without_a_column_are_not_allowed():
    trie = build_trie(np.array([[0], [1], [2]]), (3,), capacity=8)
    item_filter = build_filter(trie, jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(item_filter.count_before(jnp.array([[0, 1, 2, 3]])), [[0, 1, 2, 2]])


def test_a_filter_of_another_type_is_refused():
    trie = build_trie(np.array([[0]]), (3,))
    with pytest.raises(UserError, match="int32"):
        build_filter(trie, jnp.ones((1, 1), jnp.int32))


@pytest.mark.parametrize("bits", [(9, 9, 9), (31, 31, 31), (3, 40, 25, 2)])
def test_ids_of_any_number_of_bits_are_sorted(bits):
    """One pass or several: 27 bits, 93 and 70 with the row's place beside them."""
    generator = np.random.default_rng(0)
    sizes = tuple(2**b for b in bits)
    codes = np.stack([generator.choice([0, 1, size // 2, size - 1], 300) for size in sizes], axis=1)
    order = generator.integers(0, 3, 300)
    items, differs = _sorted_rows(codes, sizes, order)
    expected = np.lexsort([np.arange(300), -order, *codes.T[::-1]])
    np.testing.assert_array_equal(items, expected)
    for level in range(len(sizes)):
        prefix = codes[expected, : level + 1]
        np.testing.assert_array_equal(differs[level][1:], (prefix[1:] != prefix[:-1]).any(1))


def test_bits_say_which_codes_follow_and_a_refresh_keeps_them():
    sizes = (32, 64)
    codes = random_codes(1, 1500, sizes)
    trie = build_trie(codes, sizes)
    assert [bits is not None for bits in trie.bits] == [True, True]
    for level, (bits, size) in enumerate(zip(trie.bits, sizes, strict=True)):
        held = np.asarray(bits)[..., None] >> np.arange(32, dtype=np.uint32) & 1
        expected = np.zeros((len(bits), size), bool)
        first = np.unique(codes[:, 0])
        for prefix in np.unique(codes[:, : level + 1], axis=0):
            expected[np.searchsorted(first, prefix[0]) if level else 0, prefix[-1]] = True
        np.testing.assert_array_equal(held.reshape(len(bits), size).astype(bool), expected)
    few = build_trie(codes[:3], sizes, like=trie)
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, trie)
    sparse = build_trie(codes[:3], sizes, capacity=trie.capacity)
    assert sparse.bits == (None, None)
    assert build_trie(codes, sizes, like=sparse).bits == (None, None)


def test_repeats_are_refused_where_they_are_errors():
    codes = np.array([[2, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]])
    with pytest.raises(UserError, match=r"rows 1 and 3 are the same \(2 repeats\)"):
        build_trie(codes, SIZES, unique=True)
    assert build_trie(codes[:3], SIZES, unique=True).num_leaves == 3


def read_texts(trie: Trie) -> dict[tuple[int, ...], list[int]]:
    """Every text with its items, in trie order."""
    found, trie = {}, jax.tree.map(np.asarray, trie)

    def walk(level: int, node: int, end: int, prefix: tuple[int, ...]) -> None:
        """The children of a node of the level above, whose items end at `end`."""
        last = int(trie.children[level][node + 1]) - 1
        for child in range(int(trie.children[level][node]), last + 1):
            text, start = (*prefix, int(trie.tokens[level][child])), int(trie.starts[level][child])
            child_end = end if child == last else int(trie.starts[level][child + 1])
            assert child_end == int(trie.node_ends(level, np.int32(child), np.int32(node), np.int32(end)))
            if text[-1] == trie.eos:
                found[text] = trie.items[start:child_end].tolist()
            else:
                walk(level + 1, child, child_end, text)

    walk(0, 0, int(trie.num_items), ())
    return found


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([0, 1, 3, 4]), max_size=4), min_size=1, max_size=25),
    order=st.integers(0, 100),
    spare=st.integers(0, 9),
    padded=st.booleans(),
)
def test_walking_the_arrays_gives_the_texts_and_their_items(rows, order, spare, padded):
    rows = [(*row, 2) for row in rows]
    order = np.random.default_rng(order).integers(0, 3, len(rows))
    options = {"order": order, "capacity": len(rows) + spare}
    if padded:
        matrix = np.full((len(rows), 6), 2)  # whatever stands after the end doesn't count
        for row, text in enumerate(rows):
            matrix[row, : len(text)] = text
        trie = build_text_trie(matrix, 5, 2, lengths=np.array([len(row) for row in rows]), **options)
    else:
        trie = build_text_trie(rows, 5, 2, **options)
    expected = {}
    for item in sorted(range(len(rows)), key=lambda item: (rows[item], -order[item], item)):
        expected.setdefault(rows[item], []).append(item)
    assert read_texts(trie) == expected
    assert trie.num_leaves == len(expected)
    for leaf, items in enumerate(expected.values()):
        first, end = trie.leaf_ranges(jnp.int32(leaf))
        assert trie.items[int(first) : int(end)].tolist() == items
    # An ended text takes no node: each level has one node for each distinct prefix of its length, no more.
    for level in range(trie.levels):
        assert int(trie.children[level].max()) == len({row[: level + 1] for row in rows if len(row) > level})


def test_a_refreshed_list_of_texts_keeps_shapes():
    generator = np.random.default_rng(0)

    def texts(count, longest):
        return [(*generator.integers(2, 9, generator.integers(0, longest)), 1) for _ in range(count)]

    first = build_text_trie(texts(90, 6), 9, 1, capacity=100)
    for count, longest in ((95, 6), (10, 3)):
        refreshed = build_text_trie(texts(count, longest), 9, 1, like=first)
        assert jax.tree.structure(first) == jax.tree.structure(refreshed)
        assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, refreshed)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[0, 1], [0]], {}, "row 1 is [0] (1 such rows): put eos=1 at its end"),
        ([[0, 1], [1, 0, 1], [0]], {}, "row 1 is [1, 0, 1] (2 such rows)"),
        ([[0, 1], [9, 1]], {}, "row 1 has the token 9 at place 0, the vocabulary is 0..4"),
        ([[0, 1], []], {}, "row 1 is empty"),
        ([], {}, "no rows"),
        ([[0, 1], [0, 0, 0, 1]], {"max_length": 3}, "row 1 has 4 tokens but max_length=3"),
        ([[0, 1], [2, 1], [0, 1]], {"unique": True}, "rows 0 and 2 are the same"),
        ([[0.5, 1.0]], {}, "float64"),
        ([[0, 1]], {"lengths": np.array([2])}, "goes with a padded matrix"),
        (np.array([[0, 1]]), {}, "`lengths` has shape ()"),
        (np.array([[0, 1], [0, 1]]), {"lengths": np.array([2, 3])}, "row 1 has length 3"),
        ([[0, 1]], {"like": build_text_trie([[0, 2]], 5, 2)}, "vocabulary=5 and eos=1, the trie they replace 5 and 2"),
        ([[0, 1]], {"capacity": 0}, "1 items but capacity=0"),
    ],
)
def test_bad_texts_are_named(rows, options, message):
    with pytest.raises(UserError) as error:
        build_text_trie(rows, 5, 1, **options)
    assert message in str(error.value)


def test_a_trie_of_ids_does_not_replace_one_of_texts():
    with pytest.raises(UserError, match="and texts"):
        build_trie(np.array([[0, 1]]), (5, 5), like=build_text_trie([[0, 1]], 5, 1))
