"""Histories as one sequence, and the items of a session by level."""

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.leveled_sessions import LeveledSessionConfig, next_items, positives_left_out, targets

DAY = 86_400
# exposure 0, click 1, cart 2, purchase 3; levels: carts and purchases are one.
LEVELS = np.array([0, 1, 2, 2])
RECORD = {
    #        session 0          session 1       session 2
    "item": np.array([5, 6, 5, 5, 7, 8, 7, 9, 5, 4, 3, 4], np.int32),
    "behavior": np.array([0, 0, 1, 3, 1, 1, 3, 0, 0, 1, 0, 3], np.int8),
    "session": np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2], np.int32),
    "timestamp": np.array([0, 0, 0, 0, 3, 3, 3, 10, 10, 10, 10, 10], np.int64) * DAY,
}
ARGUMENTS = {"behaviors": 4, "wanted": np.array([False, False, False, True])}
CONFIG = LeveledSessionConfig(buckets=(2, 4), weakest=1, targets=4)


def level_targets(config=CONFIG, session=2, seed=0, **options):
    return targets(RECORD, session, config, level_of=LEVELS, rng=np.random.default_rng(seed), **options)


def test_an_item_stands_once_a_session_with_its_strongest_behavior():
    cut = CONFIG.cut(RECORD, 2, **ARGUMENTS)
    assert cut["mask"].tolist() == [True, True, True, False]
    assert cut["item"][:3].tolist() == [5, 8, 7]  # item 6 was only shown
    assert cut["behavior"][:3].tolist() == [3, 1, 3]
    assert cut["gap"][:3].tolist() == [0, int(2 * np.log2(4)), 0]
    assert {name: array.dtype for name, array in cut.items() if name != "mask"} == dict.fromkeys(
        ("item", "behavior", "gap"), np.dtype(np.int32)
    )


def test_an_item_that_comes_back_in_another_session_stands_twice():
    config = LeveledSessionConfig(buckets=(8,), weakest=0)
    cut = config.cut(RECORD, 3, **ARGUMENTS)
    assert cut["item"][cut["mask"]].tolist() == [6, 5, 8, 7, 9, 5, 3, 4]


def test_long_histories_keep_the_latest():
    config = LeveledSessionConfig(buckets=(2,), weakest=1)
    cut = config.cut(RECORD, 2, **ARGUMENTS)
    assert cut["item"].tolist() == [8, 7]
    assert config.bucket_of(RECORD, 2) == 2
    assert [CONFIG.bucket_of(RECORD, session) for session in (0, 1, 2, 3)] == [2, 2, 4, 4]


def test_an_empty_history():
    cut = CONFIG.cut({name: array[:0] for name, array in RECORD.items()}, 0, **ARGUMENTS)
    assert not cut["mask"].any()
    assert cut["item"].tolist() == [0, 0]


def test_targets_are_the_strongest_first_and_the_rest_is_counted():
    found = level_targets()
    assert found["target"][0] == 4  # clicked and bought: once, as bought
    assert sorted(found["target"].tolist()) == [3, 4, 5, 9]
    assert found["target_level"].tolist() == [2, 0, 0, 0]
    assert found["left_out"] == 0
    fewer = LeveledSessionConfig(targets=2)
    drawn = [level_targets(fewer, seed=seed) for seed in range(20)]
    assert all(each["target"][0] == 4 and each["left_out"] == 2 for each in drawn)
    assert {int(each["target"][1]) for each in drawn} == {3, 5, 9}
    assert level_targets(LeveledSessionConfig(targets=6))["target_level"].tolist() == [2, 0, 0, 0, -1, -1]


def test_positives_that_find_no_place_are_named():
    """Items 9, 5 and 3 were only shown, 4 was bought; in session 1, 7 was bought and 8 clicked."""
    one, two = LeveledSessionConfig(targets=1), LeveledSessionConfig(targets=2)
    for seed in range(10):
        found = level_targets(two, seed=seed, positive=0, room=4)
        assert sorted([*found["target"], *found["left_out_item"][:2]]) == [3, 4, 5, 9]
        assert found["left_out_item"][2:].tolist() == [-1, -1]
    assert level_targets(one, positive=1, room=2)["left_out_item"].tolist() == [-1, -1]
    assert level_targets(one, session=1, positive=1, room=2)["left_out_item"].tolist() == [8, -1]
    assert level_targets(one, session=1, positive=2, room=2)["left_out_item"].tolist() == [-1, -1]
    assert level_targets(one)["left_out_item"].shape == (0,)
    counts = [positives_left_out(RECORD, 2, one, LEVELS, positive) for positive in (0, 1, 2)]
    assert counts == [3, 0, 0]
    assert positives_left_out(RECORD, 1, one, LEVELS, 1) == 1
    assert positives_left_out(RECORD, 2, CONFIG, LEVELS, 0) == 0


def test_drawn_pseudo_exposures_stand_below_all_and_are_not_in_the_session():
    config = LeveledSessionConfig(targets=4, sampled=6)
    popular = np.linspace(0.1, 1, 10)  # ten items
    seen = set()
    for seed in range(20):
        found = level_targets(config, seed=seed, popular=popular)
        assert found["target_level"][:4].tolist() == [3, 1, 1, 1]
        real = found["target"][4:][found["target_level"][4:] == 0].tolist()
        assert len(set(real)) == len(real)
        assert not {3, 4, 5, 9} & set(real)
        assert set(found["target_level"][4:].tolist()) <= {-1, 0}
        seen |= set(real)
    assert seen == {0, 1, 2, 6, 7, 8}


def test_places_whose_next_item_is_a_target():
    cut = LeveledSessionConfig(buckets=(8,)).cut(RECORD, 2, **ARGUMENTS)
    count = int(cut["mask"].sum())
    everything = next_items(cut, LeveledSessionConfig(buckets=(8,), next_items=8), np.random.default_rng(0))
    assert everything["next_after"][everything["next_where"]].tolist() == list(range(count - 1))
    few = LeveledSessionConfig(buckets=(8,), next_items=2)
    drawn = [next_items(cut, few, np.random.default_rng(seed)) for seed in range(20)]
    assert all(each["next_where"].all() and each["next_after"].max() < count - 1 for each in drawn)
    assert {place for each in drawn for place in each["next_after"].tolist()} == set(range(count - 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"buckets": (4, 2)}, "buckets"), ({"targets": 0}, "targets"), ({"sampled": -1}, "sampled")],
)
def test_sizes_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UserError, match=f"features.{words}"):
        LeveledSessionConfig(**options)
