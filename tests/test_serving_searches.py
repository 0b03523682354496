"""Requests with a query, a prefix or searches, for a recommender that reads them: the histories that it is given."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from serving_run import NextInLine, write_run

from jaxrec.serving.batch import answer_file
from jaxrec.serving.http import create_app
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request, SearchRequest, parse_request


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
    """An event belongs to the latest search for its query in any writing; without one it is a search as well."""
    entries = [
        {"query": "boots"},
        {"item_id": "b", "query": "boots"},
        {"query": "boots"},
        {"item_id": "zz", "query": "lost"},
        {"item_id": "c"},
        {"item_id": "d", "query": "  BOOTS"},
        {"item_id": "e", "query": "Hats"},
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
    assert searches_of(history) == list(zip(["boots", "boots", "Hats"], times, [0, 2, 5], strict=True))


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


class Searcher(NextTyped):
    """Answers searches alone."""

    required_text = "query"


@pytest.fixture
def searcher(run):
    return Retriever(write_searches(run), Searcher())


@pytest.fixture
def client(searcher):
    return TestClient(create_app(searcher))


TOO_LONG = "String should have at most 10000 characters"
QUERIES = [
    "boots", "bottes rouges d'hiver", "红色的靴子", "أحذية المطر", "\u202eשלום", "👢👢🏽 🧦", "qzxv-17 \x00",
    "x" * 10_000, "İ ﬁ ﬃ Å", "\t boots\n",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_a_search_is_answered_in_any_script_as_a_recommendation_with_a_query(client, query):
    asked = {"user_id": "u1", "query": query, "k": 2, "filter": {"category": ["shoes", "hats"]}}
    answer = client.post("/search", json=asked)
    assert answer.status_code == 200 and answer.json() == client.post("/recommend", json=asked).json()
    assert answer.json()["source"] == "model" and [each["item_id"] for each in answer.json()["items"]] == ["e", "a"]


def test_a_search_reads_what_the_user_searched_for_before(client, searcher):
    client.post("/search", json={"user_id": "u1", "query": "caps"})
    (history,) = searcher.recommender.histories
    assert searches_of(history) == [("boots", 90, 0), ("red boots", 190, 1)] and history["query"] == "caps"
    client.post("/search", json={"history": [{"query": "hats"}, {"item_id": "a", "query": "hats"}], "query": "caps"})
    (history,) = searcher.recommender.histories
    assert [query for query, _, _ in searches_of(history)] == ["hats"] and history["search"].tolist() == [0]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"user_id": "u1"}, "query is missing"),
        ({"user_id": "u1", "query": None}, "query should be a valid string, not null"),
        ({"user_id": "u1", "query": ""}, "query is empty; give the typed text, or leave it out"),
        ({"user_id": "u1", "query": " \u3000\n"}, "query is empty; give the typed text, or leave it out"),
        ({"query": "boots"}, "give either user_id or history"),
        ({"user_id": "u1", "query": "boots", "prefix": "bo"}, "give either query or prefix"),
        (
            {"user_id": "u1", "query": "x" * 10_001},
            f'query {TOO_LONG}, not "{"x" * 59}',
        ),
    ],
)
def test_bad_searches_are_refused_in_one_sentence(client, asked, error):
    answer = client.post("/search", json=asked)
    assert (answer.status_code, answer.json()) == (422, {"error": error})


def test_a_run_that_answers_searches_needs_a_query(client, searcher, tmp_path):
    error = "the system 'none' of this run answers what was typed; give the field query, which this request lacks"
    for asked in ({"user_id": "u1"}, {"user_id": "u1", "prefix": "bo"}, {"history": [{"query": "boots"}]}):
        answer = client.post("/recommend", json=asked)
        assert (answer.status_code, answer.json()) == (422, {"error": error})
    lines = [{"user_id": "u1", "query": "boots", "k": 1}, {"user_id": "u1"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = answer_file(searcher, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (summary.answered, summary.bad) == (1, 1) and second == {"line": 2, "error": error}
    assert first == client.post("/search", json=lines[0]).json()


def test_the_warm_up_asks_as_a_request_has_to(searcher):
    searcher.warm_up()
    assert searcher.ready and all(history["query"] == "-" for history in searcher.recommender.histories)


def test_the_description_of_searches(client):
    api = client.get("/openapi.json").json()
    described = api["components"]["schemas"]["SearchRequest"]
    assert "query" in described["required"] and "prefix" not in described["properties"]
    body = api["paths"]["/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/SearchRequest"}
    for example in described["examples"]:
        assert parse_request(json.dumps(example), SearchRequest).query == "rain boots"
