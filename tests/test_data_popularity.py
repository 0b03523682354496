"""Popularity by period, by hand."""

import numpy as np

from jaxrec.data.popularity import DAY, PopularityConfig, popularity_by_period

ITEMS = np.array([0, 0, 1, 2])
TIMES = np.array([100, 101, 107, 121]) * DAY  # periods of 7 days from day 100: 0, 0, 1, 3


def test_without_periods_it_is_the_share_of_all_events():
    result = popularity_by_period(ITEMS, TIMES, 4, PopularityConfig())
    np.testing.assert_allclose(result.weights, [np.array([3, 2, 2, 1]) / 8])
    assert result.period(12345) == 0


def test_a_period_knows_what_came_before_it_and_nothing_else():
    config = PopularityConfig(days=7, decay_days=10.0, floor=0.0)
    result = popularity_by_period(ITEMS, TIMES, 4, config)
    assert result.weights.shape == (5, 4)
    np.testing.assert_allclose(result.weights[1], [1, 0, 0, 0])
    old = np.exp(-(114 - 100) / 10) + np.exp(-(114 - 101) / 10)
    new = np.exp(-(114 - 107) / 10)
    np.testing.assert_allclose(result.weights[2], np.array([old, new, 0, 0]) / (old + new))
    np.testing.assert_allclose(result.weights[3], result.weights[2])  # nothing was sold; shares fade alike
    later = popularity_by_period(np.append(ITEMS, 3), np.append(TIMES, 122 * DAY), 4, config)
    np.testing.assert_allclose(later.weights[1:4], result.weights[1:4])


def test_days_outside_of_the_log_get_its_first_or_last_period():
    result = popularity_by_period(ITEMS, TIMES, 4, PopularityConfig(days=7))
    np.testing.assert_array_equal(
        result.period(np.array([0, 100, 106, 107, 121, 127, 128, 9999])), [0, 0, 0, 1, 3, 3, 4, 4]
    )


def test_every_item_is_possible_in_every_period():
    assert (popularity_by_period(ITEMS, TIMES, 4, PopularityConfig(days=7)).weights > 0).all()
