"""Pair statistics against plain Python, by hand and at random."""

import itertools
import math
import sys

import numpy as np
import pyarrow as pa
import pytest

from jaxrec.config import UserError
from jaxrec.data.pairs import (
    PairConfig,
    build_pairs,
    cap_pairs,
    common_users,
    itemcf_scores,
    overlap_by_item,
    overlap_by_pair,
    swing_scores,
    user_overlap,
)
from jaxrec.data.spark import connect_spark
from jaxrec.data.tables import connect, free, scratch, store

UNLIMITED = PairConfig(
    max_pairs_per_item=10**6,
    min_common=1,
    candidates_per_item=10**6,
    max_items_per_group=10**6,
    max_users_per_pair=10**6,
)


def log(rows):
    user, session, item = (np.asarray(column, np.int32) for column in zip(*rows, strict=True))
    return pa.table({"user": user, "session": session, "item": item})


def random_log(seed, users=30, items=25, events=300):
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.zipf(1.4, events) - 1, items - 1)
    return list(
        zip(rng.integers(0, users, events).tolist(), rng.integers(0, 4, events).tolist(), item.tolist(), strict=True)
    )


def plain_itemcf(rows, key):
    groups = {}
    for row in rows:
        groups.setdefault(key(row), set()).add(row[2])
    counts, common = {}, {}
    for items in groups.values():
        for item in items:
            counts[item] = counts.get(item, 0) + 1
        for pair in itertools.combinations(sorted(items), 2):
            common[pair] = common.get(pair, 0) + 1
    return {(i, j): n / math.sqrt(counts[i] * counts[j]) for (i, j), n in common.items()}


def plain_swing(rows, alpha):
    items_of = {}
    for user, _, item in rows:
        items_of.setdefault(user, set()).add(item)
    scores = {}
    for u, v in itertools.combinations(sorted(items_of), 2):
        shared = sorted(items_of[u] & items_of[v])
        weight = 1 / math.sqrt(len(items_of[u]) * len(items_of[v])) / (alpha + len(shared))
        for pair in itertools.combinations(shared, 2):
            scores[pair] = scores.get(pair, 0.0) + weight
    return scores


def as_dict(table):
    rows = table.to_pyarrow().to_pylist() if not isinstance(table, pa.Table) else table.to_pylist()
    return {(row["item"], row["other"]): row["score"] for row in rows}


def test_itemcf_by_hand():
    rows = [(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2), (1, 0, 1), (1, 0, 3), (1, 1, 1)]
    engine = connect()
    scores = as_dict(itemcf_scores(engine, store(engine, log(rows)), ["user", "session"], UNLIMITED))
    # Sessions: {1, 2}, {1, 2}, {1, 3}, {1}; item 1 is in four, item 2 in two, item 3 in one.
    assert scores == pytest.approx({(1, 2): 2 / math.sqrt(8), (1, 3): 1 / 2})


def test_swing_by_hand():
    rows = [(0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 0, 1), (1, 0, 2), (2, 0, 1), (2, 0, 2), (2, 0, 3)]
    engine = connect()
    events = store(engine, log(rows))
    candidates = itemcf_scores(engine, events, ["user"], UNLIMITED)
    scores = as_dict(swing_scores(engine, events, candidates, UNLIMITED))
    # Users share: (0, 1) two items, (0, 2) three, (1, 2) two; alpha is 1.
    both = 1 / math.sqrt(6) / 3 + 1 / 3 / 4 + 1 / math.sqrt(6) / 3
    assert scores == pytest.approx({(1, 2): both, (1, 3): 1 / 3 / 4, (2, 3): 1 / 3 / 4}, rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_plain_python(seed):
    rows, engine = random_log(seed), connect()
    events = store(engine, store(engine, log(rows)).distinct())
    by_session = itemcf_scores(engine, events, ["user", "session"], UNLIMITED)
    assert as_dict(by_session) == pytest.approx(plain_itemcf(rows, lambda row: row[:2]))
    by_user = itemcf_scores(engine, events, ["user"], UNLIMITED)
    assert as_dict(by_user) == pytest.approx(plain_itemcf(rows, lambda row: row[0]))
    assert as_dict(swing_scores(engine, events, by_user, UNLIMITED)) == pytest.approx(plain_swing(rows, 1.0), rel=1e-6)


def plain_cap(scores, limit):
    used, taken = {}, set()
    for (i, j), _ in sorted(scores.items(), key=lambda entry: (-entry[1], entry[0])):
        if used.get(i, 0) < limit and used.get(j, 0) < limit:
            used[i], used[j] = used.get(i, 0) + 1, used.get(j, 0) + 1
            taken.add((i, j))
    return taken


def test_cap_takes_the_best_pairs_and_counts_both_ends():
    pairs = pa.table({"item": [0, 0, 1, 2], "other": [1, 2, 2, 3], "score": [0.9, 0.8, 0.7, 0.6]})
    assert list(as_dict(cap_pairs(pairs, 1))) == [(0, 1), (2, 3)]
    assert list(as_dict(cap_pairs(pairs, 2))) == [(0, 1), (0, 2), (1, 2)]


def test_cap_breaks_ties_by_index():
    pairs = pa.table({"item": [2, 0, 0], "other": [3, 2, 1], "score": [0.5, 0.5, 0.5]})
    assert list(as_dict(cap_pairs(pairs, 1))) == [(0, 1), (2, 3)]
    empty = pairs.slice(0, 0)
    assert cap_pairs(empty, 1).num_rows == 0


@pytest.mark.parametrize("limit", [1, 3])
def test_pairs_of_a_log_keep_the_limit_per_kind(limit):
    rows, engine = random_log(7, users=40, items=30, events=600), connect()
    config = PairConfig(max_pairs_per_item=limit, min_common=1, max_users_per_pair=10**6, max_items_per_group=10**6)
    pairs = build_pairs(engine, store(engine, log(rows)), config)
    assert pairs.schema.types == [pa.int32(), pa.int32(), pa.float32(), pa.string()]
    expected = {"itemcf": plain_itemcf(rows, lambda row: row[:2]), "swing": plain_swing(rows, 1.0)}
    # Swing scores what ItemCF proposes, here all pairs that share a session.
    expected["swing"] = {pair: score for pair, score in expected["swing"].items() if pair in expected["itemcf"]}
    for kind, scores in expected.items():
        part = pairs.filter(pa.array([value == kind for value in pairs["kind"].to_pylist()]))
        ends = part["item"].to_pylist() + part["other"].to_pylist()
        assert max(np.bincount(ends)) <= limit
        assert set(as_dict(part)) == plain_cap({pair: round(score, 9) for pair, score in scores.items()}, limit)


def test_limits_on_work_are_kept_and_deterministic():
    rows = random_log(3, users=40, items=30, events=600)
    config = PairConfig(min_common=1, max_users_per_pair=3, max_items_per_group=4, candidates_per_item=5)
    first, second = (
        build_pairs(engine, store(engine, log(order)), config)
        for engine, order in ((connect(), rows), (connect(), rows[::-1]))
    )
    assert first.num_rows and first.equals(second)
    other = build_pairs(
        connect_with := connect(), store(connect_with, log(rows)), PairConfig(**{**vars(config), "seed": 1})
    )
    assert not first.equals(other)


def test_few_common_users_make_no_pair():
    engine = connect()
    assert build_pairs(engine, store(engine, log([(0, 0, 1), (0, 0, 2)])), PairConfig()).num_rows == 0


def items_of(rows):
    held = {}
    for user, _, item in rows:
        held.setdefault(user, set()).add(item)
    return held


@pytest.mark.parametrize("seed", range(2))
def test_common_users_and_overlap_equal_plain_python(seed):
    rows, engine = random_log(seed), connect()
    held = items_of(rows)
    users = store(
        engine, pa.table({"user": [u for u in held for _ in held[u]], "item": [i for u in held for i in held[u]]})
    )
    pairs = [(i, j) for i, j in itertools.combinations(range(25), 2) if (i + j) % 3]
    found = common_users(users, store(engine, pa.table(dict(zip(("item", "other"), map(list, zip(*pairs)))))))
    expected = {(i, j, u) for i, j in pairs for u in held if {i, j} <= held[u]}
    assert {tuple(row.values()) for row in found.to_pyarrow().to_pylist()} == expected
    both = [(u, v) for u, v in itertools.combinations(sorted(held), 2) if held[u] & held[v] and (u + v) % 2]
    wanted = {"user": [u for u, _ in both], "partner": [v for _, v in both]}
    sizes = {"size": [len(held[u]) for u, _ in both], "size_partner": [len(held[v]) for _, v in both]}
    wanted = store(engine, pa.table({**wanted, **sizes}))
    for count in (overlap_by_item, overlap_by_pair, user_overlap):
        counted = count(users, wanted).to_pyarrow().to_pylist()
        assert {(r["user"], r["partner"]): r["overlap"] for r in counted} == {
            (u, v): len(held[u] & held[v]) for u, v in both
        }


def test_an_item_that_everybody_has_is_not_expanded(monkeypatch):
    taken = []
    for name in ("overlap_by_item", "overlap_by_pair"):
        monkeypatch.setattr(f"jaxrec.data.pairs.{name}", lambda users, wanted, name=name: taken.append(name))
    engine = connect()
    # Ten users with the same item and one pair of them: 45 pairs at the item against one item of the smaller user.
    users = store(engine, pa.table({"user": list(range(10)), "item": [0] * 10}))
    few = store(engine, pa.table({"user": [0], "partner": [1], "size": [1], "size_partner": [1]}))
    user_overlap(users, few)
    # Two users with the same ten items: ten pairs at the items, against eleven items of the smaller user.
    users = store(engine, pa.table({"user": [0] * 10 + [1] * 10, "item": list(range(10)) * 2}))
    long = store(engine, pa.table({"user": [0], "partner": [1], "size": [11], "size_partner": [11]}))
    user_overlap(users, long)
    assert taken == ["overlap_by_pair", "overlap_by_item"]


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 100])
def test_cap_equals_the_plain_loop(limit):
    rng = np.random.default_rng(limit)
    keys = rng.permutation([(i, j) for i, j in itertools.combinations(range(40), 2) if i < 3 or rng.random() < 0.2])
    # Few distinct scores, so that ties decide; items 0, 1 and 2 are in many pairs, the rest in few.
    pairs = pa.table({"item": keys[:, 0], "other": keys[:, 1], "score": rng.integers(1, 6, len(keys)) / 4})
    capped = cap_pairs(pairs, limit)
    assert set(as_dict(capped)) == plain_cap(as_dict(pairs), limit)
    assert list(as_dict(capped)) == sorted(as_dict(capped))
    assert capped.equals(cap_pairs(pairs.sort_by([("item", "ascending"), ("other", "ascending")]), limit))


def test_intermediate_results_are_freed_and_nothing_else():
    engine = connect()

    def tables():
        return {name for (name,) in engine.raw_sql("SELECT table_name FROM duckdb_tables()").fetchall()}

    own = engine.create_table("own", store(engine, log(random_log(1))))
    before = tables()
    assert build_pairs(engine, own, PairConfig(min_common=1)).num_rows
    assert tables() == before
    free(engine, own)
    stored = store(engine, own.distinct(), instead_of=own)
    assert tables() == {*before, stored.op().name}, "a table of the user's own is not ours to drop"
    with pytest.raises(RuntimeError, match="half way"), scratch(engine) as keep:
        assert keep(stored).equals(stored), "what is stored is taken over"
        kept = keep(own.distinct())
        assert tables() == {*before, stored.op().name, kept.op().name}
        raise RuntimeError("half way")
    assert tables() == before


def test_spark_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(UserError, match="make setup-spark"):
        connect_spark()
