"""Requests with a query, a prefix or searches, for a recommender that reads them: the histories that it is given."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_run import NextInLine, write_run

from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request


class NextTyped(NextInLine):
    """Reads queries: whoever has no events gets the first item."""

    reads_queries = True

    def recommend(self, histories, k, exclude_history=False):
        last = [{**each, "item": each["item"] if len(each["item"]) else np.array([-1])} for each in histories]
        found = super().recommend(last, k, exclude_history)
        self.histories = histories
        return found


def write_searches(path):
    """u1 searched twice, the second time for what the second session's event was of; u3 searched once, at the end."""
    tables = path / "tables"
    searches = {
        "user": pa.array([0, 0, 2], pa.int32()),
        "query": ["boots", "red boots", "hats"],
        "timestamp": pa.array([90, 190, 900], pa.int64()),
        "session": pa.array([0, 1, 0], pa.int32()),
    }
    pq.write_table(pa.table(searches), tables / "searches.parquet")
    events = pq.read_table(tables / "events.parquet")
    events = events.append_column("search", pa.array([0, -1, 1, -1], pa.int32()))
    pq.write_table(events, tables / "events.parquet")
    return path


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def retriever(run):
    return Retriever(write_searches(run), NextTyped())


def searches_of(history) -> list[tuple]:
    names = ("search_query", "search_timestamp", "search_session")
    return list(zip(*(history[name].tolist() for name in names), strict=True))


def test_a_known_user_has_its_own_searches(retriever):
    history, _ = retriever.history(Request(user_id="u1", prefix="re"))
    assert searches_of(history) == [("boots", 90, 0), ("red boots", 190, 1)]
    assert history["search"].tolist() == [0, -1, 1] and history["item"].tolist() == [0, 1, 2]
    assert history["prefix"] == "re" and "query" not in history and history["user"] == 0
    history, _ = retriever.history(Request(user_id="u2", query="caps"))
    assert searches_of(history) == [] and history["search"].tolist() == [-1]
    assert history["query"] == "caps" and "prefix" not in history
    history, _ = retriever.history(Request(user_id="u3"))
    assert searches_of(history) == [("hats", 900, 0)] and not len(history["item"])
    history, _ = retriever.history(Request(user_id="nobody"))
    assert searches_of(history) == [] and history["search"].shape == (0,)


def test_the_end_of_the_log_is_that_of_events_and_searches(run, tmp_path):
    assert Retriever(run, NextTyped()).history(Request(user_id="u1"))[0]["now"] == 300
    searched = Retriever(write_searches(run), NextTyped())
    assert searched.history(Request(user_id="u1"))[0]["now"] == 900
    later = Request(history=[{"query": "a", "timestamp": 1000}, {"item_id": "a", "timestamp": 950}])
    assert searched.history(later)[0]["now"] == 1000
    assert Retriever(run, NextInLine()).history(Request(user_id="u1"))[0]["now"] == 300


def test_a_run_without_searches_has_users_without_searches(run):
    history, _ = Retriever(run, NextTyped()).history(Request(user_id="u1", query="boots"))
    assert searches_of(history) == [] and history["search"].tolist() == [-1, -1, -1]


def test_a_recommender_that_reads_no_queries_is_given_none(run):
    history, _ = Retriever(write_searches(run), NextInLine()).history(Request(user_id="u1"))
    assert set(history) == {"item", "behavior", "timestamp", "session", "user", "now"}
    inline, _ = Retriever(run, NextInLine()).history(Request(history=[{"item_id": "a"}]))
    assert set(inline) == {"item", "behavior", "timestamp", "session", "now"}


@pytest.mark.parametrize("timed", [False, True])
def test_searches_in_a_request(retriever, timed):
    """An event belongs to the latest search for its query; without one it is a search as well."""
    entries = [
        {"query": "boots"},
        {"item_id": "b", "query": "boots"},
        {"query": "boots"},
        {"item_id": "zz", "query": "lost"},
        {"item_id": "c"},
        {"item_id": "d", "query": "boots"},
        {"item_id": "e", "query": "Boots"},
    ]
    order = range(len(entries))
    if timed:
        # In another order than that of time; two of one moment are one session.
        times = [10, 20, 30, 40, 40, 50, 60]
        order = [4, 0, 6, 2, 5, 1, 3]
        entries = [{**entry, "timestamp": time} for entry, time in zip(entries, times, strict=True)]
    history, ignored = retriever.history(Request(history=[entries[row] for row in order]))
    assert ignored == ["zz"]
    assert history["item"].tolist() == [1, 2, 3, 4] and history["search"].tolist() == [0, -1, 1, 2]
    assert history["session"].tolist() == [1, 3, 4, 5]
    times = [10, 30, 60] if timed else [900] * 3
    assert searches_of(history) == list(zip(["boots", "boots", "Boots"], times, [0, 2, 5], strict=True))


def test_who_typed_or_searched_is_answered_by_the_model(retriever):
    requests = [
        {"user_id": "nobody", "prefix": "re"},
        {"history": [], "query": "red"},
        {"history": [{"query": "red"}]},
        {"user_id": "u3"},
        {"user_id": "u1", "query": "red"},
        {"user_id": "nobody"},
        {"history": []},
    ]
    answers = retriever.answer([Request.model_validate(each) for each in requests])
    assert [answer.source for answer in answers] == ["model"] * 5 + ["popular"] * 2
    assert [history.get("query", history.get("prefix")) for history in retriever.recommender.histories] == [
        "re", "red", None, None, "red",
    ]  # fmt: skip
    (answer,) = retriever.answer([Request(history=[], query="red", allowed=[])])
    assert answer.source == "model" and json.loads(answer.to_json())["items"] == []
