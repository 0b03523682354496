"""Item attributes as small integers."""

import numpy as np
import pyarrow as pa
import pytest

from jaxrec.config import UserError
from jaxrec.data.attributes import PRICE_STEPS, attribute_indices, later_attribute_indices

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "category": ["tea", None, "cake", "tea"],
        "brand": pa.array(["", "x", None, None], pa.string()),
        "price": pa.array([1.0, None, 3.0, 1.0]),
        "tags": [["u"], [], ["v"], None],
    }
)


def test_words_are_numbered_in_alphabetical_order_and_zero_is_missing():
    indices, sizes = attribute_indices(ITEMS, ["category", "brand"])
    assert indices.dtype == np.int32
    # cake 1, tea 2; the empty word is a word
    assert indices.tolist() == [[2, 1], [0, 2], [1, 0], [2, 0]]
    assert sizes == (3, 3)


def test_numbers_are_cut_into_buckets_of_equal_count():
    values = np.random.default_rng(0).permutation(160) ** 2
    indices, sizes = attribute_indices(pa.table({"price": pa.array(values)}), ["price"])
    assert sizes == (PRICE_STEPS + 1,)
    assert np.bincount(indices[:, 0]).tolist() == [0] + [10] * 16
    assert (np.diff(indices[np.argsort(values), 0]) >= 0).all()


def test_a_missing_number_is_zero_and_few_values_share_few_buckets():
    indices, sizes = attribute_indices(ITEMS, ["price"])
    cheap, missing, dear, cheap_too = indices[:, 0]
    assert missing == 0
    assert 0 < cheap == cheap_too < dear < sizes[0]


def test_nan_is_missing_as_null_is():
    """It has the index 0, and moves no edge of the buckets, in the items and in those that come later."""
    prices = np.random.default_rng(0).normal(size=40)
    with_nan = pa.table({"price": pa.array(np.where(np.arange(40) % 4 == 0, np.nan, prices))})
    with_null = pa.table({"price": pa.array(prices, mask=np.arange(40) % 4 == 0)})
    indices, sizes = attribute_indices(with_null, ["price"])
    found, found_sizes = attribute_indices(with_nan, ["price"])
    np.testing.assert_array_equal(found, indices)
    assert found_sizes == sizes and (found[::4] == 0).all() and found.max() == PRICE_STEPS
    np.testing.assert_array_equal(later_attribute_indices(with_null, ["price"], with_nan), indices)
    np.testing.assert_array_equal(later_attribute_indices(with_nan, ["price"], with_null), indices)
    nothing = pa.table({"price": [np.nan, np.nan]})
    assert attribute_indices(nothing, ["price"])[1] == (1,)


def test_nothing_known():
    nothing = pa.table({"price": pa.array([None, None], pa.float64()), "brand": pa.array([None, None], pa.string())})
    indices, sizes = attribute_indices(nothing, ["price", "brand"])
    assert indices.tolist() == [[0, 0], [0, 0]]
    assert sizes == (1, 1)
    indices, sizes = attribute_indices(ITEMS, [])
    assert indices.shape == (4, 0)
    assert sizes == ()


def test_the_order_of_rows_and_chunks_does_not_matter():
    cut = pa.concat_tables([ITEMS.slice(2), ITEMS.slice(0, 2)])
    whole, sizes = attribute_indices(ITEMS, ["category", "price"])
    chunked, same = attribute_indices(cut, ["category", "price"])
    assert np.array_equal(chunked, whole[[2, 3, 0, 1]])
    assert same == sizes


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["category", "color"], r"no column 'color'; it has category, brand, price, tags"),
        (["tags"], r"'tags' of items.parquet is list<.*>; give one of words or numbers"),
    ],
)
def test_a_column_that_will_not_do(columns, message):
    with pytest.raises(UserError, match=message):
        attribute_indices(ITEMS, columns)


def test_later_items_are_numbered_as_the_earlier_ones():
    later = pa.table({"category": ["cake", "milk", None], "price": [2.0, 99.0, None], "brand": ["x", "", "y"]})
    columns = ["category", "brand", "price"]
    earlier, _ = attribute_indices(ITEMS, columns)
    indices = later_attribute_indices(ITEMS, columns, later)
    assert indices[:, 0].tolist() == [1, 0, 0], "a word that no earlier item has is as if missing"
    assert indices[:, 1].tolist() == [2, 1, 0]
    low, high = earlier[0, 2], earlier[2, 2]
    assert low <= indices[0, 2] <= high == indices[1, 2] and indices[2, 2] == 0
    np.testing.assert_array_equal(later_attribute_indices(ITEMS, columns, ITEMS), earlier)
