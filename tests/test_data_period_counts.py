"""Counts before each period of a log against loops over all events: nothing sees itself or its future."""

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data import period_counts
from jaxrec.data.period_counts import PeriodConfig, counts_by_period, item_features
from jaxrec.data.popularity import DAY
from jaxrec.data.query_items import query_items

START = 20_000 * DAY + 5_000


def draw(seed: int, size: int = 80):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 6, size), START + rng.integers(0, 12 * DAY, size), rng


@pytest.mark.parametrize("days", [1, 3, 30])
def test_counts_are_those_of_a_loop(days):
    keys, times, _ = draw(0)
    found = counts_by_period(keys, times, 7, PeriodConfig(days, decay_days=4.0))
    first = times.min() // DAY
    assert found.periods.first_day == first and found.total.shape == (found.periods.count, 7)
    for period in range(found.periods.count):
        begin = (first + period * days) * DAY
        for key in range(7):
            ages = [(begin - time) / DAY for time in times[keys == key] if time < begin]
            assert found.total[period, key] == len(ages)
            assert found.recent[period, key] == pytest.approx(sum(np.exp(-age / 4.0) for age in ages), rel=1e-5)
    assert found.total[-1].sum() == len(keys), "behind the log's end all of it is known"


def test_the_period_of_a_day():
    periods = counts_by_period(np.array([0, 0]), START + np.array([0, 6 * DAY]), 1, PeriodConfig(days=2)).periods
    assert periods.of(np.array([19_990, 20_000, 20_001, 20_002, 20_007, 20_008, 30_000])).tolist() == [
        0, 0, 0, 1, 3, 4, 4
    ]  # fmt: skip


def test_no_events_have_no_counts():
    found = counts_by_period(np.zeros(0, int), np.zeros(0, int), 3, PeriodConfig())
    assert not found.total.any() and found.periods.of(np.int64(20_000)) < found.periods.count


def test_too_many_counts_are_refused(monkeypatch):
    monkeypatch.setattr(period_counts, "LARGEST", 20)
    with pytest.raises(UserError, match=r"'ranking.counts.days' is 1: 14 periods of 7 counts .* longer periods"):
        counts_by_period(*draw(0)[:2], 7, PeriodConfig())


def test_item_features_by_hand():
    """Item 0 is shown 30 times and clicked 6 times on the first day, item 1 10 times and never, item 2 never."""
    item = np.array([0] * 30 + [1] * 10 + [0] * 6 + [2])
    behavior = np.array([0] * 40 + [1] * 6 + [1])
    times = np.full(47, START)
    times[-1] += 2 * DAY
    features, periods = item_features(item, behavior, times, (3, 2), PeriodConfig())
    assert features.shape == (4, 3, 5) and periods.count == 4
    assert not features[0].any(), "before the log nothing is known, nor that an item comes"
    shown = np.log1p([30, 10, 0])
    np.testing.assert_allclose(features[1, :, 0], (shown - shown.mean()) / shown.std(), rtol=1e-5)
    np.testing.assert_allclose(features[1, :, 0].std(), 1, rtol=1e-5)
    rate = 6 / 40
    expected = np.log(np.array([(6 + 10 * rate) / 40, 10 * rate / 20, 10 * rate / 10]) / rate)
    np.testing.assert_allclose(features[1, :, 4], expected, rtol=1e-5)
    np.testing.assert_allclose(features[2][:, [0, 2, 4]], features[1][:, [0, 2, 4]], rtol=1e-5)
    assert features[3, 2, 2] > features[2, 2, 2], "the click of the third day counts from the fourth on"


def test_items_of_a_query_are_those_of_a_loop():
    item, times, rng = draw(1)
    query = rng.integers(0, 3, len(item))
    found = query_items(["a", "b", "c", "d"], query, item, times, PeriodConfig(days=2, decay_days=5.0))
    first = times.min() // DAY
    for number in range(4):
        for day in (first - 5, first, first + 3, first + 4, first + 100):
            begin = (first + min(max((day - first) // 2, 0), found.counts.periods.count - 1) * 2) * DAY
            mine = [place for place in range(len(item)) if query[place] == number and times[place] < begin]
            counts = {each: sum(item[place] == each for place in mine) for each in set(item[mine].tolist())}
            items, told = found.before(number, int(day), 3)
            assert [counts[each] for each in items.tolist()] == sorted(counts.values(), reverse=True)[:3]
            for row, each in zip(told, items.tolist(), strict=True):
                ages = [(begin - times[place]) / DAY for place in mine if item[place] == each]
                lately = sum(np.exp(-age / 5.0) for age in ages)
                whole = sum(np.exp(-(begin - times[place]) / DAY / 5.0) for place in mine)
                expected = [np.log1p(len(ages)), np.log1p(lately), len(ages) / len(mine), lately / whole]
                np.testing.assert_allclose(row, expected, rtol=1e-4)
    assert len(found.before(-1, int(first + 100), 3)[0]) == 0
    assert found.numbers["c"] == 2
