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
from jaxrec.decoding.trie import Trie, build_trie

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
