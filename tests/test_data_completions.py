import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.completions import (
    DEPTH,
    UNKNOWN,
    CompletionsConfig,
    completions,
    completions_of,
    training_queries,
)
from jaxrec.data.popularity import DAY, PopularityConfig

RECENT = PopularityConfig(days=7, decay_days=20.0, floor=0.0)


def write(folder, name, rows, columns):
    columns = ["user", "session", "split", "timestamp", *columns]
    pq.write_table(pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))), folder / name)


SEARCHES = [
    (0, 0, "train", 0, "Red  shoes"),
    (0, 0, "train", 5, "red shoes"),  # the next page
    (0, 1, "train", 8 * DAY, "red shoes"),
    (1, 2, "train", 9 * DAY, "red socks"),
    (1, 2, "train", 9 * DAY + 1, "bread"),
    (1, 2, "train", 9 * DAY + 2, " "),
    (1, 3, "test", 30 * DAY, "red wine"),
]


@pytest.fixture
def tables(tmp_path):
    write(tmp_path, "searches.parquet", SEARCHES, ["query"])
    return tmp_path


def named(known, found):
    return [known.texts[row] for row in found.rows]


def test_a_query_counts_once_a_session_of_training(tables):
    known = completions(tables)
    assert known.texts == ("bread", "red shoes", "red socks") and known.count.tolist() == [1, 2, 1]
    _, log = training_queries(tables)
    assert log.to_pydict() == {
        "user": [0, 0, 1, 1],
        "session": [0, 1, 2, 2],
        "timestamp": [0, 8 * DAY, 9 * DAY, 9 * DAY + 1],
        "query": [1, 1, 2, 0],
    }


def test_completions_of_a_prefix_are_a_slice_of_the_texts(tables):
    known = completions(tables)
    assert known.texts[known.of("RED  s")] == ("red shoes", "red socks")
    assert known.texts[known.of("")] == known.texts and known.texts[known.of("  ")] == known.texts
    assert known.texts[known.of("bread")] == ("bread",)
    assert known.texts[known.of("Red ")] == ("red shoes", "red socks") and known.of("bread ") == slice(1, 1)
    assert all(known.texts[known.of(absent)] == () for absent in ("breads", "a", "z", "red shoes 2"))
    assert known.rows(["Bread", "red wine", "red  SOCKS"]).tolist() == [0, UNKNOWN, 2]


def test_the_most_popular_come_first_with_their_shares(tables):
    known = completions(tables)
    found = known.top("r", 5)
    assert named(known, found) == ["red shoes", "red socks"]
    np.testing.assert_allclose(found.share, [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(found.recent, found.share)
    assert named(known, known.top("", 2)) == ["red shoes", "bread"]  # bread and red socks are equal
    nothing = known.top("x", 3)
    assert [len(part) for part in nothing[:3]] == [0, 0, 0] and (found.sessions, nothing.sessions) == (3, 0)


def test_shares_of_late_are_of_the_periods_before_the_day(tables):
    known = completions(tables, CompletionsConfig(RECENT))
    # Day 0 is in the first period of seven days; days 8 and 9 in the second. Age is up to the end of the period.
    weight = {day: np.exp((day - 14) / 20) for day in (0, 8, 9)}
    found = known.top("red", 5, 14)
    expected = np.array([weight[0] + weight[8], weight[9]])
    np.testing.assert_allclose(found.recent, expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(known.top("red", 5, 8).recent, [1, 0], atol=1e-6)  # the second period begins at day 7
    np.testing.assert_array_equal(known.top("b", 5, 8).recent, [0])
    first = known.top("red", 5, 0)
    np.testing.assert_array_equal(first.recent, first.share)


def test_a_query_left_out_is_counted_in_one_session_less(tables):
    known = completions(tables)
    shoes, socks = known.rows(["red shoes", "red socks"])
    found = known.top("red", 5, 0, [shoes])
    assert named(known, found) == ["red shoes", "red socks"]  # equal now, in alphabetical order
    np.testing.assert_allclose(found.share, [0.5, 0.5])
    np.testing.assert_allclose(found.recent, [0.5, 0.5])
    found = known.top("red", 5, 0, [socks])
    assert named(known, found) == ["red shoes"] and found.share.tolist() == [1]
    assert named(known, known.top("red so", 5, 0, [socks])) == []
    both = known.top("red", 5, 0, [shoes, socks])
    assert named(known, both) == ["red shoes"] and both.sessions == 1
    assert named(known, known.top("b", 5, 0, [socks])) == ["bread"]  # no completion: nothing is taken from it


def test_without_searches_chosen_suggestions_count(tmp_path):
    rows = [
        (0, 0, "train", 0, "r", "red shoes", "show"),
        (0, 0, "train", 0, "r", "red wine", "click"),
        (0, 0, "train", 1, "re", "red wine", "order"),  # the same search, one key later
        (0, 1, "train", 9, "b", "bread", "item_click"),
        (0, 2, "test", 10, "b", "butter", "click"),
    ]
    write(tmp_path, "suggestions.parquet", rows, ["prefix", "query", "feedback"])
    known = completions(tmp_path)
    assert known.texts == ("bread", "red wine") and known.count.tolist() == [1, 1]


def test_a_log_without_queries_is_refused(tmp_path):
    with pytest.raises(UserError, match="no search and no chosen suggestion of training"):
        completions(tmp_path)
    write(tmp_path, "searches.parquet", [(0, 0, "test", 3, "bread")], ["query"])
    with pytest.raises(UserError, match="no search and no chosen suggestion of training"):
        completions(tmp_path)


def test_a_floor_would_show_an_example_its_answer():
    with pytest.raises(UserError, match=r"completions\.recent\.floor"):
        CompletionsConfig(PopularityConfig(7, 20.0, 0.1))


def log_of(rng, texts, sessions, days=40):
    """A log in which every text is, most of them once or twice."""
    query = np.concatenate([np.arange(len(texts)), (len(texts) * rng.random(sessions) ** 3).astype(np.int64)])
    return query, rng.integers(0, days * DAY, len(query))


def oracle(texts, query, timestamp, prefix, k, day, without, late):
    """The best completions by counting the log, query by query."""
    days = timestamp // DAY
    first = days.min()
    last = (days.max() - first) // 7 + 1
    period = 0 if day is None else min(max((day - first) // 7, 0), last)
    counts, weights = {}, {}
    for row, text in enumerate(texts):
        if text.startswith(prefix):
            counts[row] = int((query == row).sum()) - (row in without)
            before = (query == row) & ((days - first) // 7 < period)
            age = first + 7 * period - timestamp[before] / DAY
            weights[row] = np.exp(-age / 20).sum()
    rows = [row for row, count in counts.items() if count > 0]
    rows.sort(key=lambda row: (-weights[row] if late and period else 0, -counts[row], row))
    share = np.array([counts[row] for row in rows]) / max(sum(counts.values()), 1)
    recent = np.array([weights[row] for row in rows]) / max(sum(weights.values()), 1e-30)
    return rows[:k], share[:k], (recent if period else share)[:k]


def test_against_a_plain_count():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abc é"], 5)).strip() for _ in range(900)]
    texts = sorted({" ".join(word.split()) for word in words} - {""})
    query, timestamp = log_of(rng, texts, 1500)
    known = completions_of(texts, query, timestamp, CompletionsConfig(RECENT))
    for _ in range(150):
        prefix = texts[rng.integers(len(texts))][: rng.integers(0, 4)].strip()
        k, day = int(rng.choice([1, 5, 16, DEPTH, 200])), [None, *range(0, 50, 6)][rng.integers(10)]
        likely = known.top(prefix, k + 3).rows
        without = [UNKNOWN, *rng.permutation(likely)[: rng.integers(4)].tolist()]
        late = bool(rng.integers(2))
        found = known.top(prefix, k, day, without, late=late)
        rows, share, recent = oracle(texts, query, timestamp, prefix, k, day, without, late)
        assert found.rows.tolist() == rows, (prefix, k, day, without, late)
        np.testing.assert_allclose(found.share, share, rtol=1e-5)
        np.testing.assert_allclose(found.recent, recent, rtol=1e-4, atol=1e-7)
        of_prefix = np.array([text.startswith(prefix) for text in texts])
        assert found.sessions == np.bincount(query)[of_prefix].sum() - sum(of_prefix[row] for row in without[1:])
        assert found.rows.dtype == np.int64 and found.share.dtype == found.recent.dtype == np.float32


def test_what_is_kept_is_never_changed_by_a_reader(tables):
    known = completions(tables)
    before = [np.copy(part) for part in known.top("red", 5, 14)]
    known.top("red", 5, 14, known.rows(["red shoes"]))
    for part, again in zip(before, known.top("red", 5, 14), strict=True):
        np.testing.assert_array_equal(part, again)
    with pytest.raises(ValueError, match="read-only"):
        known.top("red", 5).rows[0] = 7
