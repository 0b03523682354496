"""The last searches and items before a moment, against plain loops; what a record's past holds."""

import numpy as np
import pytest
from search_records import random_record

from jaxrec.data.searches import (
    before_moment,
    before_search,
    before_session,
    led_to,
    query_of_events,
    recent_items,
    recent_queries,
    with_texts,
)


def rows_of(record, prefix=""):
    """The rows of a log of a record as dictionaries."""
    fields = {"": ("item", "behavior", "timestamp", "session", "search"), "search_": ("query", "timestamp", "session"),
              "suggestion_": ("prefix", "query", "feedback", "timestamp", "session")}[prefix]  # fmt: skip
    columns = [record[f"{prefix}{field}"].tolist() for field in fields]
    return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]


def linked(record):
    """The events, each with the search that led to it in place of its number."""
    searches = rows_of(record, "search_")
    return [{**row, "search": searches[row["search"]] if row["search"] >= 0 else None} for row in rows_of(record)]


@pytest.mark.parametrize("moment", [None, 0, 9, 25])
@pytest.mark.parametrize("count", [1, 4, 40])
def test_the_last_queries_and_items_by_hand(moment, count):
    for seed in range(20):
        record = random_record(seed)
        queries = [row for row in rows_of(record, "search_") if moment is None or row["timestamp"] < moment][-count:]
        found = recent_queries(record, count, moment)
        filled = count - len(queries)
        assert found["query"].tolist() == [row["query"] for row in queries] + [-1] * filled
        assert found["query_timestamp"].tolist() == [row["timestamp"] for row in queries] + [0] * filled
        assert found["query_mask"].tolist() == [True] * len(queries) + [False] * filled
        clicks = [row for row in linked(record) if (moment is None or row["timestamp"] < moment) and row["behavior"]]
        clicks = sorted(clicks, key=lambda row: row["timestamp"])[-count:]
        found = recent_items(record, count, moment, wanted=np.array([False, True, True]))
        filled = count - len(clicks)
        assert found["item"].tolist() == [row["item"] for row in clicks] + [0] * filled
        asked = [row["search"]["query"] if row["search"] else -1 for row in clicks]
        assert found["item_query"].tolist() == asked + [-1] * filled
        assert found["item_mask"].tolist() == [True] * len(clicks) + [False] * filled
        assert found["item_timestamp"].tolist() == [row["timestamp"] for row in clicks] + [0] * filled
        everything = recent_items(record, 99, moment)["item_mask"].sum()
        assert everything == sum(moment is None or row["timestamp"] < moment for row in rows_of(record))


def test_shapes_and_dtypes_do_not_depend_on_the_record():
    for record in (random_record(0), {**random_record(1, links=False)}):
        arrays = recent_queries(record, 3) | recent_items(record, 3)
        assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
            "query": ("int32", (3,)), "query_timestamp": ("int64", (3,)), "query_mask": ("bool", (3,)),
            "item": ("int32", (3,)), "item_timestamp": ("int64", (3,)), "item_query": ("int32", (3,)),
            "item_mask": ("bool", (3,)),
        }  # fmt: skip


def test_the_part_before_a_moment_by_loops():
    """The session's own suggestions are left out whenever they were shown: their feedback came later."""
    for seed in range(30):
        record = random_record(seed)
        for moment, session in ((0, 0), (8, 2), (13, 5), (30, 3)):
            part = before_moment(record, moment, session)
            assert linked(part) == [row for row in linked(record) if row["timestamp"] < moment]
            searches = rows_of(record, "search_")
            assert rows_of(part, "search_") == [row for row in searches if row["timestamp"] < moment]
            assert rows_of(part, "suggestion_") == [
                row for row in rows_of(record, "suggestion_") if row["timestamp"] < moment and row["session"] < session
            ]
            part = before_session(record, session, moment)
            for now, was in zip(
                linked(part),
                (row for row in linked(record) if row["session"] < session and row["timestamp"] <= moment),
                strict=True,
            ):
                search = was.pop("search")
                kept = search is not None and search["session"] < session and search["timestamp"] < moment
                assert now.pop("search") == (search if kept else None) and now == was
            for log in ("search_", "suggestion_"):
                rows = rows_of(record, log)
                earlier = [row for row in rows if row["session"] < session and row["timestamp"] < moment]
                assert rows_of(part, log) == earlier


def test_the_part_before_a_search_by_loops():
    """At the moment itself it holds what earlier sessions hold, but no event of a search that it doesn't hold."""
    kept = 0
    for seed in range(30):
        record = random_record(seed)
        for search, (moment, session) in enumerate(
            zip(record["search_timestamp"].tolist(), record["search_session"].tolist(), strict=True)
        ):

            def known(row, at=moment, of=session):
                return row["timestamp"] < at or (row["timestamp"] == at and row["session"] < of)

            events = [row for row in linked(record) if known(row)]
            events = [r for r in events if r["timestamp"] < moment or r["search"] is None or known(r["search"])]
            part = before_search(record, search)
            assert linked(part) == events
            assert rows_of(part, "search_") == [row for row in rows_of(record, "search_") if known(row)]
            suggested = before_moment(record, moment, session)
            assert rows_of(part, "suggestion_") == rows_of(suggested, "suggestion_")
            kept += len(part["item"]) > len(suggested["item"])
    assert kept > 10


def test_what_a_search_led_to():
    for seed in range(10):
        record = random_record(seed)
        for search in range(len(record["search_query"])):
            rows = [row for row in rows_of(record) if row["search"] == search]
            assert led_to(record, search).tolist() == sorted({row["item"] for row in rows})
            bought = sorted({row["item"] for row in rows if row["behavior"] == 2})
            assert led_to(record, search, record["behavior"] == 2).tolist() == bought


def test_a_record_without_searches_has_no_queries():
    """As a log of events, of events and suggestions, or a user's history that a server has cut."""
    record = {name: value for name, value in random_record(5).items() if not name.startswith("search")}
    assert len(record["item"]) and (query_of_events(record) == -1).all()
    found = recent_queries(record, 3, 20)
    assert found["query"].tolist() == [-1] * 3 and not found["query_mask"].any()
    items = recent_items(record, 40, 20)
    assert (items["item_query"] == -1).all()
    assert items["item_mask"].sum() == (record["timestamp"] < 20).sum() > 0
    assert not len(led_to(record, 0))


def test_a_record_of_items_alone_has_a_past_of_items_alone():
    record = {name: random_record(5)[name] for name in ("item", "behavior", "timestamp", "session", "split")}
    assert list(before_session(record, 3, 9)) == list(before_moment(record, 9, 3)) == [
        "item", "behavior", "timestamp", "session",
    ]  # fmt: skip


QUERIES, PREFIXES = (np.array([f"{name} {row}" for row in range(12)], object) for name in ("query", "prefix"))


def test_the_history_of_a_request_holds_texts():
    for seed in range(20):
        record = random_record(seed)
        history = with_texts({**record, "prefix": np.int32(3)}, QUERIES, PREFIXES)
        assert history["prefix"] == "prefix 3" and "query" not in history
        assert with_texts({**record, "query": np.int32(5)}, QUERIES)["query"] == "query 5"
        for found, rows in (
            (recent_queries(history, 5, 25)["query"], recent_queries(record, 5, 25)["query"]),
            (recent_items(history, 5, 25)["item_query"], recent_items(record, 5, 25)["item_query"]),
        ):
            assert found.tolist() == ["" if row < 0 else QUERIES[row] for row in rows.tolist()]
        assert history["suggestion_query"] is record["suggestion_query"]
        np.testing.assert_array_equal(history["item"], record["item"])


def test_a_history_without_searches_has_no_texts():
    assert with_texts({"item": np.zeros(1)}, QUERIES).keys() == {"item"}
