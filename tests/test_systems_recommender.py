"""Recommending with a generative model, against scoring every item of the catalogue."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from onemall_parts import (
    FEATURES,
    ITEMS,
    MODEL,
    SIZES,
    make_arrays,
    make_assembly,
    make_history,
    make_variables,
)

from jaxrec.evaluation.cases import Cases
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender

IDS = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
TWO_LENGTHS = dataclasses.replace(FEATURES, buckets=(3, 6))
# Lengths that alternate between the two buckets, and more of one than a batch takes.
HISTORIES = [make_history(seed, events) for seed, events in enumerate([12, 2, 9, 3, 0, 14, 1, 10, 16, 11])]
LONG = [0, 2, 5, 7, 8, 9]


@pytest.fixture(scope="module")
def recommender() -> GenerativeRecommender:
    assembly = make_assembly(dataclasses.replace(MODEL, layers=1, queries=0))
    decoding = DecodingConfig(beam_width=len(IDS), batch_size=4)
    return GenerativeRecommender(assembly, make_variables(assembly), TWO_LENGTHS, decoding)


@pytest.fixture(scope="module")
def everything(recommender):
    """All items, ranked for everybody."""
    return recommender.recommend(HISTORIES, ITEMS)


@pytest.fixture(scope="module")
def log_probs(recommender) -> np.ndarray:
    """The log-probability of every ID after each history, [10, 24], by `score`."""
    assembly = recommender.assembly

    @jax.jit
    def score(variables, arrays, targets):
        context = assembly.model.apply(variables, assembly.features(arrays), assembly.catalogue, method="prefill")
        return assembly.model.apply(variables, context, targets, method="score")[0].sum(-1)

    rows = []
    for history in HISTORIES:
        config = dataclasses.replace(FEATURES, buckets=(3,) if longest(history) <= 3 else (6,))
        rows.append(score(recommender.variables, make_arrays([history], assembly, config), IDS[None])[0])
    return np.stack(rows)


def longest(history) -> int:
    return np.bincount(history["behavior"], minlength=1).max()


def seen(history) -> set[int]:
    return set(history["item"][history["behavior"] == 1].tolist())


def ranking(space, log_probs: np.ndarray) -> list[int]:
    """All items by the score of their ID, those of one ID by falling popularity, then by index."""
    score = {tuple(each): value for each, value in zip(IDS.tolist(), log_probs.tolist(), strict=True)}
    keys = [(-score[tuple(code)], -count) for code, count in zip(space.codes.tolist(), space.popularity, strict=True)]
    return sorted(range(ITEMS), key=lambda item: (*keys[item], item))


def test_histories_are_of_two_lengths():
    assert [row for row, history in enumerate(HISTORIES) if longest(history) > 3] == LONG


def test_it_ranks_as_an_exhaustive_search_does(recommender, everything, log_probs):
    items, scores = everything
    space = recommender.assembly.space
    assert space.counts.max() >= 4
    for row in range(len(HISTORIES)):
        assert items[row].tolist() == ranking(space, log_probs[row])
    of_item = [np.flatnonzero((code == IDS).all(-1))[0] for code in space.codes]
    np.testing.assert_allclose(scores, np.take_along_axis(log_probs[:, of_item], items, axis=1), atol=2e-5)
    # Users differ, so that a row in another's place would show.
    assert len({tuple(row) for row in items.tolist()}) == len(HISTORIES)


def test_exclude_seen_leaves_out_exactly_what_was_bought(recommender, log_probs):
    items, scores = recommender.recommend([HISTORIES[row] for row in LONG], ITEMS, exclude_seen=True)
    for place, row in enumerate(LONG):
        bought = seen(HISTORIES[row])
        expected = [item for item in ranking(recommender.assembly.space, log_probs[row]) if item not in bought]
        assert bought
        assert items[place].tolist() == expected + [-1] * len(bought)
        assert np.isneginf(scores[place, len(expected) :]).all()


def test_who_else_is_in_the_batch_does_not_matter(recommender, everything):
    items, scores = everything
    for row in (0, 1, 4, 9):
        alone_items, alone_scores = recommender.recommend([HISTORIES[row]], ITEMS)
        assert alone_items[0].tolist() == items[row].tolist()
        np.testing.assert_allclose(alone_scores[0], scores[row], atol=2e-5)
    order = [7, 3, 0, 5]
    shuffled, _ = recommender.recommend([HISTORIES[row] for row in order], ITEMS)
    assert shuffled.tolist() == items[order].tolist()


def test_nobody_asks(recommender):
    items, scores = recommender.recommend([], ITEMS)
    assert items.shape == scores.shape == (0, ITEMS)
    assert items.dtype == np.int32
    assert scores.dtype == np.float32


def test_a_damaged_model_is_told(recommender, monkeypatch):
    damaged = jax.tree.map(lambda x: x * np.nan, recommender.variables)
    monkeypatch.setitem(recommender.served, "variables", damaged)
    with pytest.raises(FloatingPointError, match="NaN"):
        recommender.recommend(HISTORIES[:1], ITEMS)


def test_diagnose_against_counting(recommender, log_probs):
    """Level by level from the sums over all IDs; validity from the ten most likely IDs."""
    rng = np.random.default_rng(0)
    targets, where = rng.integers(0, ITEMS, (6, 3)), rng.random((6, 3)) < 0.7
    where[0] = [True, False, False]
    cases = Cases(np.arange(6), [HISTORIES[row] for row in LONG], np.where(where, targets, -1), where, where)
    found = recommender.diagnose(cases)

    codes, right = recommender.assembly.space.codes, np.zeros(3)
    existing = {tuple(code) for code in codes.tolist()}
    valid = 0
    for row, case in enumerate(LONG):
        joint = np.exp(log_probs[case])
        for target in targets[row][where[row]]:
            for level in range(3):
                begins = (IDS[:, :level] == codes[target, :level]).all(-1)
                mass = [joint[begins & (IDS[:, level] == code)].sum() for code in range(SIZES[level])]
                right[level] += np.argmax(mass) == codes[target, level]
        valid += sum(tuple(IDS[index].tolist()) in existing for index in np.argsort(-log_probs[case])[:10])
    assert [found[f"acc_sid{level + 1}"] for level in range(3)] == [(hits, where.sum()) for hits in right]
    assert found["validity"] == (valid, 60)
