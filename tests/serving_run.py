"""A tiny run directory, a recommender and awkward requests for the serving tests."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from jaxrec.serving.schema import Event, Request

ITEMS = ["a", "b", "c", "d", "e"]
COUNTS = [3, 9, 9, 1, 0]
ATTRIBUTES = {
    "category": ["shoes", "bags", "shoes", None, "hats"],
    "price": [5.0, 20.0, 7.5, 9.0, None],
    "in_stock": [True, False, True, True, True],
    "tags": [["red", "new"], ["red"], [], None, ["new"]],
}


class NextInLine:
    """Recommends the items after the last one of the history, in order; keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def recommend(self, histories, k, exclude_history=False):
        self.calls.append((len(histories), k, exclude_history))
        self.histories = histories
        items = np.full((len(histories), k), -1, np.int32)
        for row, history in enumerate(histories):
            after = [(int(history["item"][-1]) + step) % len(ITEMS) for step in range(1, len(ITEMS) + 1)]
            kept = [item for item in after if not (exclude_history and item in history["item"])][:k]
            items[row, : len(kept)] = kept
        return items, -np.tile(np.arange(k, dtype=np.float32), (len(histories), 1))


def write_run(path):
    """Three users: u1 saw a and b and bought b, c; u2 bought e in the test session; u3 did nothing."""
    tables = path / "tables"
    tables.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"system": "none"}))
    titles = [f"Title {item}" for item in ITEMS]
    items = {"item_id": ITEMS, "title": titles, "count": COUNTS, **ATTRIBUTES}
    pq.write_table(pa.table(items), tables / "items.parquet")
    pq.write_table(pa.table({"user_id": ["u1", "u2", "u3"]}), tables / "users.parquet")
    events = {
        "user": pa.array([0, 0, 0, 1], pa.int32()),
        "item": pa.array([0, 1, 2, 4], pa.int32()),
        "behavior": ["exposure", "purchase", "purchase", "coupon"],
        "timestamp": [100, 100, 200, 300],
        "session": pa.array([0, 0, 1, 0], pa.int32()),
        "split": ["train", "train", "valid", "test"],
    }
    pq.write_table(pa.table(events), tables / "events.parquet")
    statistics = {"behaviors": ["exposure", "purchase", "coupon"], "target_behaviors": ["purchase", "coupon"]}
    (tables / "statistics.json").write_text(json.dumps(statistics))
    return path


LEAVES = [
    *("null", "true", "-0.0", "NaN", "-Infinity", "1e999", "17", '"17"', '""', '"a"', '"shoes"', '"u1"', "{}", "[]"),
    *('" "', '"\\u3000"', '"sh"', f'"{"x" * 10_001}"', '[{"query": "sh"}]', '[{"item_id": "a", "query": "sh"}]'),
    *(
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        "1" + "0" * 400,
        "-1" + "0" * 400,
        "9" * 5000,
        "[" * 300 + "]" * 300,
    ),
]
FIELDS = [*Request.model_fields, *Event.model_fields, "category", "price", "in_stock", "tags", "min", "max", "\\ud800"]


def texts_of_objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(st.sampled_from(FIELDS), values), max_size=4)
    return pairs.map(lambda pairs: "{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}")


VALUES = st.recursive(
    st.sampled_from(LEAVES) | st.text(max_size=3).map(json.dumps) | st.integers().map(str),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]") | texts_of_objects(inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "item_id": st.sampled_from(["a", "z", "", None]),
        "query": st.sampled_from(["shoes", " red", "", "\u3000", "\ud800", "x" * 1000, "x" * 10_001, None]),
        "behavior": st.sampled_from(["purchase", None]),
        "timestamp": st.sampled_from([17, None]),
    },
)
QUERY_REQUESTS = st.fixed_dictionaries(
    {"history": st.lists(ENTRIES, max_size=3)},
    optional={name: st.sampled_from(["sh", "\n", "", 7, "\udfff", "x" * 10_001, None]) for name in ("query", "prefix")},
)
"""Requests with queries, prefixes and searches, good and bad, as JSON values."""
LINES = st.binary(max_size=40) | VALUES.map(str.encode) | texts_of_objects(VALUES).map(str.encode)
"""Any bytes; any JSON and nearly JSON; objects with the names of requests and values that are awkward."""
