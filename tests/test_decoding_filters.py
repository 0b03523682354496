"""Filters against bool arrays: masks, lists of blocked and allowed items, the bits of a batch on host and device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.decoding import filters
from jaxrec.decoding.beam import beam_search, expand_items
from jaxrec.decoding.filters import Allowed, ItemFilter, ItemOrder, build_filter, num_words, stack
from jaxrec.decoding.trie import build_trie

SIZES = (3, 5, 4)


def random_codes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES, (count, len(SIZES)))


def on_device(requests: list[Allowed]) -> ItemFilter:
    """`stack` as it is done where the device is not the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters.jax, "default_backend", lambda: "gpu")
        return stack(requests)


def check(requests: list[Allowed], expected: np.ndarray, trie) -> None:
    """The filter of `requests` is that of bool [B, I], bit for bit, in both ways of making it."""
    wanted = build_filter(trie, jnp.asarray(expected))
    for made in (stack(requests), on_device(requests)):
        np.testing.assert_array_equal(made.words, wanted.words)
        np.testing.assert_array_equal(made.before, wanted.before)
        assert made.words.dtype == jnp.uint32 and made.before.dtype == jnp.int32
    assert [request.count for request in requests] == expected.sum(1).tolist()


listed = st.lists(st.integers(-3, 70), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    capacity=st.sampled_from([31, 32, 33, 64]),
    room=st.sampled_from([0, 1, 2, 17, 30]),
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=2),
    blocked=st.lists(listed, min_size=3, max_size=3),
    only=st.lists(st.none() | listed, min_size=3, max_size=3),
)
def test_any_masks_and_lists_are_what_bools_say(seed, capacity, room, shares, blocked, only):
    count = capacity - room
    trie = build_trie(random_codes(seed, count), SIZES, capacity=capacity)
    order = ItemOrder(trie)
    generator = np.random.default_rng(seed)
    bools = [generator.random(count) < share for share in shares]
    masks = [order.mask(each) for each in bools]
    chosen = [(None, np.ones(count, bool)), (masks[0], bools[0]), (masks[0] & masks[1], bools[0] & bools[1])]
    requests, expected = [], []
    for (mask, allowed), out, within in zip(chosen, blocked, only, strict=True):
        requests.append(order.allowed(mask, blocked=out, only=within))
        rows = range(count)
        expected.append(
            np.array([allowed[row] and row not in out and (within is None or row in within) for row in rows])
        )
    expected = np.stack(expected)
    check(requests, expected, trie)
    positions = order.positions[:count]
    for request, row in zip(requests, expected, strict=True):
        np.testing.assert_array_equal(request.holds(positions), row)


def test_hand_computed_bits():
    """Items 2, 0, 1 in ID order; item 1 is blocked twice: bits 0 and 1 stay, one word and the spare one."""
    trie = build_trie(np.array([[1], [2], [0]]), (3,), capacity=32)
    order = ItemOrder(trie)
    assert order.items.tolist() == [2, 0, 1] and order.positions.tolist() == [1, 2, 0]
    assert order.all.words.tolist() == [0b111, 0]
    request = order.allowed(blocked=[1, 1])
    assert request.flipped.tolist() == [2] and request.count == 2
    assert order.allowed(only=[1, 2, 2], blocked=[2]).flipped.tolist() == [2]
    made = stack([request, order.allowed(only=[2, 2, 99, -1])])
    assert made.words.tolist() == [[0b011, 0], [0b001, 0]] and made.before.tolist() == [[0, 2], [0, 1]]


def test_what_is_allowed_without_some_items():
    trie = build_trie(random_codes(0, 40), SIZES)
    order, generator = ItemOrder(trie), np.random.default_rng(0)
    for only in (None, generator.integers(0, 40, 15)):
        mask, out, more = generator.random(40) < 0.6, generator.integers(0, 40, 6), generator.integers(0, 44, 9)
        request = order.without(order.allowed(order.mask(mask), blocked=out, only=only), more)
        expected = mask & ~np.isin(np.arange(40), [*out, *more])
        expected &= True if only is None else np.isin(np.arange(40), only)
        check([request], expected[None], trie)
        assert request.count == expected.sum()


@pytest.mark.parametrize("capacity", [31, 32, 33, 1000])
def test_there_is_a_word_for_the_end_of_the_last_node(capacity):
    trie = build_trie(random_codes(0, 31), SIZES, capacity=capacity)
    made = stack([ItemOrder(trie).allowed()])
    assert made.words.shape == (1, num_words(capacity)) == build_filter(trie, jnp.ones((1, 31), bool)).words.shape
    assert made.count_before(jnp.array([[capacity]])).tolist() == [[31]]


def test_items_that_are_not_in_the_trie_are_not_allowed():
    """As in a catalogue whose removed items keep their indices."""
    trie = build_trie(random_codes(1, 3), SIZES, capacity=40)
    trie = trie.replace(items=jnp.where(jnp.arange(40) < 3, 10 * trie.items + 5, 0))  # items 5, 15, 25
    order = ItemOrder(trie)
    assert order.places([5, 15, 25]).tolist() == order.positions[[5, 15, 25]].tolist()
    assert sorted(order.places([5, 15, 25]).tolist()) == [0, 1, 2] and order.places([0, 6, 26, -1]).tolist() == [-1] * 4
    assert order.mask(np.ones(26, bool)).count == 3
    assert order.mask(np.ones(10, bool)).count == 1, "items beyond the mask are not allowed"
    assert order.allowed(blocked=[15, 0, 6]).count == 2 and order.allowed(only=[0, 6, 25]).count == 1


def test_many_blocked_items_need_few_shapes():
    trie = build_trie(random_codes(2, 600), SIZES)
    order = ItemOrder(trie)
    generator = np.random.default_rng(3)
    lists = [generator.integers(0, 600, size) for size in (0, 8, 9, 65, 900)]
    shapes = set()
    compiled = filters._stack_on_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "_stack_on_device", lambda rows, out: shapes.add(out.shape) or compiled(rows, out))
        for blocked in lists:
            expected = ~np.isin(np.arange(600), blocked)[None]
            check([order.allowed(blocked=blocked)], expected, trie)
    assert shapes == {(1, 8), (1, 64), (1, 512)}


def test_a_search_with_a_stacked_filter_is_the_search_with_bools():
    codes = random_codes(4, 60)
    trie = build_trie(codes, SIZES, capacity=64)
    generator = np.random.default_rng(5)
    tables = [generator.normal(size=(4, 1, size)).astype(np.float32) for size in SIZES]
    bools = generator.random((4, 60)) < np.array([[0.5], [0.1], [1.0], [0.0]])
    order = ItemOrder(trie)
    requests = [order.allowed(order.mask(row)) for row in bools]

    @jax.jit
    def search(allowed):
        def extend(tokens, cache, level):
            width = 1 if tokens is None else tokens.shape[1]
            return jnp.broadcast_to(tables[level], (4, width, SIZES[level])), cache

        result = beam_search(extend, (), trie, batch=4, beam_width=7, allowed=allowed)
        return result, expand_items(trie, result, k=9, allowed=allowed)

    jax.tree.map(np.testing.assert_array_equal, search(stack(requests)), search(jnp.asarray(bools)))


def test_wrong_masks_are_named():
    order = ItemOrder(build_trie(random_codes(6, 5), SIZES))
    with pytest.raises(UserError, match=r"int64\[5\]: expected bool \[items\]"):
        order.mask(np.ones(5, np.int64))
    with pytest.raises(UserError, match=r"bool\[1, 5\]: expected bool \[items\]"):
        order.mask(np.ones((1, 5), bool))
