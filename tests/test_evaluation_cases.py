"""Test cases and tie shuffling."""

import numpy as np
import pytest

from jaxrec.evaluation.cases import make_cases, shuffle_ties, tied_fraction


def record(user, events):
    """events: (item, behavior, timestamp, session, split)."""
    item, behavior, timestamp, session, split = np.array(events).reshape(-1, 5).T
    return {
        "user": np.int32(user), "item": item.astype(np.int32), "behavior": behavior.astype(np.int8),
        "timestamp": timestamp, "session": session.astype(np.int32), "split": split.astype(np.int8),
    }  # fmt: skip


SHOPPER = record(4, [(1, 1, 10, 0, 0), (2, 0, 10, 0, 0), (3, 1, 20, 1, 1), (2, 1, 30, 2, 2), (1, 1, 30, 2, 2), (1, 1, 30, 2, 2), (5, 0, 30, 2, 2)])  # fmt: skip  # noqa: E501


def test_the_history_ends_before_the_target_session_and_targets_are_distinct():
    cases = make_cases([SHOPPER], target_behaviors=(1,))
    assert cases.users.tolist() == [4]
    assert cases.histories[0]["item"].tolist() == [1, 2, 3]
    assert cases.histories[0]["session"].tolist() == [0, 0, 1]
    assert cases.histories[0]["now"] == 30
    assert cases.targets[cases.where].tolist() == [1, 2]


def test_now_is_the_time_of_the_answer_only_where_the_record_tells_it():
    hidden = make_cases([{**SHOPPER, "answer_time": False}], target_behaviors=(1,))
    assert hidden.histories[0]["now"] == 20
    assert make_cases([{**SHOPPER, "answer_time": True}], target_behaviors=(1,)).histories[0]["now"] == 30


def test_an_item_is_new_unless_the_history_holds_it_under_a_target_behavior():
    cases = make_cases([SHOPPER], target_behaviors=(1,))
    assert cases.targets[cases.new].tolist() == [2]  # 2 was only seen, 1 was bought
    assert make_cases([SHOPPER], target_behaviors=(0, 1)).new.sum() == 1  # now 2 counts as had, and 5 is a target


def test_the_validation_split_never_sees_the_test_session():
    cases = make_cases([SHOPPER], target_behaviors=(1,), split="valid")
    assert cases.histories[0]["item"].tolist() == [1, 2]
    assert cases.targets[cases.where].tolist() == [3]


def test_users_without_a_target_are_left_out_and_those_without_a_history_counted():
    no_target = record(1, [(1, 1, 1, 0, 0), (2, 0, 2, 1, 2)])
    no_history = record(2, [(1, 1, 1, 0, 2)])
    cases = make_cases([no_target, no_history, SHOPPER], target_behaviors=(1,))
    assert cases.users.tolist() == [4] and cases.cold == 1


def test_no_cases_at_all():
    cases = make_cases([], target_behaviors=(1,))
    assert len(cases) == 0 and cases.targets.shape == (0, 1)


def test_take_keeps_rows_together():
    other = record(9, [(7, 1, 1, 0, 0), (8, 1, 2, 1, 2)])
    cases = make_cases([SHOPPER, other], target_behaviors=(1,)).take([1])
    assert cases.users.tolist() == [9] and cases.histories[0]["item"].tolist() == [7]
    assert cases.targets[cases.where].tolist() == [8]


def single(user, items, times):
    last = len(items) - 1
    return record(user, [(item, 0, time, row, max(0, row - last + 2)) for row, (item, time) in enumerate(zip(items, times, strict=True))])  # noqa: E501  # fmt: skip


def test_only_events_of_equal_timestamp_change_places():
    before = single(3, [1, 2, 3, 4, 5, 6], [10, 20, 20, 20, 30, 30])
    orders = set()
    for seed in range(40):
        after = shuffle_ties(before, seed)
        items = after["item"].tolist()
        assert items[0] == 1 and sorted(items[1:4]) == [2, 3, 4] and sorted(items[4:]) == [5, 6]
        for field in ("timestamp", "session", "split"):
            np.testing.assert_array_equal(after[field], before[field])
        orders.add(tuple(items))
    assert len(orders) > 6
    assert before["item"].tolist() == [1, 2, 3, 4, 5, 6]


def test_shuffling_depends_on_the_seed_and_the_user_only():
    before = single(3, list(range(9)), [1] * 9)
    np.testing.assert_array_equal(shuffle_ties(before, 1)["item"], shuffle_ties(before, 1)["item"])
    assert shuffle_ties(before, 1)["item"].tolist() != shuffle_ties({**before, "user": np.int32(4)}, 1)["item"].tolist()


def test_behavior_moves_with_its_item():
    before = single(3, list(range(8)), [5] * 8)
    before["behavior"] = np.arange(8, dtype=np.int8)
    after = shuffle_ties(before, 0)
    np.testing.assert_array_equal(after["item"], after["behavior"])


def test_tied_fraction_counts_users_whose_last_two_events_tie():
    records = [single(0, [1, 2, 3], [1, 2, 2]), single(1, [1, 2, 3], [1, 1, 2]), single(2, [1], [4])]
    assert tied_fraction(records) == pytest.approx(1 / 3)
    assert tied_fraction([]) == 0


def test_baskets_tie_by_nature():
    assert tied_fraction([single(0, [1, 2], [1, 1]), SHOPPER]) == 0
