"""The vetted list of queries: cleaning, counts, what is answered and what is blocked."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.data.vetted_queries import VettedQueriesConfig, block_list, vetted_queries
from jaxrec.data.words import normalised, words

# query, searches in training, choices in training
QUERIES = [
    ("Boots", 3, 9), ("boots ", 2, 0), ("red\x07boots", 4, 0), ("\u200b", 5, 0), ("rare", 1, 0), ("chosen", 0, 2),
    ("靴", 7, 0), ("test only", 0, 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vetted")
    names, searched, chosen = zip(*QUERIES, strict=True)
    pq.write_table(pa.table({"query": names, "count": searched, "chosen": chosen}), folder / "queries.parquet")
    # Searches by their queries' rows; the second writing of boots led to an event, the third query in test alone.
    pq.write_table(pa.table({"query_index": [0, 1, 2, 6]}), folder / "searches.parquet")
    events = {"search": [1, 2, 3, -1], "split": ["train", "test", "train", "train"]}
    pq.write_table(pa.table(events), folder / "events.parquet")
    return folder


def test_queries_of_training_are_counted_over_their_writings(tables):
    found = vetted_queries(tables)
    assert list(zip(found.texts, found.counts.tolist(), strict=True)) == [
        ("靴", 7), ("boots", 5), ("red boots", 4), ("chosen", 2), ("rare", 1),
    ]  # fmt: skip
    assert found.dropped == {"empty": 1, "rarer than min_count": 0, "led to no event": 0, "blocked": 0}


def test_rare_ones_and_those_without_results_are_left_out(tables):
    found = vetted_queries(tables, VettedQueriesConfig(min_count=2, answered_only=True))
    assert found.texts == ("靴", "boots")
    assert found.dropped == {"empty": 1, "rarer than min_count": 1, "led to no event": 2, "blocked": 0}


def test_blocked_words_and_texts(tables, tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_text("BOOTS\n\n rar\n靴\n", encoding="utf-8-sig")
    config = VettedQueriesConfig(block_list=path)
    found = vetted_queries(tables, config)
    assert found.texts == ("chosen", "rare") and found.dropped["blocked"] == 3
    before = config.fingerprint()
    path.write_text("boots\n")
    assert config.fingerprint() != before and VettedQueriesConfig().fingerprint() != config.fingerprint()


def test_words_are_whole_and_side_by_side(tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_text("sex\nhot dog\n!!!\n毒品\n")
    blocked = block_list(path).holds
    assert all(map(blocked, ("sex", "sex-toys", "toys, sex", "a hot dog", "hot-dog stand", "!!!", "买毒品吗")))
    assert not any(map(blocked, ("essex", "hot big dog", "dog hot", "a!!!", "毒", "")))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab -é", max_size=4), max_size=3), st.text("ab -é", max_size=8))
def test_the_block_list_equals_a_loop(tmp_path_factory, lines, text):
    path = tmp_path_factory.mktemp("blocked") / "list.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    text = normalised(text)
    said, expected = words(text), False
    for line in filter(None, map(normalised, lines)):
        part = words(line)
        places = range(len(said) - len(part) + 1)
        expected |= text == line or (bool(part) and any(said[at : at + len(part)] == part for at in places))
    assert block_list(path).holds(text) == expected


def test_bad_lists_are_refused_in_a_sentence(tables, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "all.txt").write_text("\n".join(query for query, *_ in QUERIES))
    (tmp_path / "list.gz").write_bytes(b"no archive")
    for name, message in {
        "latin.txt": r"latin.txt, line 1: byte 0xe9 is no UTF-8",
        "none.txt": r"there is no file .*none.txt",
        "list.gz": r"vetted.block_list: .*list.gz can't be read",
        "all.txt": r"no query of training is left for the vetted list \(1 empty, 5 blocked\)",
        ".": r"there is no file",
    }.items():
        with pytest.raises(UserError, match=message):
            vetted_queries(tables, VettedQueriesConfig(block_list=tmp_path / name))
    with pytest.raises(UserError, match=r"queries.parquet is missing; use a log with searches"):
        vetted_queries(tmp_path)
    with pytest.raises(UserError, match=r"'vetted.min_count' is 0; give 1 or more"):
        VettedQueriesConfig(min_count=0)


def test_a_log_that_tells_of_no_results(tables, tmp_path):
    for name in ("queries", "searches"):
        (tmp_path / f"{name}.parquet").write_bytes((tables / f"{name}.parquet").read_bytes())
    pq.write_table(pa.table({"search": [-1], "split": ["train"]}), tmp_path / "events.parquet")
    with pytest.raises(UserError, match=r"no search led to an event in training, so vetted.answered_only"):
        vetted_queries(tmp_path, VettedQueriesConfig(answered_only=True))
