"""Baselines of searches: by hand, and against plain loops over the events."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.popularity import DAY
from jaxrec.data.words import normalised, words
from jaxrec.evaluation.baselines import PurchaseLog, baselines_of
from jaxrec.evaluation.search_baselines import (
    FLOOR,
    RECENT_DAYS,
    NearestItems,
    QueryLog,
    QueryTexts,
    WithinQuery,
    WordMatch,
    search_baselines,
)

ITEMS = 12
QUERIES = ["boots", "Boots ", "red hats", "tea", "never searched"]
EMPTY = {"item": np.zeros(0, np.int32), "behavior": np.zeros(0, np.int8), "timestamp": np.zeros(0, np.int64),
         "session": np.zeros(0, np.int32)}  # fmt: skip


def write_tables(path, seed=0, events=300):
    """Random events, some of a search; those of test, of another behavior and without a search do not count."""
    rng = np.random.default_rng(seed)
    searches = {"query_index": pa.array(rng.integers(0, 4, 40), pa.int32())}
    user = np.sort(rng.integers(0, 9, events))
    table = {
        "user": pa.array(user, pa.int32()),
        "item": pa.array(rng.integers(0, ITEMS - 1, events), pa.int32()),
        "timestamp": rng.integers(0, 100 * DAY, events),
        "session": pa.array(np.sort(rng.integers(0, 5, events)), pa.int32()),
        "behavior": rng.choice(["exposure", "click", "purchase"], events),
        "split": rng.choice(["train", "test"], events, p=[0.8, 0.2]),
        "search": pa.array(rng.integers(-1, 40, events), pa.int32()),
    }
    files = {"searches": searches, "events": table, "queries": {"query": QUERIES}}
    for name, columns in (files | {"users": {"user_id": [f"u{n}" for n in range(9)]}}).items():
        pq.write_table(pa.table(columns), path / f"{name}.parquet")
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


def counted(tables):
    """(query, item, timestamp) of the events that count, queries by their first writing, and how often each item."""
    events = pq.read_table(tables / "events.parquet").to_pylist()
    searched = pq.read_table(tables / "searches.parquet")["query_index"].to_pylist()
    events = [each for each in events if each["split"] == "train" and each["behavior"] != "exposure"]
    led = [(max(searched[each["search"]], 1), each["item"], each["timestamp"]) for each in events if each["search"] >= 0]  # noqa: E501  # fmt: skip
    return led, Counter(each["item"] for each in events)


def histories(seed, count=20):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(0, 8))
        made.append(
            {
                "item": rng.integers(0, ITEMS, length).astype(np.int32),
                "behavior": rng.integers(0, 3, length).astype(np.int8),
                "timestamp": np.arange(length), "session": np.arange(length, dtype=np.int32),
                "query": ["BOOTS", "red  hats", "tea", "unknown", "never searched"][int(rng.integers(0, 5))],
                "now": int(rng.integers(0, 130 * DAY)),
            }
        )  # fmt: skip
    return made


def number(query):
    return {"boots": 1, "red hats": 2, "tea": 3}.get(" ".join(query.lower().split()), -1)


def expected_scores(name, history, led, everywhere):
    """One score an item, from the definition; tuples are compared one after another."""
    query, now = number(history["query"]), history["now"]
    mine = Counter(item for of, item, _ in led if of == query)
    recent = Counter(item for of, item, time in led if of == query and now - RECENT_DAYS * DAY <= time < now)
    bought = [item for item, behavior in zip(history["item"].tolist(), history["behavior"].tolist(), strict=True) if behavior]  # noqa: E501  # fmt: skip
    last = {item: place for place, item in enumerate(bought)}
    if name == "popularity":
        return [(everywhere[item],) for item in range(ITEMS)]
    if name == "popularity in query":
        return [(mine[item],) for item in range(ITEMS)]
    if name == "personal frequency in query":
        return [(item in mine, item in mine and (bought.count(item), last.get(item, -1)), mine[item]) for item in range(ITEMS)]  # noqa: E501  # fmt: skip
    shares = [count.total() or 1 for count in (recent, mine)]
    lately = [(1 - FLOOR) * recent[item] / shares[0] + FLOOR * mine[item] / shares[1] for item in range(ITEMS)]
    if name == "personal frequency, then recent in query":
        return [(item in mine, item in mine and (bought.count(item), last.get(item, -1)), lately[item]) for item in range(ITEMS)]  # noqa: E501  # fmt: skip
    return [(lately[item],) for item in range(ITEMS)]


COUNTING = (
    "popularity",
    "popularity in query",
    "recent popularity in query",
    "personal frequency in query",
    "personal frequency, then recent in query",
)


@pytest.fixture(scope="module")
def models(tables):
    log = PurchaseLog.read(tables, ["click", "purchase"])
    return search_baselines(QueryLog.read(tables, ["click", "purchase"], ITEMS), baselines_of(log, ITEMS, (1, 2)))


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("exclude", [False, True])
def test_counting_baselines_against_loops(tables, models, name, exclude):
    led, everywhere = counted(tables)
    asked = histories(1)
    items, scores = models[name].recommend(asked, ITEMS, exclude_history=exclude)
    for row, history in enumerate(asked):
        had = set(history["item"][history["behavior"] > 0].tolist()) if exclude else set()
        wanted = expected_scores(name, history, led, everywhere)
        order = sorted(set(range(ITEMS)) - had, key=lambda item: (*_falling(wanted[item]), -everywhere[item], item))
        assert items[row].tolist() == order + [-1] * len(had)
        assert (np.diff(scores[row, : len(order)]) <= 0).all() and np.isneginf(scores[row, len(order) :]).all()


def _falling(key):
    return tuple(-number for part in key for number in (part if isinstance(part, tuple) else (part,)))


def test_an_unknown_query_gets_what_is_popular(models):
    popular, _ = models["popularity"].recommend([EMPTY], ITEMS)
    for name in COUNTING:
        for query in ("unknown", "never searched", ""):
            items, _ = models[name].recommend([{**EMPTY, "query": query, "now": 50 * DAY}], ITEMS)
            np.testing.assert_array_equal(items, popular)
    items, _ = models["popularity in query"].recommend([EMPTY], ITEMS)
    np.testing.assert_array_equal(items, popular)


def test_every_baseline_within_the_query_ranks_its_items_first(tables, models):
    assert {"markov in query", "itemknn in query"} <= set(models)
    led, _ = counted(tables)
    base = baselines_of(PurchaseLog.read(tables, ["click", "purchase"]), ITEMS, (1, 2))["markov"]
    asked = [history for history in histories(2) if number(history["query"]) > 0]
    within = WithinQuery(base, QueryLog.read(tables, ["click", "purchase"], ITEMS))
    items, _ = within.recommend(asked, ITEMS)
    whole, values = base.recommend(asked, ITEMS)
    for row, history in enumerate(asked):
        mine = {item for of, item, _ in led if of == number(history["query"])}
        assert set(items[row, : len(mine)].tolist()) == mine
        known = dict(zip(whole[row].tolist(), values[row].tolist(), strict=True))
        scores = [known[item] for item in items[row, : len(mine)].tolist()]
        assert scores == sorted(scores, reverse=True)


def test_a_batch_of_any_size_gives_the_same(models):
    asked = histories(3, 300)
    for model in models.values():
        whole, _ = model.recommend(asked, 5)
        alone = np.concatenate([model.recommend([each], 5)[0] for each in asked[250:260]])
        np.testing.assert_array_equal(whole[250:260], alone)


TEXTS = ["Red rain boots", "boots", "tea pot", "", "BOOTS boots green", "red tea", "红茶", "x", "x", "x", "x", "x"]


def bm25(query, texts, k1=1.5, b=0.75):
    """Lucene's form of BM25."""
    rows = [words(normalised(text)) for text in texts]
    mean = sum(map(len, rows)) / len(rows)
    scores = []
    for row in rows:
        score = 0.0
        for word in words(normalised(query)):
            n = sum(word in other for other in rows)
            tf = row.count(word)
            idf = math.log(1 + (len(rows) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(row) / mean))
        scores.append(score)
    return scores


def test_bm25_against_its_formula(models):
    popularity = models["popularity"]
    model = WordMatch.fit(popularity, TEXTS)
    asked = [{**EMPTY, "query": query} for query in ("red boots", "Tea!", "茶", "nothing", "", "boots boots x")]
    items, scores = model.recommend(asked, ITEMS)
    place = np.argsort(popularity.order)
    for row, history in enumerate(asked):
        wanted = bm25(history["query"], TEXTS)
        np.testing.assert_allclose(scores[row], sorted(wanted, reverse=True), rtol=1e-5)
        assert items[row].tolist() == sorted(range(ITEMS), key=lambda item: (-np.float32(wanted[item]), place[item]))
    assert items[2, 0] == 6 and items[3].tolist() == popularity.order.tolist()


def test_nearest_items_by_cosine(models):
    rng = np.random.default_rng(0)
    queries, vectors = rng.normal(size=(len(QUERIES), 4)), rng.normal(size=(ITEMS, 4))
    queries[1] = queries[0]
    model = NearestItems.of(models["popularity"], QueryTexts.of(QUERIES), queries, vectors)
    items, scores = model.recommend([{**EMPTY, "query": query} for query in ("tea", "BOOTS", "unknown")], ITEMS)
    for row, query in ((0, 3), (1, 0)):
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(queries[query])
        cosine = vectors @ queries[query] / norms
        assert items[row].tolist() == np.argsort(-cosine).tolist()
        np.testing.assert_allclose(scores[row], (1 + np.sort(cosine)[::-1]) / 2, atol=1e-6)
    assert items[2].tolist() == models["popularity"].order.tolist()


def test_bm25_and_encoders_are_left_out_where_there_is_nothing_to_read(tables, models):
    assert not {"bm25", "text encoder"} & set(models)
    log, vectors = QueryLog.read(tables, ["purchase"], ITEMS), np.eye(12, dtype=np.float32)
    base = baselines_of(PurchaseLog.read(tables, ["purchase"]), ITEMS, (2,))
    assert "bm25" not in search_baselines(log, base, [" "] * ITEMS)
    found = search_baselines(log, base, TEXTS, {"text": (vectors[: len(QUERIES)], vectors)})
    assert {"bm25", "text encoder"} <= set(found)
