"""Searches that are derived from the words of items: Complete Journey's baskets, Amazon's category paths."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.examples import Records, write_examples
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import CompleteJourney, SequenceText
from jaxrec.data.sources.complete_journey import _searched, _searches
from jaxrec.data.sources.sequence_text import category_query
from jaxrec.data.tables import connect, store
from jaxrec.evaluation.cases import make_cases, search_cases

# ---- Complete Journey ------------------------------------------------------------------------------------------------


def test_a_basket_has_a_search_for_every_category_of_its_products():
    engine = connect()
    items = pa.table({"item_id": ["1", "2", "3"], "category": ["Ice Cream", "Frozen Ice", "Ice Cream"]})
    bought = pa.table(
        {
            "user_id": ["7", "7", "7", "7", "8"],
            "item_id": ["1", "2", "3", "1", "1"],
            "timestamp": [50, 50, 50, 90, 50],
            "behavior": ["purchase"] * 5,
            "session_id": ["b1", "b1", "b1", "b2", "b3"],
        }
    )
    events = store(engine, _searched(store(engine, bought), store(engine, items), "category"))
    led = {(row["session_id"], row["item_id"]): row["search_id"] for row in events.to_pyarrow().to_pylist()}
    searches = _searches(events).to_pyarrow().to_pylist()
    assert {(row["user_id"], row["session_id"], row["timestamp"], row["query"]) for row in searches} == {
        ("7", "b1", 50, "ice cream"),
        ("7", "b1", 50, "frozen ice"),
        ("7", "b2", 90, "ice cream"),
        ("8", "b3", 50, "ice cream"),
    }
    assert len({row["search_id"] for row in searches}) == 4
    of = {row["search_id"]: (row["session_id"], row["query"]) for row in searches}
    assert {key: of[search] for key, search in led.items()} == {
        ("b1", "1"): ("b1", "ice cream"),
        ("b1", "3"): ("b1", "ice cream"),
        ("b1", "2"): ("b1", "frozen ice"),
        ("b2", "1"): ("b2", "ice cream"),
        ("b3", "1"): ("b3", "ice cream"),
    }


def test_runs_without_derived_queries_keep_their_fingerprint():
    assert CompleteJourney().fingerprint() == CompleteJourney(queries="none").fingerprint() == "b10d43c0b0355a8c"
    prints = {CompleteJourney(queries=words).fingerprint() for words in ("none", "category", "product_type")}
    assert len(prints) == 3


# ---- sequences of items ----------------------------------------------------------------------------------------------

PATHS = {
    "1": [["Beauty", "Hair Care", "Hair Color", "Color Refreshers"], ["Beauty", "Gifts"]],
    "2": [["Beauty", "Bath & Body", "Men's"]],
    "3": [["Beauty"]],
    "4": [],
    "5": [["Beauty", "Hair Care"]],
}
QUERIES = {"1": "hair care color refreshers", "2": "bath body men s", "3": "beauty", "4": None, "5": "hair care"}


@pytest.fixture
def sequences(tmp_path):
    """u1 has all but its first item on one day, in an order that is not that of the ids."""
    (tmp_path / "sequences.txt").write_text("u1 5 3 4 2 1\nu2 1 2 5\nu3 2\n")
    items = [{"id": item, "title": f"Thing {item}", "categories": paths} for item, paths in PATHS.items()]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    times = {"u1": [86_400, 172_800, 172_800, 172_800, 172_800], "u2": [0, 0, 0], "u3": [5]}
    (tmp_path / "timestamps.jsonl").write_text(
        "".join(json.dumps({"u": user, "t": days}) + "\n" for user, days in times.items())
    )
    return tmp_path


def prepared(source, folder):
    (folder / "tables").mkdir(parents=True), (folder / "examples").mkdir()
    statistics = prepare(source, PrepareConfig(), folder / "tables")
    write_examples(folder / "tables", folder / "examples", source.behaviors, statistics["answer_time"])
    return statistics


def test_a_query_is_the_path_without_its_root_each_word_once():
    assert {item: category_query(paths[0]) if paths else None for item, paths in PATHS.items()} == QUERIES


def test_every_item_of_a_sequence_is_led_to_by_a_search_for_it(sequences, tmp_path):
    statistics = prepared(SequenceText(sequences, queries="category"), tmp_path / "out")
    assert statistics["queries_derived_from"] == "category" and statistics["searches"] == 8
    searches = pq.read_table(tmp_path / "out/tables/searches.parquet").to_pylist()
    for row in pq.read_table(tmp_path / "out/tables/events.parquet").to_pylist():
        if row["item_id"] == "4":
            assert row["search"] == -1
            continue
        search = searches[row["search"]]
        assert search["query"] == QUERIES[row["item_id"]]
        assert all(search[name] == row[name] for name in ("user", "session", "split", "timestamp"))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_history_of_a_search_is_the_sequence_before_its_item_also_on_one_day(sequences, tmp_path, split):
    prepared(SequenceText(sequences, queries="category"), tmp_path / "out")
    items = pq.read_table(tmp_path / "out/tables/items.parquet")["item_id"].to_pylist()
    texts = pq.read_table(tmp_path / "out/tables/queries.parquet")["query"].to_pylist()
    records = Records(tmp_path / "out/examples", split)
    cases, found = search_cases(records, (0,), split), {}
    for row, history in enumerate(cases.histories):
        events = [items[item] for item in history["item"]]
        searched = [texts[query] for query in history["search_query"]]
        assert searched == [QUERIES[item] for item in events if QUERIES[item]]
        led = [None if place < 0 else searched[place] for place in history["search"]]
        assert led == [QUERIES[item] for item in events]
        truth = [items[item] for item in cases.targets[row][cases.where[row]]]
        found[int(cases.users[row])] = (events, texts[history["query"]], truth)
    assert (
        found
        == {
            "test": {
                0: (["5", "3", "4", "2"], "hair care color refreshers", ["1"]),
                1: (["1", "2"], "hair care", ["5"]),
            },
            "valid": {0: (["5", "3", "4"], "bath body men s", ["2"]), 1: (["1"], "bath body men s", ["2"])},
        }[split]
    )
    alone = make_cases(records, (0,), split)
    assert [history["item"].tolist() for history in alone.histories] == [
        history["item"].tolist() for history in cases.histories
    ]


def test_derived_queries_change_nothing_else(sequences, tmp_path):
    without, with_queries = SequenceText(sequences), SequenceText(sequences, queries="category")
    assert without.fingerprint() != with_queries.fingerprint()
    for source, name in ((without, "a"), (with_queries, "b")):
        prepared(source, tmp_path / name)
    for table in ("items", "users", "pairs"):
        a, b = ((tmp_path / name / f"tables/{table}.parquet").read_bytes() for name in "ab")
        assert a == b
    events = [pq.read_table(tmp_path / name / "tables/events.parquet") for name in "ab"]
    assert events[0].equals(events[1].drop(["search"]))
