import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from search_records import random_record

from jaxrec.config import UserError
from jaxrec.data.suggestion_targets import asked_rows, feedback_shares, strongest, training_shares, typed_prefix
from jaxrec.data.tables import CHOSEN, FEEDBACK


@pytest.mark.parametrize("seed", range(30))
def test_typed_prefixes_against_a_plain_loop(seed):
    record = random_record(seed)
    groups = {}
    names = ("suggestion_timestamp", "suggestion_session", "suggestion_prefix")
    for row in range(len(record["suggestion_query"])):
        groups.setdefault(tuple(int(record[name][row]) for name in names), []).append(row)
    chosen = {key: rows for key, rows in groups.items() if (record["suggestion_feedback"][rows] < len(CHOSEN)).any()}
    found = [typed_prefix(record, row) for row in asked_rows(record)]
    assert {each[:3]: each.rows.tolist() for each in found} == chosen and len(found) == len(chosen)


def test_of_a_query_the_strongest_feedback_counts():
    query, feedback = strongest(np.array([4, 2, 4, 2]), np.array([3, 5, 1, 4]))
    assert (query.tolist(), feedback.tolist()) == ([2, 4], [4, 1])


def test_shares_are_those_of_a_pair_among_all_with_its_feedback_for_the_prefix():
    """Table 1 by hand: prefix 0 was shown query 1 three times and query 2 once, and query 2 was ordered."""
    rows = [(0, 1, 3)] * 3 + [(0, 2, 3), (0, 2, 0), (1, 2, 3)]
    shares = feedback_shares(*(np.array(column) for column in zip(*rows, strict=True)))
    found = shares.of(0, np.array([1, 2, 2, 1, 9]), np.array([3, 3, 0, 0, 3]))
    np.testing.assert_allclose(found, [0.75, 0.25, 1, 0, 0])
    np.testing.assert_allclose(shares.of(1, np.array([2]), np.array([3])), [1])
    assert shares.of(2, np.array([0, 1]), np.array([0, 0])).tolist() == [0, 0] and found.dtype == np.float32


def test_shares_against_plain_counts():
    rng = np.random.default_rng(0)
    prefix, query, feedback = rng.integers(0, 4, 500), rng.integers(0, 9, 500), rng.integers(0, 6, 500)
    shares = feedback_shares(prefix, query, feedback)
    for _ in range(50):
        one, some, level = int(rng.integers(4)), rng.integers(0, 12, 5), rng.integers(0, 6, 5)
        expected = [
            ((prefix == one) & (query == q) & (feedback == f)).sum() / ((prefix == one) & (feedback == f)).sum()
            for q, f in zip(some, level, strict=True)
        ]
        np.testing.assert_allclose(shares.of(one, some, level), expected, rtol=1e-6)


def test_only_training_is_counted_and_writings_are_one(tmp_path):
    columns = {"prefix_index": [0, 1, 0], "query_index": [0, 1, 2], "split": ["train", "train", "test"]}
    table = pa.table({**columns, "feedback": [FEEDBACK[2], FEEDBACK[2], FEEDBACK[2]]})
    pq.write_table(table, tmp_path / "suggestions.parquet")
    shares = training_shares(tmp_path, np.array([0, 0]), np.array([0, 1, 1]))
    np.testing.assert_allclose(shares.of(0, np.array([0, 1]), np.array([2, 2])), [0.5, 0.5])
    pq.write_table(table.slice(2), tmp_path / "suggestions.parquet")
    with pytest.raises(UserError, match="holds no row of training"):
        training_shares(tmp_path, np.array([0, 0]), np.array([0, 1, 1]))
