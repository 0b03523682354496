"""Levels of a search's items and counts of late, of records written by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.behavior_levels import (
    CLICKED,
    ELSEWHERE,
    EXPOSED,
    OTHER,
    PURCHASED,
    UNSHOWN,
    BehaviorLevelConfig,
    BehaviorLevels,
    behavior_levels,
    recent_counts,
)
from jaxrec.data.popularity import DAY
from jaxrec.data.ranking_features import LabelConfig, Labels

BEHAVIORS = ("pseudo_exposure", "exposure", "click", "cart", "purchase")
LABELS = Labels.of(LabelConfig(), BEHAVIORS)
CATEGORY = np.array([1, 1, 1, 1, 2, 2, 2, 0], np.int32)
LEVELS = BehaviorLevels(LABELS, CATEGORY, 2)


def record(*events, searches=(100,)):
    """Events as (item, behavior, timestamp, place of the search)."""
    columns = np.array(events, np.int64).reshape(-1, 4).T
    names = ("item", "behavior", "timestamp", "search")
    kinds = (np.int32, np.int8, np.int64, np.int32)
    found = {name: column.astype(kind) for name, column, kind in zip(names, columns, kinds, strict=True)}
    return found | {"search_timestamp": np.array(searches, np.int64)}


SESSION = record(
    *((0, 1, 110, 0), (0, 2, 111, 0), (0, 4, 112, 0)),  # shown, clicked, bought
    *((1, 1, 110, 0), (1, 3, 113, 0)),  # shown, put into the cart: clicked
    *((2, 1, 110, 0), (4, 1, 110, 0), (5, 0, 110, 0)),  # shown; shown; hardly shown
    *((3, 4, 120, -1), (2, 4, 120, -1), (6, 4, 120, -1)),  # bought without a search; item 6 is of another category
    *((1, 2, 120, -1), (3, 4, 90, -1), (0, 4, 100 + 3 * DAY, -1)),  # clicked without; bought before; too late
    *((7, 1, 210, 1), (4, 2, 210, 1)),
    searches=(100, 200),
)


def test_levels_of_a_search_by_hand():
    items, level = LEVELS.of(SESSION, 0)
    expected = {0: PURCHASED, 1: CLICKED, 2: ELSEWHERE, 3: ELSEWHERE, 4: EXPOSED}
    assert dict(zip(items.tolist(), level.tolist(), strict=True)) == expected
    assert LEVELS.categories(SESSION, 0).tolist() == [1]
    without = BehaviorLevels(LABELS, CATEGORY, 0)
    assert dict(zip(*(each.tolist() for each in without.of(SESSION, 0)), strict=True)) == {
        **{0: PURCHASED, 1: CLICKED, 2: EXPOSED, 4: EXPOSED}
    }
    # Of the second search one item has no category, and item 6 was bought before it.
    assert dict(zip(*(each.tolist() for each in LEVELS.of(SESSION, 1)), strict=True)) == {4: CLICKED, 7: EXPOSED}
    assert LEVELS.categories(SESSION, 1).tolist() == [2]


def test_what_was_clicked_without_a_search_is_a_sample_of_the_reward_model():
    where = LEVELS.clicked_elsewhere(SESSION, 0)
    events = [(int(SESSION["item"][at]), int(SESSION["behavior"][at])) for at in np.flatnonzero(where)]
    assert events == [(3, 4), (2, 4), (1, 2)]
    assert not LEVELS.clicked_elsewhere(SESSION, 1).any()


def test_a_search_that_met_nothing_has_no_category_and_all_is_other():
    empty = record((3, 4, 150, -1))
    items, level = LEVELS.of(empty, 0)
    assert not len(items) and not len(level) and not len(LEVELS.categories(empty, 0))
    assert LEVELS.unmet(np.array([0, 4, 7]), LEVELS.categories(empty, 0)).tolist() == [OTHER] * 3
    assert LEVELS.unmet(np.array([0, 4, 7]), np.array([1])).tolist() == [UNSHOWN, OTHER, OTHER]


def test_drawn_items_are_of_the_categories_and_of_others():
    drawn = LEVELS.draw(np.array([1]), (2, 3), np.random.default_rng(0))
    assert CATEGORY[drawn[:2]].tolist() == [1, 1] and (CATEGORY[drawn[2:]] != 1).all()
    assert len(set(drawn.tolist())) == 5 and drawn.dtype == np.int32
    every = LEVELS.draw(np.array([2]), (99, 99), np.random.default_rng(0))
    assert every.tolist() == [4, 5, 6, 0, 1, 2, 3, 7]


def test_a_log_without_clicks_or_purchases_has_fewer_levels():
    """Purchases alone, as of baskets; clicks alone, as of a search engine's log."""
    bought = Labels.of(LabelConfig(click="none"), ("exposure", "purchase"))
    level = BehaviorLevels(bought, CATEGORY, 0).of(record((0, 1, 110, 0), (1, 0, 110, 0)), 0)[1]
    assert level.tolist() == [PURCHASED, EXPOSED]
    clicked = Labels.of(LabelConfig(exposure="none", purchase="none"), ("click",))
    assert BehaviorLevels(clicked, CATEGORY, 0).of(record((0, 0, 110, 0)), 0)[1].tolist() == [CLICKED]


def test_counts_of_late_against_counting():
    """A purchase is a click too, and a click an exposure; the day of the question counts nothing."""
    rng = np.random.default_rng(3)
    items, behavior = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
    timestamps = rng.integers(20 * DAY, 60 * DAY, 300)
    counts = recent_counts(items, behavior, timestamps, LABELS, 7)
    for day in (0, 20, 21, 26, 40, 60, 63, 67, 90):
        inside = (timestamps // DAY < day) & (timestamps // DAY >= day - 7)
        expected = [
            [(inside & (items == item) & (behavior >= least)).sum() for least in (1, 2, 4)] for item in range(5)
        ]
        np.testing.assert_array_equal(counts.before(np.arange(5), day), expected)
    nothing = recent_counts(*(np.zeros(0, np.int64) for _ in range(3)), LABELS, 7)
    np.testing.assert_array_equal(nothing.before(np.arange(2), 30), np.zeros((2, 3)))


def test_what_has_no_levels_is_refused(tmp_path):
    pq.write_table(pa.table({"item_id": ["a", "b"], "kind": ["x", None]}), tmp_path / "items.parquet")
    with pytest.raises(UserError, match=r"'rewards\.levels\.category': .* no column 'category'.*item_id, kind"):
        behavior_levels(tmp_path, LABELS, BehaviorLevelConfig())
    assert behavior_levels(tmp_path, LABELS, BehaviorLevelConfig(category="kind")).category.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"'rewards\.levels\.base' is \(1\.0, 2\.0\); give 6 falling.*purchased"):
        BehaviorLevelConfig(base=(1.0, 2.0))
    with pytest.raises(UserError, match=r"'rewards\.levels\.base' is .*give 6 falling"):
        BehaviorLevelConfig(base=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0))
    with pytest.raises(UserError, match=r"'rewards\.levels\.recent_days' is 0"):
        BehaviorLevelConfig(recent_days=0)
