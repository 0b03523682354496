"""Item sequences by hand, and windows against a plain count."""

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.item_sequences import NOBODY, ItemSequenceConfig, following, overlapping_windows, whole

WANTED = np.array([False, True])
# Item 9 was seen and not taken; 3 and 4 are of one basket.
RECORD = {
    "item": np.array([1, 9, 2, 3, 4, 5], np.int32),
    "behavior": np.array([1, 0, 1, 1, 1, 1], np.int8),
    "session": np.array([0, 0, 1, 2, 2, 3], np.int32),
    "user": 7,
}


def test_a_cut_holds_the_last_items_before_a_session():
    found = ItemSequenceConfig((2, 8)).cut(RECORD, 2, behaviors=2, wanted=WANTED)
    assert found["item"].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert found["mask"].tolist() == [True, True] + 6 * [False]
    assert found["user"] == 7
    short = ItemSequenceConfig((2,)).cut(RECORD, 3, behaviors=2, wanted=WANTED)
    assert short["item"].tolist() == [3, 4]
    without = {name: value for name, value in RECORD.items() if name != "user"}
    assert ItemSequenceConfig((2,)).cut(without, 3, behaviors=2, wanted=WANTED)["user"] == NOBODY


def test_following_items_are_ranked_by_session():
    found = following(RECORD, 2, 4, wanted=WANTED)
    assert found["target"].tolist() == [3, 4, 5, 0]
    assert found["target_rank"].tolist() == [0, 0, 1, -1]


def test_a_whole_sequence_has_every_later_item_as_target():
    found = whole(RECORD, 5, ItemSequenceConfig((2, 4)), wanted=WANTED)
    assert found["item"].tolist() == [1, 2, 3, 4]
    assert found["target"].tolist() == [2, 3, 4, 5]
    assert found["before"].tolist() == [1, 2, 2, 4]  # those of one basket don't see each other
    assert found["target_rank"].tolist() == [0, 0, 0, 0]


def test_items_of_the_first_basket_are_no_targets():
    basket = {**RECORD, "session": np.array([0, 0, 0, 1, 1, 1], np.int32)}
    found = whole(basket, 5, ItemSequenceConfig((4,)), wanted=WANTED)
    assert found["target_rank"].tolist() == [-1, 0, 0, 0]
    assert found["before"].tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("size", [1, 4, 5])
def test_windows_have_every_target_once_behind_enough_items(size):
    counts, config = np.array([0, 1, 2, 5, 6, 7, 23]), ItemSequenceConfig((size,))
    targets = {row: [] for row in range(len(counts))}
    for row, end in overlapping_windows(counts, config):
        items = np.arange(counts[row], dtype=np.int32)
        record = {"item": items, "behavior": np.ones_like(items), "session": items}
        found = whole(record, int(end), config, wanted=WANTED)
        real = found["target_rank"] == 0
        targets[row] += found["target"][real].tolist()
        first = found["item"][0]
        assert (found["before"][real] + first == found["target"][real]).all()
        assert (found["before"][real] >= np.minimum(found["target"][real], (size + 1) // 2)).all()
    assert all(targets[row] == list(range(1, count)) for row, count in enumerate(counts))


def test_buckets_must_rise():
    with pytest.raises(UserError, match=r"features.buckets' is \(4, 2\); give rising lengths"):
        ItemSequenceConfig((4, 2))
