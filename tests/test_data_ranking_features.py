"""Contexts and labels of ranking models by hand: the newest first, what was shown, what followed."""

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.popularity import DAY
from jaxrec.data.ranking_features import LabelConfig, Labels, RankingFeatureConfig

BEHAVIORS = ("pseudo_exposure", "exposure", "click", "cart", "purchase")
WANTED = np.array([False, False, False, False, True])
NOW = 20_000 * DAY + 100


def history(items, behaviors, ages) -> dict:
    return {
        "item": np.array(items, np.int32),
        "behavior": np.array(behaviors, np.int8),
        "timestamp": NOW - np.array(ages, np.int64),
        "session": np.zeros(len(items), np.int32),
        "now": NOW,
    }


def test_the_newest_come_first():
    seen = history([3, 1, 4, 1, 5], [2, 4, 1, 2, 4], [9_000, 0, 20, 1, 400])
    read = RankingFeatureConfig(buckets=(2, 6), weakest=2).read(seen | {"user": np.int32(7)}, WANTED)
    assert read["seen_item"].tolist() == [1, 1, 5, 3, 0, 0]
    assert read["seen_behavior"].tolist() == [4, 2, 4, 2, 0, 0]
    assert read["seen_age"].tolist() == [0, 1, 8, 13, 0, 0]  # powers of two of a second more than the age
    assert read["seen_mask"].tolist() == [True] * 4 + [False] * 2
    assert read["asked_day"] == 20_000 and read["asking_user"] == 7


def test_of_a_long_history_the_latest_are_read_and_target_behaviors_alone_by_default():
    seen = history([3, 1, 4, 1, 5], [4, 4, 1, 2, 4], [9_000, 0, 20, 1, 400])
    config = RankingFeatureConfig(buckets=(2,))
    assert config.read(seen, WANTED)["seen_item"].tolist() == [1, 5]
    assert config.read(seen, WANTED, size=4)["seen_item"].tolist() == [1, 5, 3, 0]
    assert RankingFeatureConfig(buckets=(2, 3, 9)).bucket_of(seen, WANTED) == 3
    nothing = config.read(history([], [], []), WANTED)
    assert not nothing["seen_mask"].any() and nothing["asking_user"] == -1


def test_the_arrays_of_a_query():
    config = RankingFeatureConfig(led=3)
    told = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = config.of_query(np.ones(5), np.array([7, 2]), told, 5)
    assert found["asked"] and found["led_item"].tolist() == [7, 2, -1]
    np.testing.assert_array_equal(found["led"], np.concatenate([told, np.zeros((1, 4))]))
    none = config.of_query(None, np.zeros(0, np.int32), np.zeros((0, 4)), 5)
    assert not none["asked"] and not none["query_vector"].any() and none["led"].shape == (3, 4)


def test_impressions_are_distinct_items_with_their_strongest_behavior():
    labels = Labels.of(LabelConfig(), BEHAVIORS)
    record = {"item": np.array([5, 5, 2, 5, 9, 2]), "behavior": np.array([1, 2, 1, 4, 0, 1], np.int8)}
    items, strongest = labels.impressions(record, np.ones(6, bool))
    assert items.tolist() == [2, 5] and strongest.tolist() == [1, 4]
    items, strongest = labels.impressions(record, np.array([True, True, True, False, True, True]))
    assert strongest.tolist() == [1, 2]


def test_candidates_are_padded_or_drawn_evenly():
    labels = Labels.of(LabelConfig(candidates=4), BEHAVIORS)
    rng = np.random.default_rng(0)
    few = labels.example(np.array([2, 5]), np.array([1, 4], np.int8), np.zeros(0, np.int32), rng)
    assert few["candidate"].tolist() == [2, 5, 0, 0] and few["candidate_where"].tolist() == [True, True, False, False]
    assert few["candidate_behavior"].tolist() == [1, 4, -1, -1]
    counts = np.zeros(10)
    for _ in range(2000):
        many = labels.example(np.arange(10), np.arange(10, dtype=np.int8) % 5, np.zeros(0, np.int32), rng)
        assert many["candidate_where"].all() and (many["candidate_behavior"] == many["candidate"] % 5).all()
        counts[many["candidate"]] += 1
    np.testing.assert_allclose(counts / 2000, 0.4, atol=0.05)


def test_without_exposures_items_are_drawn_in_their_place():
    labels = Labels.of(LabelConfig(candidates=6), ("purchase",))
    assert labels.exposure is None and labels.sampled == 3 and labels.weakest == 0
    found = labels.example(np.array([4, 8]), np.zeros(2, np.int8), np.array([3, 8, 9]), np.random.default_rng(0))
    assert found["candidate"].tolist() == [4, 8, 3, 9, 0, 0], "what was taken is not among the drawn"
    assert found["candidate_behavior"].tolist() == [0, 0, -1, -1, -1, -1]
    assert found["candidate_where"].sum() == 4
    assert Labels.of(LabelConfig(), BEHAVIORS).sampled == 0
    assert Labels.of(LabelConfig(sampled=5), BEHAVIORS).sampled == 5


def test_labels_that_the_log_does_not_have():
    with pytest.raises(UserError, match=r"'ranking.labels.purchase' are 'click' and 'purchase', .* it has a, b"):
        Labels.of(LabelConfig(), ("a", "b"))
    with pytest.raises(UserError, match=r"'ranking.labels.purchase' is 'cart', which is not stronger than .*'cart'"):
        Labels.of(LabelConfig(click="cart", purchase="cart"), BEHAVIORS)
    with pytest.raises(UserError, match=r"'ranking.labels.sampled' is 8; give 0 or more, below .*, 8"):
        LabelConfig(candidates=8, sampled=8)
    with pytest.raises(UserError, match=r"'ranking.features.buckets' is \(8, 4\)"):
        RankingFeatureConfig(buckets=(8, 4))
