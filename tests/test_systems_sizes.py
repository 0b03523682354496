"""Sizes from the counts of a log: monotone, within bounds, and such that a configuration of them is accepted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.systems.sizes import sizes_of

COUNTS = st.tuples(st.integers(100, 1_000_000), st.integers(50, 500_000), st.integers(1_000, 1_000_000))


@settings(deadline=None)
@given(COUNTS, st.integers(1_000, 1_000_000))
def test_more_purchases_are_never_a_smaller_model_or_more_dropout(counts, more):
    items, users, few = counts
    small, large = (sizes_of(items, users, each) for each in sorted((few, more)))
    for name in ("width", "heads", "experts", "queries", "batch", "steps", "warmup", "history", "item_vectors"):
        assert getattr(small, name) <= getattr(large, name), name
    assert small.dropout >= large.dropout and small.context_dropout >= large.context_dropout
    assert (small.codes, small.digits) == (large.codes, large.digits)


@settings(deadline=None)
@given(COUNTS, st.integers(16, 1_000_000))
def test_more_items_are_never_fewer_codes(counts, more):
    few, large = (sizes_of(items, *counts[1:]) for items in sorted((counts[0], more)))
    assert few.codes <= large.codes and few.digits <= large.digits


@settings(deadline=None)
@given(COUNTS)
def test_sizes_are_within_bounds(counts):
    items, sizes = counts[0], sizes_of(*counts)
    assert 4 <= sizes.codes <= min(2048, items) and 3 <= sizes.digits <= 12
    assert 64 <= sizes.width <= 256 and sizes.width == 32 * sizes.heads
    assert 16 <= sizes.batch <= 128 and 60 <= sizes.steps <= 20_000 and 0 < sizes.warmup < sizes.steps
    assert 0 <= sizes.context_dropout <= sizes.dropout <= 0.3
    assert sizes.buckets == (sizes.history, 2 * sizes.history, 4 * sizes.history) and 32 <= sizes.history <= 128
    assert sizes.codes**2 * 2**sizes.digits > items, "IDs enough for all items"


def test_sizes_by_hand():
    small, large = sizes_of(3_000, 2_000, 4_300), sizes_of(100_000, 200_000, 1_000_000)
    assert (small.codes, small.width, small.experts, small.batch, small.steps) == (64, 64, 1, 32, 330)
    assert (large.codes, large.width, large.experts, large.batch, large.steps) == (512, 256, 8, 128, 15_630)
    assert small.dropout == 0.24 and large.dropout == 0 and not small.item_vectors


@pytest.mark.parametrize("counts", [(3, 10, 100), (100, 0, 100), (100, 10, 2)])
def test_too_little_data_are_refused(counts):
    with pytest.raises(UserError, match=r"at least .* are needed"):
        sizes_of(*counts)
