import os
import subprocess
import sys

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.popularity import PopularityConfig
from jaxrec.data.search_statistics import UNKNOWN, SearchStatisticsConfig, search_statistics, training_searches

DAY = 86_400
TEXTS = ("frozen pizza", "pizza", "red shoes", "shoes")
PAIRS = [(0, 5, 0), (0, 5, 8), (0, 6, 8), (1, 7, 8), (1, 7, 9), (1, 5, 9), (2, 1, 0), (2, 1, 20), (2, 2, 20)]
SEARCHES = np.array([0, 1, 1, 2, 3, 3, 4, 5, 5])
NEVER = SearchStatisticsConfig(PopularityConfig(7, 20.0, 0.0), neighbours=0)


def shares(found):
    return dict(zip(found.item.tolist(), found.share.astype(float).round(4).tolist(), strict=True))


def make(config=NEVER):
    query, item, day = np.array(PAIRS).T
    return search_statistics(TEXTS, query, SEARCHES, item, day * DAY, config)


def test_shares_are_those_of_the_searches_with_the_most_taken_first():
    found = make().led_to(0, 9)
    # The second search led to both.
    assert found.item.tolist() == [5, 6] and found.searches == 2
    assert make().searches.tolist() == [2, 2, 2, 0, 6]
    np.testing.assert_allclose(found.share, [2 / 3, 1 / 3], rtol=1e-6)


def test_shares_of_late_are_of_the_periods_before_the_day():
    found = make().led_to(0, 30)
    # Day 0 is in the first period of seven days, days 8 in the second; both before that of the last event.
    weights = {day: np.exp((day - 14) / 20) for day in (0, 8)}
    expected = np.array([weights[0] + weights[8], weights[8]])
    np.testing.assert_allclose(found.recent, expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(make().led_to(0, 8).recent, [1.0, 0.0], atol=1e-6)  # the second period begins at day 7


def test_a_search_left_out_is_not_counted():
    found = make().led_to(0, 9, without=[5, 6])
    assert found.item.tolist() == [5] and found.searches == 1
    assert make().led_to(3, 9).item.tolist() == []


def test_in_the_first_period_too_a_search_left_out_is_not_counted():
    """No period comes before it: shares of late are those of all time there, and hold the answer no more than those."""
    found = make().led_to(0, 0, without=[5])
    assert found.item.tolist() == [5, 6]
    np.testing.assert_allclose(found.share, [1 / 2, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(found.recent, found.share, rtol=1e-6)
    whole = make(SearchStatisticsConfig(PopularityConfig(0, 20.0, 0.0), neighbours=0)).led_to(0, 30, without=[5])
    np.testing.assert_allclose(whole.recent, [1 / 2, 1 / 2], rtol=1e-6)  # one period for all time
    with pytest.raises(UserError, match=r"statistics\.recent\.floor"):
        SearchStatisticsConfig(PopularityConfig(7, 20.0, 0.1))


def test_all_searches_together():
    statistics = make()
    found = statistics.led_to(statistics.everything, 9)
    assert found.item.tolist() == [5, 1, 7, 2, 6]
    np.testing.assert_allclose(found.share, np.array([3, 2, 2, 1, 1]) / 9, rtol=1e-6)


def test_rare_and_unknown_queries_borrow_from_those_that_share_words():
    config = SearchStatisticsConfig(PopularityConfig(7, 20.0, 0.0), neighbours=2, borrow_below=4, borrowed=3.0)
    statistics = make(config)
    unknown = statistics.led_to(UNKNOWN, 9, text="pizza with cheese")
    # Half the weight of "pizza" for "frozen pizza", which says something else as well.
    assert dict(zip(unknown.item.tolist(), unknown.share.astype(float).round(4).tolist(), strict=True)) == {
        5: 0.4444, 7: 0.4444, 6: 0.1111,
    }  # fmt: skip
    assert unknown.searches == 0
    np.testing.assert_allclose([unknown.share.sum(), unknown.recent.sum()], 1, rtol=1e-5)
    rare = statistics.led_to(0, 9)
    # Two thirds and one third of its own two searches, and three of "pizza", of which item 7 has two thirds.
    assert dict(zip(rare.item.tolist(), rare.share.astype(float).round(4).tolist(), strict=True)) == {
        5: 0.4667, 6: 0.1333, 7: 0.4,
    }  # fmt: skip
    assert statistics.led_to(UNKNOWN, 9, text="nothing alike").item.tolist() == []


def test_a_query_borrows_by_its_searches_however_many_items_they_led_to():
    """One search that led to twelve items knows less than what makes ten searches."""
    items = np.append(np.arange(12), 50)
    query, search = np.append(np.zeros(12, int), 1), np.append(np.zeros(12, int), 1)
    statistics = search_statistics(
        ("pizza rolls", "pizza"), query, search, items, np.zeros(13, int), SearchStatisticsConfig()
    )
    found = statistics.led_to(0, 0)
    assert found.searches == 1 and 50 in found.item


def test_words_are_those_of_any_script_without_punctuation():
    config = SearchStatisticsConfig(neighbours=2)
    texts = ("跑步鞋", "men's shoes, red")
    statistics = search_statistics(texts, *np.array([[0, 1], [0, 1], [3, 4], [0, 0]]), config)
    assert statistics.led_to(UNKNOWN, 0, text="跑鞋").item.tolist() == [3]
    assert statistics.led_to(UNKNOWN, 0, text="shoes").item.tolist() == [4]


def test_neighbours_do_not_depend_on_the_order_of_a_set():
    """Sums of floats depend on their order, and that of a set of texts on the process."""
    program = """if True:
        import numpy as np
        from jaxrec.data.search_statistics import UNKNOWN, SearchStatisticsConfig, search_statistics
        rng = np.random.default_rng(0)
        texts = sorted({" ".join(rng.choice(list("abcdefghijklm"), 7)) for _ in range(60)})
        one = np.arange(len(texts))
        statistics = search_statistics(texts, one, one, one, 0 * one, SearchStatisticsConfig())
        for _ in range(60):
            statistics.led_to(UNKNOWN, 0, text=" ".join(rng.choice(list("abcdefghijklm"), 9)))
        print(sorted(statistics.kept.items()))
    """
    printed = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_long_texts_are_not_remembered():
    statistics = make(SearchStatisticsConfig(neighbours=2))
    short, long = "hot pizza", "pizza " * 1000
    for text in (short, long):
        assert statistics.led_to(UNKNOWN, 0, text=text).item.size
    assert list(statistics.kept) == [short]


def test_tables_without_searches_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"searches\.parquet.*table of searches"):
        training_searches(tmp_path, ["purchase"])
