"""Contexts and targets cut from a record: a small one by hand, and any against a plain loop."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.data.features import AGES, FeatureConfig, asked_at, bucket_of, cut, targets

DAY = 86_400
CLICK, BUY = 0, 1
WANTED = np.array([False, True])
SMALL = FeatureConfig(history_lengths=(3, 4), past_length=3, targets=2, buckets=(2, 4))

# (item, behavior, day, session)
EVENTS = [
    (7, CLICK, 0, 0), (7, BUY, 0, 0), (5, BUY, 0, 0),
    (5, BUY, 3, 1),
    (9, CLICK, 4, 2), (8, CLICK, 4, 2), (6, CLICK, 4, 2), (7, BUY, 4, 2),
    (4, CLICK, 7, 3), (3, BUY, 7, 3), (5, BUY, 7, 3), (2, BUY, 7, 3), (3, BUY, 7, 3),
]  # fmt: skip


def record_of(events) -> dict:
    item, behavior, day, session = (np.array(column) for column in zip(*events, strict=True)) if events else [[]] * 4
    return {
        "item": np.asarray(item, np.int32),
        "behavior": np.asarray(behavior, np.int8),
        "timestamp": np.asarray(day, np.int64) * DAY + 1_700_000_000,
        "session": np.asarray(session, np.int32),
    }


RECORD = record_of(EVENTS)


def small_cut(session: int, record: dict = RECORD, config: FeatureConfig = SMALL) -> dict:
    return cut(record, session, config, behaviors=2, wanted=WANTED)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_histories_by_hand():
    arrays = small_cut(3)
    # Three of the four clicks, in order; four days and more ago is bucket floor(2 log2(1 + days)).
    assert arrays["history_0_item"].tolist() == [9, 8, 6]
    assert arrays["history_0_age"].tolist() == [4, 4, 4]
    assert arrays["history_1_item"].tolist() == [7, 5, 5, 7]
    assert arrays["history_1_age"].tolist() == [6, 6, 4, 4]
    assert arrays["history_0_mask"].all() and arrays["history_1_mask"].all()


def test_without_the_answers_time_a_cut_is_the_same_whenever_the_answer_comes():
    hidden = {**RECORD, "answer_time": False}
    late = {**hidden, "timestamp": RECORD["timestamp"] + np.where(RECORD["session"] == 3, 90 * DAY, 0)}
    assert same(small_cut(3, hidden), small_cut(3, late))
    told, late = {**hidden, "answer_time": True}, {**late, "answer_time": True}
    assert same(small_cut(3, told), small_cut(3)) and not same(small_cut(3, told), small_cut(3, late))
    # As if asked at the last event before, four days after the first one.
    assert small_cut(3, hidden)["history_1_age"].tolist() == [4, 4, 2, 0]
    assert small_cut(3, hidden)["day"] == small_cut(2)["day"]


def test_when_a_cut_is_asked_for_by_hand():
    first = int(RECORD["timestamp"][0])
    assert [asked_at(RECORD, stop) - first for stop in (0, 3, 8)] == [0, 3 * DAY, 7 * DAY]
    hidden = {**RECORD, "answer_time": False}
    assert [asked_at(hidden, stop) - first for stop in (0, 3, 8)] == [0, 0, 4 * DAY]
    # What comes after a whole history is asked for now, or when the last event was.
    assert asked_at({**RECORD, "now": 5}, len(EVENTS)) == 5
    assert asked_at(RECORD, len(EVENTS)) == RECORD["timestamp"][-1]
    assert asked_at({**record_of([]), "now": 5}, 0) == 5 and asked_at(record_of([]), 0) == 0


def test_padding_is_at_the_end_and_masked():
    arrays = small_cut(1)
    assert arrays["history_0_item"].tolist() == [7, 0]
    assert arrays["history_0_mask"].tolist() == [True, False]
    assert arrays["history_1_mask"].tolist() == [True, True]
    assert arrays["past_item"].tolist() == [5, 7]
    assert {value.dtype.name for name, value in arrays.items() if name.endswith(("item", "age"))} == {"int32"}
    assert {arrays[name].dtype.name for name in ("habit", "user")} == {"float32"}


def test_the_past_holds_each_item_once_the_most_recent_first():
    arrays = small_cut(3)
    assert arrays["past_item"].tolist() == [7, 5, 0]
    assert arrays["past_age"].tolist() == [4, 4, 0]
    assert arrays["past_mask"].tolist() == [True, True, False]
    # Bought in one session, the later event is the more recent.
    assert small_cut(4)["past_item"].tolist() == [3, 2, 5]


def test_habits_by_hand():
    """log of the count; log1p of days and of sessions since the last time; times per session since the first."""
    seven = [math.log(2), math.log1p(3), math.log1p(1), 2 / 3]
    five = [math.log(2), math.log1p(4), math.log1p(2), 2 / 3]
    np.testing.assert_allclose(small_cut(3)["habit"], [seven, five, [0] * 4], rtol=1e-6)


def test_what_is_known_of_the_user_by_hand():
    """log1p of the visits, of the distinct items, the share of repeats, log1p of the days since the last visit."""
    expected = [math.log1p(3), math.log1p(2), 1 - 2 / 4, math.log1p(3)]
    np.testing.assert_allclose(small_cut(3)["user"], expected, rtol=1e-6)


def test_the_day_of_the_session():
    """Counted from 1970; past the last event it is the day of `now`."""
    first = 1_700_000_000 // DAY
    assert [int(small_cut(session)["day"]) for session in range(5)] == [
        first,
        first + 3,
        first + 4,
        first + 7,
        first + 7,
    ]
    assert small_cut(4, {**RECORD, "now": 86_400 * 20_000 + 5})["day"] == 20_000


def test_an_empty_history():
    for record, session in ((RECORD, 0), ({**record_of([]), "now": 1_700_000_000}, 0), (record_of([]), 3)):
        arrays = small_cut(session, record)
        assert not any(arrays[name].any() for name in arrays if name not in ("user", "day"))
        assert np.isfinite(arrays["user"]).all()
        assert arrays["past_item"].shape == (2,)


def test_a_later_moment_ages_everything():
    """Past the last event there is no next session: `now` says when it is asked, else the last event does."""
    at_once, later = small_cut(4), small_cut(4, {**RECORD, "now": RECORD["timestamp"][-1] + 9 * DAY})
    np.testing.assert_allclose(at_once["habit"][0], [math.log(2), 0, math.log1p(1), 2], rtol=1e-6)
    np.testing.assert_allclose(later["habit"][0], [math.log(2), math.log1p(9), math.log1p(1), 2], rtol=1e-6)
    assert (later["past_age"] == np.array([6, 6, 6])).all()
    assert later["past_item"].tolist() == at_once["past_item"].tolist()
    # Inside the record the next session's time counts.
    assert same(small_cut(3, {**RECORD, "now": 0}), small_cut(3))


def test_a_clock_that_runs_backwards_and_an_age_beyond_the_last_bucket():
    early, late = small_cut(4, {**RECORD, "now": 0}), small_cut(4, {**RECORD, "now": 10**12})
    assert not early["past_age"].any()
    assert not early["habit"][:, 1].any()
    assert (late["past_age"] == AGES - 1).all()


def test_targets_by_hand():
    def of(session, record=RECORD, **changes):
        config = FeatureConfig(targets=3, **changes)
        return targets(record, session, config, wanted=WANTED, rng=np.random.default_rng(0))

    assert of(0)["target"].tolist() == [5, 7, 0]
    assert of(0)["target_where"].tolist() == [True, True, False]
    assert of(1)["target"].tolist() == [5, 0, 0]
    assert of(3)["target"].tolist() == [2, 3, 5]  # 3 was bought twice, 4 only clicked
    assert of(1, target_sessions=2)["target"].tolist() == [5, 7, 0]
    assert not of(4)["target_where"].any()
    assert of(0)["target"].dtype == np.int32


def test_too_many_targets_are_thinned_out_by_the_given_chance():
    record = record_of([(item, BUY, 0, 0) for item in range(20)])
    config = FeatureConfig(targets=4)
    drawn = [targets(record, 0, config, wanted=WANTED, rng=np.random.default_rng(seed))["target"] for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert all(len(set(each.tolist())) == 4 for each in drawn)


@pytest.mark.parametrize(
    ("session", "expected"),
    [(0, 2), (1, 2), (2, 4), (3, 4), (4, 4)],  # most of one behavior before: 0, 2, 3, 4, then 8, of which 4 are read
)
def test_buckets_by_hand(session, expected):
    assert bucket_of(RECORD, session, SMALL) == expected


def test_the_largest_bucket_is_the_limit():
    config = FeatureConfig(history_lengths=(100,), past_length=100, buckets=(2,))
    arrays = small_cut(4, config=config)
    assert bucket_of(RECORD, 4, config) == 2
    assert arrays["history_1_item"].tolist() == [2, 3]
    assert arrays["past_item"].tolist() == [3, 2]


# ---- any record ------------------------------------------------------------------------------------------------------


@st.composite
def records(draw) -> dict:
    gaps = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 40)), max_size=7))
    events, day = [], 0
    for session, (size, gap) in enumerate(gaps):
        day += gap
        events += [(draw(st.integers(0, 5)), draw(st.integers(0, 2)), day, session) for _ in range(size)]
    return record_of(events)


CONFIGS = st.builds(
    FeatureConfig,
    history_lengths=st.sampled_from([(2,), (3, 1), (9, 4, 2)]),
    past_length=st.integers(1, 5),
    buckets=st.sampled_from([(1,), (2, 4), (3, 9)]),
)


def by_loop(record: dict, session: int, config: FeatureConfig, wanted: list[bool]) -> dict:
    """What `cut` should give, as lists without padding, told event by event."""
    names = ("item", "behavior", "timestamp", "session")
    events = list(zip(*(record[name].tolist() for name in names), strict=True))
    before = [event for event in events if event[3] < session]
    after = [event for event in events if event[3] >= session]
    now = after[0][2] if after else before[-1][2] if before else 0
    here = after[0][3] if after else before[-1][3] + 1 if before else 0
    read = {b: [e for e in before if e[1] == b][-config.length(b) :] for b in range(3)}
    longest = max(map(len, read.values()))
    size = min([bucket for bucket in config.buckets if bucket >= longest], default=config.buckets[-1])
    out = {f"history_{b}_item": [e[0] for e in read[b]][-min(size, config.length(b)) :] for b in range(3)}
    taken = [event for event in before if wanted[event[1]]]
    past = list(dict.fromkeys(event[0] for event in reversed(taken)))
    habit = []
    for item in past:
        mine = [event for event in taken if event[0] == item]
        days, since = (now - mine[-1][2]) / DAY, here - mine[-1][3]
        habit.append([math.log(len(mine)), math.log1p(days), math.log1p(since), len(mine) / (here - mine[0][3])])
    limit = min(size, config.past_length)
    user = [
        math.log1p(len({event[3] for event in taken})),
        math.log1p(len(past)),
        1 - len(past) / max(len(taken), 1),
        math.log1p((now - taken[-1][2]) / DAY if taken else 0),
    ]
    return out | {"past_item": past[:limit], "habit": habit[:limit], "user": user, "size": size}


@settings(max_examples=150, deadline=None)
@given(records(), st.integers(0, 8), CONFIGS, st.sampled_from([[False, False, True], [True, False, True]]))
def test_any_cut_against_a_loop(record, session, config, wanted):
    arrays = cut(record, session, config, behaviors=3, wanted=np.array(wanted))
    expected = by_loop(record, session, config, wanted)
    assert bucket_of(record, session, config) == expected["size"]
    for name in ("history_0", "history_1", "history_2", "past"):
        items = expected[f"{name}_item"]
        assert arrays[f"{name}_mask"].sum() == len(items)
        assert arrays[f"{name}_item"].tolist() == items + [0] * (len(arrays[f"{name}_mask"]) - len(items))
    np.testing.assert_allclose(
        arrays["habit"][: len(expected["habit"])], np.reshape(expected["habit"], (-1, 4)), rtol=1e-5
    )
    assert not arrays["habit"][len(expected["habit"]) :].any()
    np.testing.assert_allclose(arrays["user"], expected["user"], rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(records(), st.integers(0, 8), CONFIGS, st.randoms(use_true_random=False))
def test_nothing_of_the_cut_session_leaks(record, session, config, chance):
    """What happens from the session on changes nothing but the moment that it begins."""
    stop = int(np.searchsorted(record["session"], session))
    other = {name: value.copy() for name, value in record.items()}
    for place in range(stop, len(other["item"])):
        other["item"][place], other["behavior"][place] = chance.randrange(6), chance.randrange(3)
        other["timestamp"][place] += DAY * 9 if place > stop else 0
    wanted = np.array([False, True, True])
    left, right = (cut(each, session, config, behaviors=3, wanted=wanted) for each in (record, other))
    assert same(left, right)


@settings(max_examples=60, deadline=None)
@given(records(), st.integers(0, 8), CONFIGS)
def test_serving_sees_what_training_saw(record, session, config):
    """The history alone, with the moment as `now`, gives the arrays that the longer record gave."""
    stop = int(np.searchsorted(record["session"], session))
    if stop == len(record["session"]):
        return
    history = {name: value[:stop] for name, value in record.items()} | {"now": record["timestamp"][stop]}
    wanted = np.array([False, False, True])
    trained = cut(record, session, config, behaviors=3, wanted=wanted)
    assert same(trained, cut(history, session, config, behaviors=3, wanted=wanted))


def test_a_length_of_zero_is_refused():
    with pytest.raises(UserError, match=r"features.history_lengths.*\(5, 0\)"):
        FeatureConfig(history_lengths=(5, 0))
