"""The comparison: subsets, rows, tables, shuffled ties."""

import io

import numpy as np
import pytest
from rich.console import Console

from jaxrec.evaluation.cases import make_cases
from jaxrec.evaluation.comparison import (
    Standing,
    comparison_tables,
    evaluate,
    evaluate_ties_shuffled,
    standing_table,
    standings,
    verdict,
)


class Fixed:
    """Ranks the same items for everybody."""

    def __init__(self, ranking):
        self.ranking = ranking
        self.batches = []

    def recommend(self, histories, k, exclude_history=False):
        self.batches.append(len(histories))
        items = np.full((len(histories), k), -1, np.int32)
        for row, history in enumerate(histories):
            kept = [item for item in self.ranking if not (exclude_history and item in history["item"])][:k]
            items[row, : len(kept)] = kept
        return items, np.zeros(items.shape, np.float32)


def user(number, items, times=None):
    length = len(items)
    return {
        "user": np.int32(number), "item": np.array(items, np.int32), "behavior": np.zeros(length, np.int8),
        "timestamp": np.array(times or range(length), np.int64), "session": np.arange(length, dtype=np.int32),
        "split": np.array([0] * (length - 2) + [1, 2], np.int8),
    }  # fmt: skip


def value(rows, subset, metric, model="fixed"):
    (row,) = [row for row in rows if (row["model"], row["subset"], row["metric"]) == (model, subset, metric)]
    return row["value"], row["count"]


def test_the_three_subsets_by_hand():
    # User 0 buys 1 again; user 1 buys 2, new to him. Everybody gets 1, 2, 3.
    records = [user(0, [1, 4, 1]), user(1, [1, 5, 2])]
    rows = evaluate({"fixed": Fixed([1, 2, 3])}, make_cases(records, (0,)), cutoffs=(1, 2))
    assert value(rows, "all", "recall@1") == (0.5, 2) and value(rows, "all", "recall@2") == (1.0, 2)
    assert value(rows, "new", "recall@1") == (1.0, 1), "1 is taken out of his ranking, so 2 comes first"
    assert value(rows, "new_in_full_ranking", "recall@1") == (0.0, 1)
    assert value(rows, "new_in_full_ranking", "mrr@2") == (0.5, 1)
    assert set(rows[0]) == {"model", "split", "subset", "metric", "value", "count"}
    assert len(rows) == 3 * 4 * 2


def test_batches_do_not_change_the_rows():
    rng = np.random.default_rng(0)
    cases = make_cases([user(number, rng.integers(0, 9, 5).tolist()) for number in range(7)], (0,))
    model = Fixed(list(range(9)))
    whole = evaluate({"fixed": Fixed(list(range(9)))}, cases, cutoffs=(3,))
    parts = evaluate({"fixed": model}, cases, cutoffs=(3,), batch_size=3)
    assert model.batches == [3, 3, 3, 3, 1, 1]
    for left, right in zip(whole, parts, strict=True):
        assert left == {**right, "value": pytest.approx(right["value"])}


def test_nobody_with_a_new_target_gives_zero_of_zero():
    rows = evaluate({"fixed": Fixed([1])}, make_cases([user(0, [1, 4, 1])], (0,)), cutoffs=(1,))
    assert value(rows, "new", "ndcg@1") == (0.0, 0)


def test_shuffled_ties_break_what_storage_order_taught():
    # Everybody stores 0 1 2 .. 7 on one day, so the chain predicts the last from the one before; by chance it can't.
    records = [user(number, list(range(8)), times=[5] * 8) for number in range(60)]
    shuffled = evaluate_ties_shuffled(records, 8, (0,), cutoffs=(1,))
    assert value(shuffled, "all", "recall@1", "markov (ties shuffled)")[0] < 0.6
    assert {row["model"] for row in shuffled} == {
        f"{name} (ties shuffled)"
        for name in ("popularity", "recent popularity", "personal frequency", "markov", "itemknn")
    }
    assert evaluate_ties_shuffled(records, 8, (0,), cutoffs=(1,)) == shuffled


def test_no_rows_where_nothing_ties():
    assert evaluate_ties_shuffled([user(0, [1, 2, 3])], 8, (0,)) == []


def test_tables_show_one_row_a_model_and_the_best_in_bold():
    cases = make_cases([user(0, [1, 4, 3]), user(1, [1, 5, 2])], (0,))
    rows = evaluate({"good": Fixed([3, 2]), "poor": Fixed([3])}, cases, cutoffs=(10,))
    tables = comparison_tables(rows)
    assert [table.title for table in tables] == [
        "test, all (2 users)", "test, new (2 users)", "test, new in full ranking (2 users)"
    ]  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=100, force_terminal=True).print(tables[0])
    lines = [line for line in text.getvalue().splitlines() if "good" in line or "poor" in line]
    assert "\x1b[1m1.0000" in lines[0] and "\x1b[1m" not in lines[1] and "0.5000" in lines[1]


def rows_of(values, count=2):
    return [
        {"model": model, "split": "test", "subset": subset, "metric": metric, "value": number, "count": count}
        for (model, subset, metric), number in values.items()
    ]


def test_a_system_is_held_against_the_best_baseline_of_each_metric():
    all_recall, all_ndcg, new_recall = ("all", "recall@10"), ("all", "ndcg@10"), ("new", "recall@10")
    values = {("onemall", *all_recall): 0.1, ("onemall", *all_ndcg): 0.3, ("onemall", *new_recall): 0.2}
    values |= {("popularity", *all_recall): 0.15, ("popularity", *all_ndcg): 0.2, ("popularity", *new_recall): 0.2}
    values |= {("markov", *all_recall): 0.2, ("markov", *all_ndcg): 0.1, ("markov", *new_recall): 0.0}
    values |= {("markov (ties shuffled)", *all_recall): 0.9}
    found = standings(rows_of(values), "onemall")
    assert found == [
        Standing("all", "recall@10", 0.1, "markov", 0.2),
        Standing("all", "ndcg@10", 0.3, "popularity", 0.2),
        Standing("new", "recall@10", 0.2, "popularity", 0.2),
    ]
    assert [each.difference for each in found] == ["-50.0%", "+50.0%", "equal"]
    said = "onemall is BELOW the best baseline: recall@10 0.1000, markov 0.2000 (-50.0%)"
    assert verdict(found, "onemall") == said
    assert verdict(found[1:], "onemall").startswith("onemall is not below the best baseline: ndcg@10 0.3000, popul")
    text = io.StringIO()
    Console(file=text, soft_wrap=True).print(standing_table(found, "onemall"))
    assert text.getvalue().startswith(said)


@pytest.mark.parametrize(
    ("cases", "metric", "said"),
    [("prefixes", "ndcg@10", "ndcg@10 on new queries"), ("searches", "mrr@10", "mrr@10 on new items")],
)
def test_the_verdict_names_what_is_answered_and_searches_are_judged_by_mrr(cases, metric, said):
    values = {(model, "new", name): 0.5 for model in ("ours", "bm25") for name in ("ndcg@10", "mrr@10")}
    (found,) = standings([{**row, "cases": cases} for row in rows_of(values)], "ours")
    assert (found.metric, found.what) == (metric, said) and said in verdict([found], "ours")


def test_without_a_baseline_or_users_there_is_no_verdict():
    assert standings(rows_of({("onemall", "all", "recall@10"): 0.1}), "onemall") == []
    both = {("onemall", "new", "recall@10"): 0.0, ("markov", "new", "recall@10"): 0.0}
    assert standings(rows_of(both, count=0), "onemall") == []
    assert verdict([], "onemall") == ""
