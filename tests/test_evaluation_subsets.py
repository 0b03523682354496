"""Subsets of cases: by hand, and the rows that they give."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.evaluation.cases import Cases
from jaxrec.evaluation.comparison import comparison_tables, evaluate, grouped
from jaxrec.evaluation.metrics import mean, ranking_metrics
from jaxrec.evaluation.subsets import item_subsets, query_counts, query_subsets

EMPTY = {"item": np.zeros(0, np.int32), "behavior": np.zeros(0, np.int8)}


def cases_of(queries, targets, behavior=None):
    targets = np.array(targets, np.int32)
    histories = [{**EMPTY, "query": query} for query in queries]
    behavior = None if behavior is None else np.array(behavior, np.int8)
    return Cases(np.arange(len(queries)), histories, targets, targets >= 0, targets >= 2, behavior=behavior)


class Listed:
    """Ranks 0, 1, 2 ...; without the history the other way round."""

    def recommend(self, histories, k, exclude_history=False):
        ranked = np.tile(np.arange(6, dtype=np.int32)[:k], (len(histories), 1))
        return (ranked[:, ::-1] if exclude_history else ranked), np.zeros(ranked.shape, np.float32)


def where(subsets):
    return {subset.name: subset.where.tolist() for subset in subsets}


def test_thirds_of_the_training_searches():
    # 9 searches: 4 for a, 3 for b, 1 for c and 1 for d. None is more frequent than a; 4 / 9 searches are for more
    # frequent ones than b, 7 / 9 than c and d.
    counts = {"a": 4, "b": 3, "c": 1, "d": 1, "e": 0}
    cases = cases_of([*"abcdef", " A"], [[0]] * 7)
    found = where(query_subsets(cases, counts, ()))
    rows = {name: [row for row in range(7) if found[name][row][0]] for name in found}
    assert rows == {
        "head_queries": [0, 6], "torso_queries": [1], "tail_queries": [2, 3, 4, 5], "unseen_queries": [4, 5]
    }  # fmt: skip


def test_equally_frequent_queries_are_together_and_nothing_searched_is_all_tail():
    cases = cases_of("ab", [[0], [1]])
    assert where(query_subsets(cases, {"a": 1, "b": 1}, ()))["head_queries"] == [[True], [True]]
    found = where(query_subsets(cases, {}, ()))
    assert found["tail_queries"] == found["unseen_queries"] == [[True], [True]]
    assert found["head_queries"] == found["torso_queries"] == [[False], [False]]


def test_truths_by_behavior_where_there_are_several():
    cases = cases_of("ab", [[0, 3], [1, -1]], [[2, 1], [1, -1]])
    found = where(query_subsets(cases, {}, ("exposure", "click", "purchase")))
    assert list(found)[4:] == ["led_to_purchase", "led_to_click"]
    assert found["led_to_purchase"] == [[True, False], [False, False]]
    assert found["led_to_click"] == [[False, True], [True, False]]
    one = dataclasses.replace(cases, behavior=np.array([[1, 1], [1, -1]], np.int8))
    assert len(query_subsets(one, {}, ("exposure", "click", "purchase"))) == 4


def test_counts_of_two_writings_are_added(tmp_path):
    table = pa.table({"query": [" a", "A", "b"], "count": [2, 3, 0]})
    pq.write_table(table, tmp_path / "queries.parquet")
    assert query_counts(tmp_path) == {"a": 5, "b": 0}


def test_rows_are_the_metrics_of_each_subset():
    cases = cases_of("aab", [[0, 3], [2, 4], [5, -1]])
    subsets = (*item_subsets(cases), *query_subsets(cases, {"a": 1}, ()))
    rows = evaluate({"m": Listed()}, cases, cutoffs=(2, 6), batch_size=2, subsets=subsets)
    for subset in subsets:
        ranked, _ = Listed().recommend(cases.histories, 6, exclude_history=subset.without_history)
        expected = ranking_metrics(ranked, cases.targets, subset.where, (2, 6))
        found = {row["metric"]: (row["value"], row["count"]) for row in rows if row["subset"] == subset.name}
        assert found == {metric: (mean(pair), pair[1]) for metric, pair in expected.items()}
    assert evaluate({"m": Listed()}, cases, cutoffs=(2, 6)) == [
        row for row in rows if row["subset"] in ("all", "new", "new_in_full_ranking")
    ]
    assert all(row["cases"] == "searches" for row in rows)


def test_one_table_of_all_query_subsets():
    cases = cases_of("aab", [[0, 3], [2, 4], [5, -1]])
    subsets = (*item_subsets(cases), *query_subsets(cases, {"a": 1}, ()))
    rows = evaluate({"m": Listed(), "n": Listed()}, cases, cutoffs=(2, 10), subsets=subsets)
    tables = comparison_tables(rows)
    assert [table.title for table in tables][-1] == "test, by query: recall@10 / mrr@10" and len(tables) == 4
    assert [column.header for column in tables[-1].columns] == [
        "model", "head queries\n(2)", "tail queries\n(1)", "unseen queries\n(1)"
    ]  # fmt: skip
    (columns,) = grouped(rows).values()
    assert [(column.title, column.metric, column.count) for column in columns] == [
        (f"{name} queries", metric, count)
        for name, count in (("head", 2), ("tail", 1), ("unseen", 1))
        for metric in ("recall@10", "mrr@10")
    ]
    assert columns[0].values == {"m": 1.0, "n": 1.0}
    assert len(comparison_tables(evaluate({"m": Listed()}, cases, cutoffs=(2,)))) == 3
    (columns,) = grouped(evaluate({"m": Listed()}, cases, cutoffs=(2, 5), subsets=subsets)).values()
    assert columns[0].metric == "recall@2"
