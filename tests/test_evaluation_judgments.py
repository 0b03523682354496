"""Judged pairs: reading, graded NDCG against another implementation, condensed lists."""

import math

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.evaluation.judgments import Judgments, evaluate_judgments, read_judgments
from jaxrec.evaluation.metrics import condensed, graded_ndcg_at


def test_by_hand():
    ranked = np.array([[7, 3, 9, 3]])
    items, grades = np.array([[3, 9, 5, -1]]), np.array([[2.0, 1.0, 3.0, 9.0]])
    best = 3 + 2 / math.log2(3) + 1 / 2
    assert graded_ndcg_at(ranked, items, grades, 3)[0] == pytest.approx((2 / math.log2(3) + 1 / 2) / best)
    assert condensed(ranked, items).tolist() == [[3, 9, 3, -1]]
    assert graded_ndcg_at(condensed(ranked, items), items, grades, 10)[0] == pytest.approx(
        (2 + 1 / math.log2(3)) / best
    )
    assert graded_ndcg_at(ranked, items, np.zeros((1, 4)), 3)[0] == 0


@pytest.mark.parametrize("k", [1, 4, 30])
def test_as_trec_eval(k):
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(20)[:12] for _ in range(30)])
    items = np.stack([rng.permutation(20)[:6] for _ in range(30)])
    grades = rng.integers(0, 4, items.shape)
    grades[:, 0] = 1
    judged = [ir_measures.Qrel(str(q), str(i), int(g)) for q in range(30) for i, g in zip(items[q], grades[q], strict=True)]  # noqa: E501  # fmt: skip
    run = [ir_measures.ScoredDoc(str(q), str(i), -place) for q in range(30) for place, i in enumerate(ranked[q])]
    expected = {each.query_id: each.value for each in ir_measures.iter_calc([ir_measures.nDCG @ k], judged, run)}
    found = graded_ndcg_at(ranked, items, grades, k)
    np.testing.assert_allclose(found, [expected[str(q)] for q in range(30)], rtol=1e-6)


class First:
    """Ranks the first items, and keeps the requests."""

    def recommend(self, histories, k, exclude_history=False):
        self.asked = [history["query"] for history in histories]
        return np.tile(np.arange(k, dtype=np.int32), (len(histories), 1)), np.zeros((len(histories), k), np.float32)


def test_reading_and_rows(tmp_path):
    pq.write_table(pa.table({"query": ["red", "tea", "x"]}), tmp_path / "queries.parquet")
    pq.write_table(pa.table({"timestamp": [5, 17]}), tmp_path / "events.parquet")
    assert read_judgments(tmp_path, "test") is None
    judged = {
        "query_index": pa.array([1, 0, 1, 1, 2, 0], pa.int32()), "item": pa.array([4, 1, 0, 4, 3, 2], pa.int32()),
        "grade": [1.0, 3.0, 2.0, 2.0, 0.0, 1.0], "split": ["test"] * 5 + ["train"],
    }  # fmt: skip
    pq.write_table(pa.table(judged), tmp_path / "judgments.parquet")
    found = read_judgments(tmp_path, "test")
    assert found.queries == ("red", "tea") and found.now == 17, "the query without a grade above 0 is left out"
    assert found.items.tolist() == [[1, -1], [0, 4]] and found.gains.tolist() == [[3, 0], [2, 2]]
    assert read_judgments(tmp_path, "valid") is None
    model = First()
    rows = evaluate_judgments({"m": model}, found, cutoffs=(2, 5), batch_size=1)
    assert model.asked == ["tea"]
    values = {(row["subset"], row["metric"]): row["value"] for row in rows}
    whole = 2 + 2 / math.log2(3)
    assert values["judged", "ndcg@2"] == pytest.approx((1 / math.log2(3) + 2 / whole) / 2)
    assert values["judged_only", "ndcg@5"] == pytest.approx(1)
    assert values["judged_only", "ndcg@2"] == pytest.approx(1), "the whole ranking is condensed, to its last place"
    assert all(row["count"] == 2 and row["cases"] == "judged queries" for row in rows)


def test_the_lowest_grade_is_irrelevant_unless_it_is_the_only_one(tmp_path):
    pq.write_table(pa.table({"query": ["red", "tea"]}), tmp_path / "queries.parquet")
    pq.write_table(pa.table({"timestamp": [5]}), tmp_path / "events.parquet")
    judged = {"query_index": pa.array([0, 0, 1], pa.int32()), "item": pa.array([4, 1, 2], pa.int32())}
    judged["split"] = ["test", "test", "train"]
    for grades, gains in (([3.0, 1.5, 1.0], [[0.5, 2.0]]), ([1.0] * 3, [[1.0, 1.0]])):
        pq.write_table(pa.table(judged | {"grade": grades}), tmp_path / "judgments.parquet")
        found = read_judgments(tmp_path, "test")
        assert found.items.tolist() == [[1, 4]] and found.gains.tolist() == gains


def test_no_judgment_is_no_query():
    empty = np.zeros(0, np.int64)
    assert len(Judgments.of(["a"], empty, empty, empty.astype(np.float32))) == 0
