"""Test cases of sessions, searches and prefixes; tie shuffling."""

import numpy as np
import pytest
from search_records import random_record
from text_parts import make_space

from jaxrec.config import UserError
from jaxrec.data.tables import FEEDBACK, SPLITS
from jaxrec.evaluation.cases import make_cases, prefix_cases, search_cases, shuffle_ties, text_cases, tied_fraction
from jaxrec.targets import normalised


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


def test_users_without_events_have_no_last_two_events():
    """Such as users who only search."""
    records = [single(0, [1, 2, 3], [1, 2, 2]), single(1, [], [])]
    assert tied_fraction(records) == 1
    assert tied_fraction(records[1:]) == 0


def test_baskets_tie_by_nature():
    assert tied_fraction([single(0, [1, 2], [1, 1]), SHOPPER]) == 0


# ---- searches and prefixes -------------------------------------------------------------------------------------------


def search_oracle(records, targets, split):
    """(user, query, moment, truths, the events before, the searches before) of every search that led to a target."""
    found = []
    for record in records:
        fields = ("item", "behavior", "timestamp", "session", "split", "search")
        events = list(zip(*(record[f].tolist() for f in fields), strict=True))
        fields = ("query", "timestamp", "session", "split")
        searches = list(zip(*(record[f"search_{f}"].tolist() for f in fields), strict=True))
        for place, (query, moment, session, of) in enumerate(searches):
            led = {i for i, b, _, _, s, search in events if search == place and b in targets and s == split}
            if of != split or not led:
                continue
            known = [t < moment or (t == moment and other < session) for _, t, other, _ in searches] + [True]
            before = sorted(
                (i, b, t)
                for i, b, t, other, _, search in events
                if t < moment or (t == moment and other < session and known[search])
            )
            had = {i for i, b, _ in before if b in targets}
            earlier = sorted((q, t) for (q, t, _, _), there in zip(searches, known[:-1], strict=True) if there)
            mine = [(i, b) for i, b, _, _, s, search in events if search == place and b in targets and s == split]
            strongest = [max(b for i, b in mine if i == item) for item in sorted(led)]
            found.append((record["user"], query, moment, sorted(led), sorted(led - had), strongest, before, earlier))
    return found


def held(history):
    events = sorted(zip(*(history[f].tolist() for f in ("item", "behavior", "timestamp")), strict=True))
    return events, sorted(zip(history["search_query"].tolist(), history["search_timestamp"].tolist(), strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_cases_of_searches_by_loops(split):
    records = [random_record(seed) for seed in range(60)]
    cases = search_cases(records, (1, 2), split)
    expected = search_oracle(records, (1, 2), SPLITS.index(split))
    assert len(cases) == len(expected) > 10 and cases.cold == 0
    for row, (user, query, moment, truths, new, behavior, before, earlier) in enumerate(expected):
        history = cases.histories[row]
        assert cases.behavior[row][cases.where[row]].tolist() == behavior
        assert (cases.users[row], history["user"], history["query"], history["now"]) == (user, user, query, moment)
        assert cases.targets[row][cases.where[row]].tolist() == truths
        assert cases.targets[row][cases.new[row]].tolist() == new
        assert held(history) == (before, earlier)
        assert not {"split", "search_split", "suggestion_split"} & set(history)


@pytest.mark.parametrize("split", SPLITS)
def test_cases_of_prefixes_by_loops(split):
    records = [random_record(seed) for seed in range(60)]
    cases, place, expected = prefix_cases(records, split), SPLITS.index(split), []
    names = ("prefix", "query", "feedback", "timestamp", "session", "split")
    for record in records:
        typed = {}
        for prefix, query, feedback, time, session, of in zip(
            *(record[f"suggestion_{name}"].tolist() for name in names), strict=True
        ):
            if of == place and FEEDBACK[feedback] in ("order", "item_click", "click"):
                chosen = typed.setdefault((time, session, prefix), {})
                chosen[query] = min(feedback, chosen.get(query, 9))
        expected += [(record, *key, typed[key]) for key in sorted(typed)]
    assert len(cases) == len(expected) > 10
    for row, (record, moment, session, prefix, chosen) in enumerate(expected):
        history = cases.histories[row]
        assert (history["user"], history["prefix"], history["now"]) == (record["user"], prefix, moment)
        assert cases.targets[row][cases.where[row]].tolist() == sorted(chosen)
        assert cases.feedback[row][cases.where[row]].tolist() == [chosen[query] for query in sorted(chosen)]
        before = record["search_timestamp"] < moment
        known = set(record["search_query"][before].tolist())
        assert cases.targets[row][cases.new[row]].tolist() == sorted(set(chosen) - known)
        assert sorted(history["search_query"].tolist()) == sorted(record["search_query"][before].tolist())
        assert sorted(history["item"].tolist()) == sorted(record["item"][record["timestamp"] < moment].tolist())
        seen = (record["suggestion_timestamp"] < moment) & (record["suggestion_session"] < session)
        assert history["suggestion_query"].tolist() == record["suggestion_query"][seen].tolist()
    taken = cases.take([3, 1])
    np.testing.assert_array_equal(taken.feedback, cases.feedback[[3, 1]])


def test_no_case_holds_anything_from_its_question_on():
    """Nothing later, and no feedback on the suggestions of the question's own session, whatever their time."""
    records = [random_record(seed) for seed in range(60)]
    for history in prefix_cases(records).histories:
        for name in ("timestamp", "search_timestamp", "suggestion_timestamp"):
            assert (history[name] < history["now"]).all()
    for history in search_cases(records, (1, 2)).histories:
        assert all((history[name] <= history["now"]).all() for name in ("timestamp", "search_timestamp"))
        assert (history["suggestion_timestamp"] < history["now"]).all()
    session = {**random_record(3)}
    session["suggestion_session"] = np.zeros_like(session["suggestion_session"])
    assert all(not len(history["suggestion_query"]) for history in prefix_cases([session], "train").histories)


def test_the_time_of_a_question_is_hidden_where_the_record_hides_it():
    records = [{**random_record(seed), "answer_time": False} for seed in range(60)]
    for cases in (search_cases(records, (1, 2)), prefix_cases(records)):
        for history in cases.histories:
            times = [*history["timestamp"].tolist(), *history["search_timestamp"].tolist()]
            assert history["now"] == max(times, default=0)
    assert any(not len(history["item"]) for history in search_cases(records, (1, 2), "train").histories)


def test_a_case_of_a_session_holds_the_searches_of_earlier_sessions():
    records = [random_record(seed) for seed in range(40)]
    cases = make_cases(records, (1, 2), "valid")
    by_user = {record["user"]: record for record in records}
    for user, history in zip(cases.users.tolist(), cases.histories, strict=True):
        record = by_user[user]
        asked = (record["split"] == 1) & (record["behavior"] > 0)
        earlier = record["search_session"] < record["session"][asked][0]
        earlier &= record["search_timestamp"] < history["now"]
        assert history["search_query"].tolist() == record["search_query"][earlier].tolist()
    assert len(cases) > 10


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("told", [True, False])
def test_cases_of_sessions_that_overlap_by_loops(split, told):
    """A session's question is at its first event; of earlier sessions, its history holds what had happened by then."""
    records = [{**random_record(seed), "answer_time": told} for seed in range(60)]
    cases, place, cold, expected = make_cases(records, (1, 2), split), SPLITS.index(split), 0, []
    names = ("item", "behavior", "timestamp", "session", "split")
    for record in records:
        events = list(zip(*(record[name].tolist() for name in names), strict=True))
        sessions = [s for _, b, _, s, of in events if of == place and b in (1, 2)]
        if not sessions:
            continue
        truths = {i for i, b, _, _, of in events if of == place and b in (1, 2)}
        moment = min(t for _, _, t, s, _ in events if s == sessions[0])
        before = [(i, b, t, s) for i, b, t, s, _ in events if s < sessions[0] and t <= moment]
        had = {i for i, b, _, _ in before if b in (1, 2)}
        cold += not before
        if before:
            now = moment if told else max(t for _, _, t, _ in before)
            expected.append((record, sessions[0], moment, now, sorted(truths), sorted(truths - had), before))
    assert len(cases) == len(expected) and cases.cold == cold and len(expected) > (10 if place else -1)
    for row, (record, session, moment, now, truths, new, before) in enumerate(expected):
        history = cases.histories[row]
        assert (cases.users[row], history["now"]) == (record["user"], now)
        assert cases.targets[row][cases.where[row]].tolist() == truths
        assert cases.targets[row][cases.new[row]].tolist() == new
        assert list(zip(*(history[name].tolist() for name in names[:4]), strict=True)) == before
        for log in ("search", "suggestion"):
            known = (record[f"{log}_session"] < session) & (record[f"{log}_timestamp"] < moment)
            assert history[f"{log}_query"].tolist() == record[f"{log}_query"][known].tolist()


def test_data_without_searches_has_no_cases_of_searches():
    with pytest.raises(UserError, match="the records hold no searches; use data with a table of searches"):
        search_cases([SHOPPER], (1,))
    with pytest.raises(UserError, match="the records hold no suggestions"):
        prefix_cases([SHOPPER])
    assert len(search_cases([], (1,))) == len(prefix_cases([])) == 0


def searched(record):
    """Every event of the record was searched for in its own session, item i by query 10 + i; the last search led to
    nothing."""
    named = {name: np.append(record[name], record[name][-1:]) for name in ("timestamp", "session", "split")}
    queries = {"search_query": np.append(10 + record["item"], 0).astype(np.int32)}
    place = np.arange(len(record["item"]), dtype=np.int32)
    return record | queries | {f"search_{name}": values for name, values in named.items()} | {"search": place}


def test_a_shuffled_event_keeps_the_search_that_led_to_it():
    before = searched(single(3, list(range(8)), [1, 2, *[5] * 6]))
    for seed in range(5):
        after = shuffle_ties(before, seed)
        assert after["item"].tolist() != before["item"].tolist()
        np.testing.assert_array_equal(after["search_query"][after["search"]], 10 + after["item"])
        for field in ("timestamp", "session", "split"):  # the search is of the session where the event is now
            np.testing.assert_array_equal(after[f"search_{field}"][after["search"]], after[field])
        assert sorted(after["search_query"]) == sorted(before["search_query"]) and (after["search"] >= 0).all()
        (case,) = search_cases([after], (0,)).histories
        cases = search_cases([after], (0,))
        assert case["query"] == 10 + after["item"][-1] and cases.targets.tolist() == [[after["item"][-1]]]
        assert case["item"].tolist() == after["item"][:-1].tolist()
        np.testing.assert_array_equal(case["search_query"], 10 + after["item"][:-1])


def test_a_search_moves_with_the_first_event_that_it_led_to_in_its_session():
    before = searched(single(3, list(range(6)), [5] * 6))
    before["search"][:] = [0, -1, 0, 3, 2, 5]  # those of events 2 and 4 are not of their own session
    for seed in range(5):
        after = shuffle_ties(before, seed)
        item, queries = after["item"].tolist(), after["search_query"].tolist()
        links = [10 + before["search"][i] if before["search"][i] >= 0 else -1 for i in item]
        assert [queries[place] if place >= 0 else -1 for place in after["search"]] == links
        session = dict(zip(queries, after["search_session"].tolist(), strict=True))
        moved = {10 + i: item.index(i) for i in (0, 3, 5)}  # sessions are the positions
        assert session == {11: 1, 12: 2, 14: 4, 0: 5} | moved
        assert after["search_session"].tolist() == sorted(after["search_session"].tolist())


def test_ties_of_records_without_searches_and_of_other_searches_stay():
    none = {**searched(single(3, [1, 2, 3], [5] * 3)), "search": np.full(3, -1, np.int32)}
    assert shuffle_ties(none, 0)["search"].tolist() == [-1] * 3
    for field in ("search_query", "search_session", "search_split"):
        np.testing.assert_array_equal(shuffle_ties(none, 0)[field], none[field])
    empty = random_record(0) | {name: np.zeros(0, int) for name in none if name.startswith("search_")}
    empty["search"] = np.full(len(empty["item"]), -1, np.int32)
    assert len(shuffle_ties(empty, 0)["search_query"]) == 0


WRITINGS = np.array(["Ab", "ab ", "bb", "B  b", "a", "A", "ba", "BA", "aB", "b"], object)
"""Queries, some of which are the same text."""


def test_cases_of_texts_by_loops():
    """Writings of one text are one truth, with the stronger feedback; it is new unless any writing was searched for."""
    records = [random_record(seed) for seed in range(60)]
    for record in records:  # one prefix a session, for which several queries were chosen
        record["suggestion_timestamp"] = 10 * record["suggestion_session"].astype(np.int64)
        record["suggestion_prefix"] = record["suggestion_session"]
    prefixes = np.array([f"p{row}" for row in range(20)], object)
    cases, space = prefix_cases(records, "train"), make_space(["ab", "b b"])
    found = text_cases(cases, space, WRITINGS, prefixes)
    merged = 0
    for row, history in enumerate(cases.histories):
        levels, where = {}, cases.where[row]
        for query, level in zip(cases.targets[row][where].tolist(), cases.feedback[row][where].tolist(), strict=True):
            text = normalised(WRITINGS[query])
            merged += text in levels
            levels[text] = min(level, levels.get(text, 9))
        searched = {normalised(WRITINGS[query]) for query in history["search_query"].tolist()}
        keep = found.where[row]
        texts = [normalised(text) for text in space.show(found.targets[row][keep])]
        assert dict(zip(texts, found.feedback[row][keep].tolist(), strict=True)) == levels
        assert found.new[row][keep].tolist() == [text not in searched for text in texts]
        assert (found.feedback[row][~keep] == -1).all() and not found.new[row][~keep].any()
        assert found.histories[row]["prefix"] == f"p{history['prefix']}"
        assert found.histories[row]["search_query"].tolist() == WRITINGS[history["search_query"]].tolist()
    assert merged > 3 and len(found) == len(cases) > 10
    assert text_cases(prefix_cases([]), space, WRITINGS, prefixes).targets.shape == (0, 1)
