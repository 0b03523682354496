"""Baselines, metrics and subsets of suggestions, on logs that are counted by hand."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_parts import make_space

from jaxrec.data.completions import completions_of
from jaxrec.data.popularity import DAY
from jaxrec.data.tables import FEEDBACK
from jaxrec.evaluation.cases import Cases
from jaxrec.evaluation.comparison import comparison_tables, evaluate, grouped, standings
from jaxrec.evaluation.subsets import item_subsets
from jaxrec.evaluation.suggestion_baselines import NumberedCompletions, day_of, suggestion_baselines
from jaxrec.evaluation.suggestion_metrics import suggestion_metrics
from jaxrec.evaluation.suggestion_subsets import known_queries, prefix_counts, suggestion_subsets

LOG = [  # user, session, day, query
    (0, 0, 0, "red shoes"), (0, 0, 0.1, "socks"), (0, 1, 8, "red shoes"), (0, 1, 8.1, "red socks"),
    (1, 2, 1, "red shoes"), (1, 3, 20, "red wine"), (1, 3, 20.1, "bread"),
    (2, 4, 21, "red wine"), (2, 4, 21.1, "rye bread"), (2, 4, 21.2, "bread"),
]  # fmt: skip


def fit(log, space=None):
    user, session, day, query = zip(*log, strict=True)
    texts = tuple(sorted(set(query)))
    table = pa.table({
        "user": user, "session": session, "timestamp": [int(each * DAY) for each in day],
        "query": [texts.index(each) for each in query],
    })  # fmt: skip
    known = completions_of(texts, table["query"].to_numpy(), table["timestamp"].to_numpy())
    space = space or make_space()
    return suggestion_baselines(space, known, table), space


def history(prefix, *searches, day=30, **fields):
    times = np.array([int(at * DAY) for at, _ in searches], np.int64)
    texts = np.array([text for _, text in searches], object)
    return {"prefix": prefix, "now": day * DAY, "search_query": texts, "search_timestamp": times, **fields}


def answers(model, space, history, k=4, **options):
    numbers, scores = model.recommend([history], k, **options)
    count = int((numbers[0] >= 0).sum())
    assert (numbers[0, count:] == -1).all() and (scores[0, count:] == -np.inf).all()
    assert scores[0, :count].tolist() == list(range(count, 0, -1)) and numbers.dtype == np.int32
    return space.show(numbers[0, :count])


# ---- baselines -------------------------------------------------------------------------------------------------------


def test_most_popular_completions_of_all_time_and_of_late():
    models, space = fit(LOG)
    assert answers(models["popular completion"], space, history("Red")) == ["red shoes", "red wine", "red socks"]
    assert answers(models["popular completion"], space, history("r"), k=2) == ["red shoes", "red wine"]
    assert answers(models["popular completion"], space, history("reds")) == []
    assert answers(models["popular completion"], space, history(""), k=3) == ["red shoes", "bread", "red wine"]
    late = models["recent popular completion"]
    assert answers(late, space, history("red")) == ["red wine", "red shoes", "red socks"]
    assert answers(late, space, history("red", day=15)) == ["red shoes", "red socks", "red wine"]


def test_own_searches_come_first_by_how_often_and_how_late():
    models, space = fit(LOG)
    own = models["own searches, then popular"]
    searched = [(1, "red hat"), (2, "Red  Socks"), (3, "bread"), (4, "red wine"), (5, "red hat")]
    assert answers(own, space, history("re", *searched)) == ["red hat", "red wine", "red socks", "red shoes"]
    assert answers(own, space, history("re", *searched), k=2) == ["red hat", "red wine"]
    assert answers(own, space, history("re", *searched), exclude_history=True) == ["red shoes"]
    for name in ("popular completion", "co-occurrence, then popular"):
        assert answers(models[name], space, history("re", *searched), k=2, exclude_history=True) == ["red shoes"]
    recent = models["own searches, then recent"]
    assert answers(recent, space, history("red", (1, "red socks"))) == ["red socks", "red wine", "red shoes"]


def test_what_followed_the_last_search_comes_first():
    models, space = fit(LOG)
    follow = models["co-occurrence, then popular"]
    # After red wine, in two sessions: bread twice, rye bread once.
    assert answers(follow, space, history("", (1, "red wine")), k=3) == ["bread", "rye bread", "red shoes"]
    assert answers(follow, space, history("r", (1, "red wine")), k=3) == ["rye bread", "red shoes", "red wine"]
    # After red shoes: socks and red socks later, and in a next session red shoes, red socks, red wine and bread.
    assert answers(follow, space, history("red s", (1, "bread"), (2, "Red Shoes"))) == ["red socks", "red shoes"]
    assert answers(follow, space, history("red s", (1, "unheard of"))) == ["red shoes", "red socks"]
    # Of searches of one moment all are last: rye bread follows red wine, and socks red shoes.
    both = [(2, "red wine"), (2, "red shoes")]
    assert answers(follow, space, history("rye", *both)) == ["rye bread"]
    assert answers(follow, space, history("so", *both)) == ["socks"]
    without_times = history("rye", *both)
    del without_times["search_timestamp"]
    assert answers(follow, space, without_times, k=1) == ["rye bread"]


def followers(log):
    """(query, later query) to sessions, session by session."""
    found, sessions = Counter(), {}
    for user, session, day, query in log:
        sessions.setdefault((user, session), []).append((day, query))
    for user, session in sessions:
        mine = sorted(sessions[user, session])
        found.update((a, b) for at, a in mine for later, b in mine if at < later)
        after = sorted(each for who, each in sessions if who == user and each > session)
        if after:
            found.update((a, b) for _, a in mine for _, b in sessions[user, after[0]])
    return found


def test_followers_against_a_plain_count():
    rng = np.random.default_rng(0)
    rows = {}
    for _ in range(300):
        user, session, query = rng.integers(4), rng.integers(30), f"q{rng.integers(12):02}"
        rows[user, session, query] = (user, session, session + 0.01 * rng.integers(1, 5), query)
    log = list(rows.values())
    models, _ = fit(log)
    first = models["co-occurrence, then popular"].first
    found = {
        (f"q{row:02}", f"q{column:02}"): int(first.following[row, column]) for row in range(12) for column in range(12)
    }
    assert found == {pair: followers(log)[pair] for pair in found} and max(found.values()) > 5


def test_the_day_of_a_question():
    assert day_of(history("a", (3, "b"), day=9)) == 9
    assert day_of({"prefix": "a", "timestamp": np.array([2 * DAY]), "search_timestamp": np.array([5 * DAY])}) == 5
    assert day_of({"prefix": "a", "timestamp": np.zeros(0, np.int64)}) is None


def test_answers_and_truths_have_the_numbers_of_the_space():
    """Listed texts have their places in the list, in any writing; others are found too."""
    space = make_space(["Ab", "bb"])
    models, _ = fit([(0, 0, 0, "ab"), (0, 0, 1, "aa")], space)
    truths, _ = space.truths([["AB", "aa"]])
    numbers, _ = models["popular completion"].recommend([history("a")], 2)
    assert set(numbers[0]) == set(truths[0]) and 0 in numbers[0]


# ---- metrics ---------------------------------------------------------------------------------------------------------


def numbers_of(space, rows, width):
    found = np.full((len(rows), width), -1, np.int32)
    for row, texts in enumerate(rows):
        found[row, : len(texts)] = [space.numbers.of(text) for text in texts]
    return found


def test_what_is_shown_is_counted_by_hand():
    space = make_space()
    ranked = numbers_of(space, [["red shoes", "red", "bread"], ["rye"], []], 3)
    targets = numbers_of(space, [["red", "bread"], ["rye bread"], ["x"]], 2)
    found = suggestion_metrics(ranked, targets, targets >= 0, ["Re", "ry", ""], space)
    assert found["full"] == (1, 3) and found["begins"] == (3, 4) and found["duplicates"] == (0, 4)
    spaced = suggestion_metrics(ranked, targets, targets >= 0, ["Red ", "ry", ""], space)
    assert spaced["begins"] == (2, 4) and spaced["saved"] == (pytest.approx(1 - 4 / 5), 3)
    # Of red and bread, bread saves more: 3 of 5 keys. Rye bread was not shown.
    assert found["saved"] == (pytest.approx(1 - 2 / 5), 3)


def test_keys_are_saved_within_ten_answers_and_never_lost():
    space = make_space()
    many = numbers_of(space, [[f"text {letter}" for letter in "abcdefghijklmnopqrst"]], 20)
    for place, saved in ((9, 1 - 2 / 6), (10, 0)):
        truth = many[:, [place]]
        assert suggestion_metrics(many, truth, truth >= 0, ["te"], space)["saved"] == (pytest.approx(saved), 1)
    truth = many[:, :1]
    assert suggestion_metrics(many, truth, truth >= 0, ["text a and more"], space)["saved"] == (0, 1)
    assert suggestion_metrics(many, truth, truth >= 0, [""], space)["saved"] == (1, 1)
    few = suggestion_metrics(many[:, :15], truth, truth >= 0, [""], space)
    assert few["full"] == (1, 1)  # of fewer than 16 places, as many as were ranked
    cut = np.where(np.arange(20) < 15, many, -1)
    assert suggestion_metrics(cut, truth, truth >= 0, [""], space)["full"] == (0, 1)


def test_a_text_in_two_writings_is_a_duplicate():
    """Of spaces that number writings apart; `TextSpace` doesn't."""

    class Apart:
        def show(self, numbers):
            return [["red shoes", "Red  Shoes", "socks"][number] for number in numbers]

    ranked = np.array([[0, 1, 2]], np.int32)
    assert suggestion_metrics(ranked, ranked[:, :1], ranked[:, :1] >= 0, [""], Apart())["duplicates"] == (1, 3)


# ---- subsets ---------------------------------------------------------------------------------------------------------


def make_cases(space, rows, feedback=None):
    """Cases of (prefix, truths)."""
    targets = numbers_of(space, [truths for _, truths in rows], max(len(truths) for _, truths in rows))
    given = None
    if feedback is not None:
        given = np.array([[FEEDBACK.index(each) if each else -1 for each in row] for row in feedback], np.int8)
    histories = [history(prefix) for prefix, _ in rows]
    return Cases(np.arange(len(rows)), histories, targets, targets >= 0, targets >= 0, feedback=given)


def where(subsets):
    return {subset.name: subset.where.tolist() for subset in subsets}


def test_subsets_of_prefixes():
    space = make_space()
    typed = ["", "r", "Re", "red", "red ", "red sho", "xx"]
    cases = make_cases(space, [(prefix, ["red shoes"]) for prefix in typed])
    # 9 suggestions: 4 for r, 3 for re, 2 for red.
    found = where(suggestion_subsets(cases, space, {"red shoes"}, {"r": 4, "re": 3, "red": 2}))
    rows = {name: [row for row in range(7) if mask[row][0]] for name, mask in found.items()}
    assert rows == {
        "typed_0": [0], "typed_1": [1], "typed_2_3": [2, 3, 6], "typed_4_6": [4], "typed_7_up": [5],
        "top_prefixes": [1], "middle_prefixes": [2], "long_tail_prefixes": [0, 3, 4, 5, 6],
        "unseen_prefixes": [0, 5, 6],
    }  # fmt: skip


def test_subsets_of_chosen_queries():
    space = make_space(["Red Shoes"])
    cases = make_cases(space, [("re", ["red shoes", "new"]), ("ne", ["new"])], [["order", "click"], ["item_click", ""]])
    found = where(suggestion_subsets(cases, space, {"red shoes"}, {}))
    assert found["unseen_completions"] == [[False, True], [True, False]]
    assert found["orders"] == [[True, False], [False, False]] and found["clicks"] == [[False, True], [True, False]]
    cases = make_cases(space, [("re", ["red shoes"])], [["click"]])
    assert not {"orders", "clicks", "unseen_completions"} & set(
        where(suggestion_subsets(cases, space, {"red shoes"}, {}))
    )


def test_training_knows_what_was_searched_for_or_chosen(tmp_path):
    queries = {"query": ["Red shoes", "red shoes", "a", "b"], "count": [0, 2, 0, 0], "chosen": [1, 0, 0, 3]}
    pq.write_table(pa.table(queries), tmp_path / "queries.parquet")
    pq.write_table(pa.table({"prefix": ["R", "r", "x"], "count": [2, 3, 0]}), tmp_path / "prefixes.parquet")
    assert known_queries(tmp_path) == {"red shoes", "b"}
    assert prefix_counts(tmp_path) == {"r": 5, "x": 0}


# ---- rows and tables -------------------------------------------------------------------------------------------------


def test_rows_and_tables_of_suggestions():
    models, space = fit(LOG)
    cases = make_cases(space, [("red", ["red wine"]), ("r", ["rye bread"])], [["order"], ["click"]])
    subsets = (*item_subsets(cases), *suggestion_subsets(cases, space, set(), {"r": 1}))

    def shown(batch, ranked):
        typed = [history["prefix"] for history in batch.histories]
        return suggestion_metrics(ranked, batch.targets, batch.where, typed, space)

    ours = {"ours": models["recent popular completion"], "popular completion": models["popular completion"]}
    options = {"subsets": subsets, "measures": {"suggestions": shown}}
    rows = evaluate(ours, cases, cutoffs=(10, 16), batch_size=1, **options)
    assert rows == evaluate(ours, cases, cutoffs=(10, 16), **options)
    found = {(row["model"], row["subset"], row["metric"]): (row["value"], row["count"]) for row in rows}
    assert found["ours", "all", "mrr@16"] == (pytest.approx((1 + 1 / 3) / 2), 2)
    assert found["popular completion", "all", "mrr@16"] == ((1 / 2 + 1 / 4) / 2, 2)
    assert found["ours", "orders", "hr@16"] == (1, 1) and found["ours", "suggestions", "full"] == (0, 2)
    assert found["ours", "suggestions", "begins"] == (1, 7)
    assert found["ours", "suggestions", "saved"] == (pytest.approx((5 / 8 + 8 / 9) / 2), 2)
    assert all(row["cases"] == "prefixes" for row in rows)
    tables = comparison_tables(rows)
    titles = [table.title for table in tables]
    assert titles[-3:] == [
        f"test, {group}: hr@16 / mrr@16" for group in ("by characters typed", "by prefix", "by chosen query")
    ]
    (shown,) = (table for table in tables if table.title == "test, suggestions (2 prefixes)")
    assert [column.header for column in shown.columns] == ["model", "full", "begins", "duplicates", "saved"]
    columns = grouped(rows)["test", "by chosen query"]
    assert [column.title for column in columns][::2] == ["unseen completions", "clicks", "orders"]
    judged = [(each.subset, each.metric) for each in standings(rows, "ours")]
    assert judged == [("all", "hr@16"), ("all", "mrr@16"), ("new", "hr@16"), ("new", "mrr@16")]


def test_texts_are_known_by_their_numbers():
    models, space = fit(LOG)
    texts = models["popular completion"].texts
    assert isinstance(texts, NumberedCompletions) and space.show(texts.numbers) == list(texts.known.texts)
