"""Baselines: by hand, and against slow oracles written from their definitions."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from text_parts import make_space

from jaxrec.evaluation.baselines import (
    ItemKNN,
    Markov,
    Popularity,
    PurchaseLog,
    best_items,
    fit_baselines,
    text_baselines,
)

TARGET = (1,)


def history(*sessions, behavior=1):
    """A user's sessions, each a list of items."""
    items = [item for session in sessions for item in session]
    number = [row for row, session in enumerate(sessions) for _ in session]
    return {
        "item": np.array(items, np.int32), "behavior": np.full(len(items), behavior, np.int8),
        "timestamp": np.array(number, np.int64), "session": np.array(number, np.int32),
    }  # fmt: skip


def train(*users):
    return [{**user, "user": np.int32(row), "split": np.zeros(len(user["item"]), np.int8)} for row, user in enumerate(users)]  # noqa: E501  # fmt: skip


RECORDS = train(
    history([0, 1], [2], [0, 3]),
    history([0], [2], [2, 4]),
    history([1], [0], [0]),
)
POPULAR = [0, 2, 1, 3, 4, 5]  # counts 5 (0), 3 (2), 2 (1), 1 (3), 1 (4), 0 (5): 3 before 4 by index


@pytest.fixture(scope="module")
def baselines():
    return fit_baselines(RECORDS, num_items=6, target_behaviors=TARGET)


def test_popularity_counts_and_breaks_ties_by_index(baselines):
    assert baselines["popularity"].counts.tolist() == [5, 2, 3, 1, 1, 0]
    items, scores = baselines["popularity"].recommend([history([5])], 6)
    assert items.tolist() == [POPULAR] and scores.tolist() == [[5, 3, 2, 1, 1, 0]]
    assert items.dtype == np.int32 and scores.dtype == np.float32


def test_only_the_train_split_and_the_target_behaviors_are_counted():
    later = {**RECORDS[0], "split": np.array([0, 0, 0, 1, 2], np.int8)}
    seen = {**RECORDS[1], "behavior": np.array([1, 0, 0, 1], np.int8)}
    fitted = fit_baselines([later, seen], num_items=6, target_behaviors=TARGET)
    assert fitted["popularity"].counts.tolist() == [2, 1, 1, 0, 1, 0]


def test_personal_frequency_then_recency_then_popularity(baselines):
    bought = history([5, 5, 4], [3, 1], [3, 0], [2, 1])
    items, _ = baselines["personal frequency"].recommend([bought], 6)
    # Two of each: 1 (session 3), 3 (session 2), 5 (session 0). One of each: 2 (session 3), 0 (session 2), 4.
    assert items.tolist() == [[1, 3, 5, 2, 0, 4]]
    items, _ = baselines["personal frequency"].recommend([history([4, 3]), history()], 6)
    assert items.tolist() == [[3, 4, 0, 2, 1, 5], POPULAR]


def test_excluding_what_was_seen_leaves_out_and_pads(baselines):
    for model in baselines.values():
        items, scores = model.recommend([history([0, 2], [0]), history([4], behavior=0)], 7, exclude_history=True)
        assert set(items[0, :4]) == {1, 3, 4, 5} and items[0, 4:].tolist() == [-1] * 3
        assert np.isneginf(scores[0, 4:]).all() and np.isfinite(scores[0, :4]).all()
        assert set(items[1, :6]) == set(range(6)), "an item that was only exposed is not excluded"
        assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_markov_by_hand(baselines):
    # 2 is followed by {0, 3} once and by {2, 4} once: each of the four has 1/2.
    transitions = baselines["markov"].transitions.toarray()
    np.testing.assert_allclose(transitions[2], [0.5, 0, 0.5, 0.5, 0.5, 0])
    # 0 is followed by {2}, {2}, {0}; 1 by {2}, {0}.
    np.testing.assert_allclose(transitions[0], [1 / 3, 0, 2 / 3, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(transitions[1], [0.5, 0, 0.5, 0, 0, 0])
    items, scores = baselines["markov"].recommend([history([4], [0, 1])], 6)
    np.testing.assert_allclose(scores[0, :2], [(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2], rtol=1e-6)
    assert items.tolist() == [[2, 0, 1, 3, 4, 5]], "what never followed is ranked by popularity"


def random_histories(seed, users=12, num_items=15):
    rng = np.random.default_rng(seed)

    def sessions():
        return [rng.integers(0, num_items, rng.integers(1, 4)).tolist() for _ in range(rng.integers(1, 6))]

    return [history(*sessions()) for _ in range(users)]


def sessions_of(user):
    grouped = defaultdict(set)
    for item, session in zip(user["item"].tolist(), user["session"].tolist(), strict=True):
        grouped[session].add(item)
    return [grouped[session] for session in sorted(grouped)]


@pytest.mark.parametrize("seed", range(4))
def test_markov_against_an_oracle(seed):
    users = random_histories(seed)
    log = PurchaseLog.of(users, TARGET)
    popularity = Popularity.fit(log, 15, TARGET)
    followed, times = Counter(), Counter()
    for user in users:
        baskets = sessions_of(user)
        for now, after in pairwise(baskets):
            times.update(now)
            followed.update((i, j) for i in now for j in after)
    model = Markov.fit(log, popularity)
    for user, scores in zip(users, model.scores(log), strict=True):
        last = sessions_of(user)[-1]
        expected = [sum(followed[i, j] / times[i] for i in last if times[i]) / len(last) for j in range(15)]
        np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("neighbors", [3, 15])
def test_itemknn_against_an_oracle(neighbors):
    users = random_histories(7)
    log = PurchaseLog.of(users, TARGET)
    popularity = Popularity.fit(log, 15, TARGET)
    seen = np.array([[item in user["item"] for item in range(15)] for user in users], float)
    cosine = np.zeros((15, 15))
    for i in range(15):
        for j in range(15):
            if i != j and seen[:, i].any() and seen[:, j].any():
                cosine[i, j] = (seen[:, i] * seen[:, j]).sum() / np.sqrt(seen[:, i].sum() * seen[:, j].sum())
    for i in range(15):
        ranking = sorted(range(15), key=lambda j: (-np.float32(cosine[i, j]), -popularity.counts[j], j))
        cosine[i, ranking[neighbors:]] = 0
    model = ItemKNN.fit(log, popularity, neighbors)
    np.testing.assert_allclose(model.similarity.toarray(), cosine, atol=1e-6)
    np.testing.assert_allclose(model.scores(log), seen @ cosine, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 20, 30])
def test_best_items_against_sorting(k):
    rng = np.random.default_rng(k)
    scores = rng.integers(0, 4, (9, 20)).astype(np.float32) / 3
    counts, excluded = rng.integers(0, 3, 20), rng.random((9, 20)) < 0.3
    order = np.argsort(-counts, kind="stable")
    items, values = best_items(scores, order, k, excluded)
    for row in range(9):
        allowed = [item for item in range(20) if not excluded[row, item]]
        expected = sorted(allowed, key=lambda item: (-scores[row, item], -counts[item], item))[:k]
        assert items[row].tolist() == expected + [-1] * (k - len(expected))
        np.testing.assert_array_equal(values[row, : len(expected)], scores[row, expected])


def test_sessions_of_other_behaviors_leave_no_gap_in_the_chain():
    user = history([0], [5], [2])
    user["behavior"] = np.array([1, 0, 1], np.int8)
    fitted = fit_baselines(train(user), num_items=6, target_behaviors=TARGET)
    assert fitted["markov"].transitions[[0]].toarray().tolist() == [[0, 0, 1, 0, 0, 0]]


TEXTS, COUNTS = ["ab", "B a", "bb", "a", "ba"], [1, 7, 3, 2, 3]


def test_texts_by_popularity():
    models = text_baselines(make_space(TEXTS, COUNTS))
    assert list(models) == ["popularity"]
    histories = [{"prefix": "B"}, {}, {"prefix": "b", "search_query": ["BB", "aa"]}]
    texts, scores = models["popularity"].recommend(histories, 5)
    assert [[TEXTS[text] for text in row] for row in texts] == [["B a", "bb", "ba", "a", "ab"]] * 3
    assert scores.tolist() == [[7, 3, 3, 2, 1]] * 3
    texts, scores = models["popularity"].recommend(histories[-1:], 5, exclude_history=True)
    assert [TEXTS[text] for text in texts[0][:4]] == ["B a", "ba", "a", "ab"]
    assert texts[0, 4] == -1 and scores[0, 4] == -np.inf


def test_without_a_list_of_texts_there_is_no_baseline():
    assert text_baselines(make_space()) == {}
