"""Declarative filters against plain Python over rows."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.catalogue.predicates import Between, OneOf, check_kind, index_column, parse_where
from jaxrec.config import UserError

ROWS = {
    "category": ["shoes", "bags", None, "shoes", "hats", "bags"],
    "price": [5.0, 20.0, 7.0, None, float("nan"), 0.1],
    "stock": [3, 0, None, -2, 7, 2**53 + 1],
    "new": [True, None, False, True, False, False],
    "tags": [["red", "old"], [], None, ["old"], [None], ["red"]],
}
TABLE = pa.table(ROWS)


def matches(conditions: dict) -> list[bool]:
    found = np.ones(len(TABLE), bool)
    for name, condition in parse_where(conditions):
        column = index_column(name, TABLE[name])
        check_kind(name, column, condition)
        found &= column.matches(condition)
    return found.tolist()


def plain(value, condition) -> bool:
    """One value of a row against a condition as it stands in a request."""
    if value is None or value != value:
        return False
    if isinstance(condition, dict):
        low, high = condition.get("min"), condition.get("max")
        return (low is None or value >= low) and (high is None or value <= high)
    wanted = condition if isinstance(condition, list) else [condition]
    return any(each in wanted for each in value) if isinstance(value, list) else value in wanted


bound = st.none() | st.sampled_from([-2, 0, 0.1, 5, 7, 7.5, 20, 2**53])
bounds = st.builds(lambda a, b: {"min": a, "max": b}, bound, bound).filter(
    lambda b: b["min"] is None or b["max"] is None or b["min"] <= b["max"]
)
words = st.lists(st.sampled_from(["shoes", "bags", "hats", "gone"]), max_size=3)
CONDITIONS = {
    "category": words | st.sampled_from(["shoes", "gone"]),
    "price": bounds | st.lists(st.sampled_from([5, 7.0, 0.1, 99]), max_size=2),
    "stock": bounds | st.lists(st.sampled_from([3, 0, -2, 0.5, 7.0, 2**53, 2**53 + 1, 2**80, 1e300]), max_size=4),
    "new": st.booleans() | st.just([True, False]),
    "tags": st.lists(st.sampled_from(["red", "old", "none"]), max_size=2) | st.just("red"),
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=CONDITIONS))
def test_a_filter_matches_the_rows_that_plain_python_does(conditions):
    expected = [
        all(plain(ROWS[name][row], condition) for name, condition in conditions.items()) for row in range(len(TABLE))
    ]
    assert matches(conditions) == expected


def test_hand_computed():
    assert matches({"category": ["shoes", "bags"], "price": {"min": 5, "max": 20}}) == [True, True, *[False] * 4]
    assert matches({"stock": 2**53 + 1}) == [*[False] * 5, True], "whole numbers are compared as such"
    assert matches({"category": []}) == [False] * 6
    assert matches({"tags": "old"}) == [True, False, False, True, False, False]


def test_columns_of_other_types_are_compared_as_what_they_hold():
    column = pa.chunked_array([pa.array(["a", "b"]), pa.array([None, "a"])]).dictionary_encode()
    assert index_column("x", column).matches(OneOf("text", ("a",))).tolist() == [True, False, False, True]
    narrow = pa.chunked_array([pa.array([1, 255, None], pa.uint8())])
    assert index_column("x", narrow).matches(Between(-5, 1e9)).tolist() == [True, True, False]
    assert index_column("x", narrow).matches(OneOf("number", (300, -1, 255))).tolist() == [False, True, False]
    single = pa.chunked_array([pa.array([0.1, 0.2], pa.float32())])
    assert index_column("x", single).matches(OneOf("number", (0.1,))).tolist() == [True, False]


def test_a_long_list_of_numbers_takes_memory_for_the_items_alone():
    items, listed = 20_000, list(range(0, 20_000, 2))
    column = index_column("x", pa.chunked_array([pa.array(np.arange(items) % 15_000)]))
    (_, condition), *_ = parse_where({"x": listed})
    tracemalloc.start()
    found = column.matches(condition)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.arange(items) % 15_000 % 2 == 0)
    assert most < 100 * items, "one mask a value would be 10,000 bytes an item"


def test_equal_filters_are_one_key_and_types_count():
    assert parse_where({"b": [2, 1, 1], "a": "x"}) == parse_where({"a": ["x"], "b": [1, 2]})
    assert parse_where({"a": 1}) != parse_where({"a": True})
    assert len({parse_where({"a": {"min": 1}}), parse_where({"a": {"min": 1, "max": None}})}) == 1


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["price"], "filter is ['price']: give an object such as {\"category\": [\"shoes\"]}"),
        ({"price": {"min": 9, "max": 3}}, "filter.price has min 9 above max 3: no item can match"),
        ({"price": {"low": 9}}, "filter.price is {'low': 9}: bounds are {\"min\": 5, \"max\": 20}, or one of them"),
        ({"price": {}}, "filter.price is {}: bounds are {\"min\": 5, \"max\": 20}, or one of them"),
        ({"price": {"min": "5"}}, "filter.price.min is '5': give a number"),
        ({"price": None}, "filter.price has the value None: give text, numbers, true or false"),
        ({"price": float("nan")}, "filter.price has the value nan: give text, numbers, true or false"),
        ({"price": [[1]]}, "filter.price has the value [1]: give text, numbers, true or false"),
        ({"price": [1, "x"]}, "filter.price lists number and text values: give values of one type"),
        ({"price": "cheap"}, "filter.price is 'cheap', but the column holds numbers"),
        ({"price": True}, "filter.price is True, but the column holds numbers"),
        ({"new": 1}, "filter.new is 1, but the column holds true and false"),
        ({"new": {"min": 0}}, "filter.new is bounds, but the column holds true and false"),
        ({"category": {"min": 1}}, "filter.category is bounds, but the column holds text"),
        ({"tags": 3}, "filter.tags is 3, but the column holds text"),
    ],
)  # fmt: skip
def test_one_sentence_for_every_bad_filter(conditions, message):
    with pytest.raises(UserError) as error:
        matches(conditions)
    assert str(error.value) == message


def test_a_column_that_filters_can_not_work_on():
    with pytest.raises(UserError, match=r"filter.when: the column is timestamp\[s\], and filters work on text"):
        index_column("when", pa.chunked_array([pa.array([1], pa.timestamp("s"))]))
    with pytest.raises(UserError, match=r"filter.sizes: the column is list"):
        index_column("sizes", pa.chunked_array([pa.array([[1, 2]])]))
