"""Pairs of queries and items of a prepared log, by hand and against a loop over the searches of the mall."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.pairs import PairConfig
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.query_pairs import QueryPairConfig, query_pairs, relevance, searched_items
from jaxrec.data.sources import SyntheticMall

LIMITS = PairConfig(itemcf_within="user", min_common=1)


@pytest.fixture(scope="module")
def mall(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    source = SyntheticMall(users=30, items=40, tastes=4, sessions_per_user=5, exposures_per_session=4, searched=0.8)
    prepare(source, PrepareConfig(), folder)
    return folder


def write(folder, events, queries):
    """events: (item, behavior, search, split); queries: the query of each search."""
    item, behavior, search, split = zip(*events, strict=True)
    table = {"item": pa.array(item, pa.int32()), "behavior": behavior, "search": pa.array(search, pa.int32())}
    pq.write_table(pa.table(table | {"split": split}), folder / "events.parquet")
    pq.write_table(pa.table({"query_index": pa.array(queries, pa.int32())}), folder / "searches.parquet")
    behaviors = {"behaviors": ["pseudo_exposure", "exposure", "click", "buy"], "target_behaviors": ["buy"]}
    (folder / "statistics.json").write_text(json.dumps(behaviors))


def test_by_hand(tmp_path):
    events = [
        (0, "exposure", 0, "train"), (1, "exposure", 0, "train"), (1, "click", 0, "train"), (1, "buy", 0, "train"),
        (2, "click", 1, "train"), (2, "click", 2, "train"), (1, "click", 2, "train"),
        (3, "pseudo_exposure", 0, "train"), (3, "buy", -1, "train"), (3, "buy", 1, "test"),
    ]  # fmt: skip
    write(tmp_path, events, [5, 7, 7])
    rows = searched_items(tmp_path).to_pylist()
    assert [tuple(row.values()) for row in rows] == [(5, 0, 0, 0), (5, 1, 2, 2), (7, 1, 1, 1), (7, 2, 1, 2)]
    found = query_pairs(tmp_path, QueryPairConfig(limits=LIMITS))
    listed = {name: [tuple(int(x) for x in row) for row in zip(*ends)] for name, ends in found.items()}
    assert listed == {
        "q2q": [(5, 7)],  # both clicked for item 1
        "i2i": [(1, 2)],  # both clicked for query 7
        "q2i": [(5, 1), (7, 1), (7, 2)],
        "rank": [(5, 0, 0), (5, 1, 2)],  # all items of query 7 are of one level
        "relevance": [],
    }
    found = query_pairs(tmp_path, QueryPairConfig(q2q=(), i2i=(), least_clicks=2))
    assert [len(found[name][0]) for name in ("q2q", "i2i", "q2i", "rank")] == [0, 0, 2, 2]


def test_the_mall_against_a_loop(mall):
    events, searches = pq.read_table(mall / "events.parquet").to_pylist(), pq.read_table(mall / "searches.parquet")
    query = searches["query_index"].to_pylist()
    level = {"exposure": 0, "click": 1, "cart": 1, "purchase": 2}
    strongest, clicks = {}, {}
    for event in events:
        if event["split"] != "train" or event["search"] < 0 or event["behavior"] not in level:
            continue
        pair = query[event["search"]], event["item"]
        strongest[pair] = max(strongest.get(pair, 0), level[event["behavior"]])
        clicks[pair] = clicks.get(pair, 0) + (level[event["behavior"]] > 0)
    rows = [tuple(row.values()) for row in searched_items(mall).to_pylist()]
    assert rows == [(*pair, strongest[pair], clicks[pair]) for pair in sorted(strongest)]
    found = query_pairs(mall)
    tastes = [name.split(" no.")[0] for name in pq.read_table(mall / "items.parquet")["category"].to_pylist()]
    left, right = found["i2i"]
    same = np.mean([tastes[i] == tastes[j] for i, j in zip(left, right)])
    assert len(left) and same > 0.9 and (left < right).all()


def test_judgments(tmp_path):
    path = tmp_path / "judgments.parquet"
    assert [len(part) for part in relevance(tmp_path)] == [0, 0, 0]
    table = {"query_index": [0, 0, 1], "item": [4, 5, 4], "grade": [1.0, 2.0, 3.0], "split": ["train", "train", "test"]}
    pq.write_table(pa.table(table), path)
    query, item, value = relevance(tmp_path)
    assert query.tolist() == [0, 0] and item.tolist() == [4, 5] and value.tolist() == [0.0, 0.5]
    pq.write_table(pa.table(table | {"grade": [1.0, None, 2.0]}), path)
    with pytest.raises(UserError, match="row 1 has no grade"):
        relevance(tmp_path)
    pq.write_table(pa.table(table | {"grade": [2, 2, 2]}), path)
    with pytest.raises(UserError, match="all grades are 2"):
        relevance(tmp_path)


def test_a_log_without_searches_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no searches\.parquet: pairs of queries need a log with searches"):
        query_pairs(tmp_path)
    with pytest.raises(UserError, match=r"'queries.q2q' names 'cosine'; give some of itemcf, swing"):
        QueryPairConfig(q2q=("cosine",))
