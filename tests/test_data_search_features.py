import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.item_neighbours import NeighbourConfig, item_neighbours
from jaxrec.data.search_features import HABITS, SearchFeatureConfig
from jaxrec.data.search_statistics import LedTo
from jaxrec.models.user_ids import user_ids

DAY = 86_400
WANTED = np.array([False, True])
CONFIG = SearchFeatureConfig((2, 4), 2, 2, 2, 3, 4, 3, 2, short_items=2, weakest=0)


def led_to(*items):
    share = np.arange(len(items), 0, -1, dtype=np.float32)
    return LedTo(np.array(items, np.int32), share / share.sum(), np.ones(len(items), np.float32) / len(items), 20.0)


def record(**more):
    history = {
        "item": np.array([1, 2, 1, 9, 3, 1], np.int32), "behavior": np.array([1, 1, 1, 1, 0, 1], np.int8),
        "timestamp": np.array([0, 0, 10, 10, 20, 30]) * DAY, "session": np.array([0, 0, 1, 1, 2, 3], np.int32),
        "now": 40 * DAY, "user": 3,
    }  # fmt: skip
    read = {
        "tokens": np.array([5, 6, 7, 8, 9]),
        "query_codes": np.array([1, 2]),
        "recent_codes": np.array([[0, 1]] * 3),
    }
    return {**history, **read, "led_to": led_to(2, 4, 1), "same": np.zeros(6, bool), **more}


def cut(history, config=CONFIG):
    return config.cut(history, 4, behaviors=2, wanted=WANTED)


def test_sequences_are_the_last_ones_with_padding_behind():
    found = cut(record())
    assert found["tokens"].tolist() == [5, 6, 7, 8]  # of a longer query the first tokens
    assert found["recent_codes"].tolist() == [[0, 1], [0, 1]]
    assert found["recent_item"].tolist() == [3, 1]
    assert found["short_item"].tolist() == [3, 1] and found["long_item"].tolist() == [1, 9, 1]
    assert found["click_item"].tolist() == [1, 9, 3, 1] and found["order_item"].tolist() == [2, 1, 9, 1]
    assert found["related_item"].tolist() == [1, 2, 1, 1]
    assert found["who"] == 3


def test_candidates_are_the_relevant_past_and_then_what_the_query_led_to():
    found = cut(record())
    assert found["candidate"].tolist() == [1, 2, 4, -1, -1]
    assert found["habits"].shape == (5, HABITS)
    first = dict(enumerate(found["habits"][0]))
    # Item 1: three times, ten days ago, in the last of three relevant searches; a sixth of the query's searches.
    expected = [np.log(3 + 1 / 6 + 1e-4), 1, np.log1p(3), np.log1p(10), 0, 1, 3 / 4]
    np.testing.assert_allclose([first[at] for at in range(7)], expected, rtol=1e-5)
    late = np.exp(-np.array([40, 30, 10]) / 30).sum()
    np.testing.assert_allclose(first[7], np.log1p(late), rtol=1e-5)
    np.testing.assert_allclose([first[8], first[9]], np.log([1 / 6 + 1e-4, 1 / 3 + 1e-4]), rtol=1e-5)
    popular = found["habits"][2]
    np.testing.assert_allclose(popular[:8], [np.log(1 / 3 + 1e-4), *[0] * 7], rtol=1e-5)
    assert not found["habits"][3:].any()
    np.testing.assert_allclose(found["user"], np.log1p([5, 4, 2, 20]), rtol=1e-5)


def test_what_a_search_for_the_same_query_led_to_is_relevant():
    same = np.array([False, False, False, False, True, False])
    found = cut(record(same=same))
    assert found["candidate"].tolist() == [1, 2, 3, 4, -1]
    assert np.exp(found["habits"][2, 11]) - 1 == pytest.approx(1)  # clicked, not ordered
    assert found["related_item"].tolist() == [2, 1, 3, 1]


def test_candidates_begin_in_the_order_of_personal_frequency_then_popularity():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        items, count = rng.permutation(50).astype(np.int32), rng.integers(1, 30)
        events = rng.choice(items, count)
        history = record(
            **{"item": events, "behavior": np.ones(count, np.int8), "timestamp": np.sort(rng.integers(0, 99, count))},
            **{"session": np.arange(count), "same": np.ones(count, bool), "led_to": led_to(*items)},
        )
        found = cut(history, SearchFeatureConfig(levels=2, related=50, popular=50))
        there = found["candidate"] >= 0
        times = {item: (events == item).sum() for item in items}
        place = {item: at for at, item in enumerate(items)}
        expected = sorted(items, key=lambda item: (-times[item], place[item]))
        order = found["candidate"][there][np.argsort(-found["habits"][there, 0], kind="stable")]
        assert order.tolist() == expected


def test_somebody_new_has_what_the_query_led_to_as_default_sequences():
    """The most taken one last, where the weights of a user ID are largest (OneSearch §3.2.1)."""
    nothing = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}
    found = cut({**nothing, "led_to": led_to(2, 4, 1, 7)})
    assert found["short_item"].tolist() == [4, 2] and found["long_item"].tolist() == [1, 4, 2]
    assert found["candidate"].tolist() == [2, 4, -1, -1, -1] and found["recent_item"].tolist() == [-1, -1]
    assert cut(nothing)["short_item"].tolist() == [-1, -1]


def test_both_user_ids_differ_where_a_log_has_one_behavior():
    """The short one is of fewer items (Eq. 3)."""
    found = cut(record(behavior=np.ones(6, np.int8)), SearchFeatureConfig(levels=2))
    assert found["short_item"].shape == (10,) and found["long_item"].shape == (100,)
    items = np.arange(40, dtype=np.int32)
    one = {"item": items, "behavior": np.ones(40, np.int8), "session": items, "timestamp": items, "same": items < 0}
    found = cut(record(**one), SearchFeatureConfig(levels=2))
    codes = [found[name][None, :, None] for name in ("short_item", "long_item")]
    short, long = (int(user_ids(jnp.asarray(each), each[..., 0] >= 0)[0, 0]) for each in codes)
    assert long < short < 40


def test_the_sliding_window_cuts_the_short_sequences_alone():
    whole, none, one = cut(record()), cut(record(shown=0)), cut(record(shown=1))
    assert none["recent_item"].tolist() == [-1, -1] and one["recent_item"].tolist() == [1, -1]
    assert none["short_item"].tolist() == [4, 2] and one["short_item"].tolist() == [1, -1]  # as of somebody new
    for name in whole.keys() - {"recent_item", "short_item"}:
        np.testing.assert_array_equal(whole[name], one[name])


def test_nearness_leaves_out_what_is_taken_later_though_it_was_looked_at():
    """Both parts as by a log that ends before: item 3 was clicked, and is ordered later, after items 1 and 2."""
    users, items = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 3]), np.array([1, 2, 9, 3, 1, 3, 4, 2, 3, 3])
    whole = item_neighbours(users, items, 10, NeighbourConfig(10))
    before = ~((users == 0) & (items == 3))
    shorter = item_neighbours(users[before], items[before], 10, NeighbourConfig(10))
    more = {"led_to": led_to(3, 4, 2), "same": np.ones(6, bool)}
    found, expected = (
        cut(record(**more, neighbours=near, ahead=np.array(ahead, np.int32)))["habits"][:, 12:]
        for near, ahead in ((whole, [1, 3]), (shorter, []))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_events_are_read_in_the_order_of_time_where_sessions_overlap():
    order = np.array([5, 0, 3, 1, 4, 2])
    shuffled = {name: record()[name][order] for name in ("item", "behavior", "timestamp", "session", "same")}
    ties = {"timestamp": np.array([0, 1, 10, 11, 20, 30]) * DAY}
    straight = record(**ties)
    found = cut({**straight, **shuffled, "timestamp": ties["timestamp"][order]})
    for name, array in cut(straight).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_bucket_is_the_shortest_that_holds_the_query():
    assert [CONFIG.bucket_of({"tokens": np.zeros(n)}, 0) for n in (0, 2, 3, 9)] == [2, 2, 4, 4]
    with pytest.raises(UserError, match=r"features\.weakest"):
        SearchFeatureConfig(weakest=-1)
