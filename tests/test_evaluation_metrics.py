"""Ranking metrics: by hand, against a plain Python oracle, and at the edges."""

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.evaluation.metrics import add, hit_matrix, id_accuracy, mean, ranking_metrics, validity_rate


def metrics(ranked, targets, cutoffs=(1, 2, 5)):
    targets = np.array(targets, np.int32)
    pairs = ranking_metrics(np.array(ranked, np.int32), targets, targets >= 0, cutoffs)
    return {key: mean(pair) for key, pair in pairs.items()}


def test_one_user_by_hand():
    got = metrics([[7, 3, 9, 4, -1]], [[3, 4, 8]])
    assert got["recall@1"] == 0 and got["recall@2"] == pytest.approx(1 / 3) and got["recall@5"] == pytest.approx(2 / 3)
    assert got["hr@1"] == 0 and got["hr@2"] == got["hr@5"] == 1
    assert got["mrr@1"] == 0 and got["mrr@2"] == got["mrr@5"] == 0.5
    second, fourth = 1 / math.log2(3), 1 / math.log2(5)
    assert got["ndcg@2"] == pytest.approx(second / (1 + second))
    assert got["ndcg@5"] == pytest.approx((second + fourth) / (1 + second + 1 / math.log2(4)))


def test_a_perfect_ranking_scores_one_everywhere_but_recall_below_the_number_of_targets():
    got = metrics([[1, 2, 3, 4, 5]], [[1, 2, 3]], cutoffs=(2, 5))
    assert got == {
        "recall@2": pytest.approx(2 / 3), "recall@5": 1, "hr@2": 1, "hr@5": 1,
        "ndcg@2": pytest.approx(1), "ndcg@5": pytest.approx(1), "mrr@2": 1, "mrr@5": 1,
    }  # fmt: skip


def test_a_repeated_item_hits_once_at_its_first_position():
    hits = hit_matrix(np.array([[5, 5, 2, 5]]), np.array([[5, 2]]), np.array([[True, True]]))
    assert hits.tolist() == [[True, False, True, False]]


def test_minus_one_never_hits_and_masked_targets_do_not_count():
    hits = hit_matrix(np.array([[-1, 4]]), np.array([[-1, 4]]), np.array([[True, False]]))
    assert not hits.any()


def test_an_all_masked_user_counts_zero_of_zero():
    pairs = ranking_metrics(np.array([[1, 2]]), np.array([[1]]), np.array([[False]]), (2,))
    assert pairs == {"recall@2": (0.0, 0), "hr@2": (0.0, 0), "ndcg@2": (0.0, 0), "mrr@2": (0.0, 0)}
    assert mean(pairs["ndcg@2"]) == 0.0


def test_a_cutoff_beyond_the_ranking_sees_what_there_is():
    got = metrics([[9, 3]], [[3]], cutoffs=(100,))
    assert got["recall@100"] == 1 and got["ndcg@100"] == pytest.approx(1 / math.log2(3))


def oracle(ranked, targets, k):
    """The definitions, one user at a time, with sets and loops."""
    targets, seen, gain, hits, first = set(targets), set(), 0.0, 0, 0.0
    for rank, item in enumerate(ranked[:k], start=1):
        if item in targets and item not in seen:
            gain, hits, first = gain + 1 / math.log2(rank + 1), hits + 1, first or 1 / rank
        seen.add(item)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(targets)) + 1))
    return {"recall": hits / len(targets), "hr": float(hits > 0), "ndcg": gain / ideal, "mrr": first}


users = st.tuples(st.lists(st.integers(-1, 8), min_size=6, max_size=6), st.sets(st.integers(0, 8), max_size=4))


@settings(max_examples=150, deadline=None)
@given(st.lists(users, min_size=1, max_size=6))
def test_metrics_against_the_oracle(rows):
    ranked = np.array([row for row, _ in rows], np.int32)
    targets = np.full((len(rows), 4), -1, np.int32)
    for user, (_, wanted) in enumerate(rows):
        targets[user, : len(wanted)] = sorted(wanted)
    got = ranking_metrics(ranked, targets, targets >= 0, (1, 3, 6, 10))
    for k in (1, 3, 6, 10):
        expected = [oracle(row, wanted, k) for row, wanted in rows if wanted]
        for name in ("recall", "hr", "ndcg", "mrr"):
            total, count = got[f"{name}@{k}"]
            assert count == len(expected)
            assert total == pytest.approx(sum(user[name] for user in expected), abs=1e-9)


def test_sums_and_counts_add_over_batches():
    rng = np.random.default_rng(0)
    ranked, targets = rng.integers(0, 9, (10, 5)), rng.permuted(np.tile(np.arange(9), (10, 1)), axis=1)[:, :3]
    where = rng.random((10, 3)) < 0.5
    whole = ranking_metrics(ranked, targets, where, (3, 5))
    parts = {}
    for rows in (slice(0, 4), slice(4, 10)):
        parts = add(parts, ranking_metrics(ranked[rows], targets[rows], where[rows], (3, 5)))
    assert parts.keys() == whole.keys()
    for key in whole:
        assert parts[key] == (pytest.approx(whole[key][0]), whole[key][1])


def test_id_accuracy_by_level_with_codebooks_of_different_sizes():
    first = np.array([[[0.1, 0.9], [0.9, 0.1]], [[0.2, 0.8], [0.6, 0.4]]])
    second = np.array([[[0, 0, 1.0], [1.0, 0, 0]], [[0, 1.0, 0], [0, 1.0, 0]]])
    codes = np.array([[[1, 2], [1, 0]], [[1, 1], [0, 2]]])
    where = np.array([[True, True], [True, False]])
    assert id_accuracy([first, second], codes, where) == {"acc_sid1": (2, 3), "acc_sid2": (3, 3)}


def test_validity_rate_of_the_beams_asked_for():
    valid = np.array([[True, False], [True, True]])
    assert validity_rate(valid) == (3, 4)
    assert validity_rate(valid, np.array([[True, True], [True, False]])) == (2, 3)


def test_arrays_of_other_users_are_refused():
    ranked, targets, where = np.array([[1, 2], [3, 4]]), np.array([[1], [4]]), np.ones((2, 1), bool)
    for bad in (
        (ranked, targets[:1], where[:1]), (ranked[:1], targets, where), (ranked, targets, where[:1]),
        (ranked, targets, np.ones((2, 2), bool)), (ranked[0], targets, where), (ranked, targets[:, 0], where[:, 0]),
    ):  # fmt: skip
        with pytest.raises(
            UserError, match=r"ranked \[.*\], targets \[.*\] and where \[.*\] do not fit: give rankings"
        ):
            ranking_metrics(*bad)
    codes, log_probs = np.zeros((2, 3, 2), int), [np.zeros((2, 3, 4)), np.zeros((2, 3, 5))]
    for bad in ((log_probs, codes, np.ones((1, 3), bool)), ([log_probs[0], log_probs[1][:1]], codes, np.ones((2, 3)))):
        with pytest.raises(
            UserError, match=r"codes \[2, 3, 2\] and where \[.*\] do not fit log_probs of \[\[2, 3, 4\], "
        ):
            id_accuracy(*bad)
    with pytest.raises(UserError, match=r"where \[1, 3\] is not shaped like valid \[2, 3\]"):
        validity_rate(np.ones((2, 3), bool), np.ones((1, 3), bool))


def test_an_independent_library_agrees():
    """ir-measures asks trec_eval, which ranks by score; users without a target are in neither."""
    rng = np.random.default_rng(0)
    users, items, depth = 40, 60, 25
    ranked = np.stack([rng.permutation(items)[:depth] for _ in range(users)]).astype(np.int32)
    ranked[3, 8:], ranked[5] = -1, -1
    targets = np.stack([rng.permutation(items)[:6] for _ in range(users)]).astype(np.int32)
    where = np.arange(6) < rng.integers(0, 7, users)[:, None]
    assert not where.any(1).all()
    truth = [ir_measures.Qrel(str(user), str(item), 1) for user in range(users) for item in targets[user][where[user]]]
    run = [
        ir_measures.ScoredDoc(str(user), str(item), float(-place))
        for user in range(users)
        for place, item in enumerate(ranked[user])
        if item >= 0 and where[user].any()
    ]
    mine = {name: mean(pair) for name, pair in ranking_metrics(ranked, targets, where, (5, 10, 25)).items()}
    for cutoff in (5, 10, 25):
        theirs = {
            "recall": ir_measures.R @ cutoff,
            "hr": ir_measures.Success @ cutoff,
            "ndcg": ir_measures.nDCG @ cutoff,
            "mrr": ir_measures.RR @ cutoff,
        }
        found = ir_measures.calc_aggregate(theirs.values(), truth, run)
        for name, measure in theirs.items():
            np.testing.assert_allclose(mine[f"{name}@{cutoff}"], found[measure], rtol=1e-6, err_msg=f"{name}@{cutoff}")
