"""Logs of texts alone, without items: whole queries, and prefixes with what was suggested for them."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.cleaning import KCore
from jaxrec.data.examples import Records, write_examples
from jaxrec.data.prefix_cuts import PrefixCutConfig
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import SearchLog, SuggestionLines
from jaxrec.data.sources.query_files import visible
from jaxrec.data.splits import TimeSplit
from jaxrec.data.tables import connect, store
from jaxrec.data.words import normalised
from jaxrec.evaluation import prefix_cases
from jaxrec.systems.config import RunConfig
from jaxrec.systems.phases import prepare_with_embeddings


def prepared(source, folder, config=None):
    """(statistics, a function from the name of a table to its rows); the examples are in `examples`."""
    (folder / "tables").mkdir()
    (folder / "examples").mkdir()
    statistics = prepare(source, config or PrepareConfig(), folder / "tables")
    write_examples(folder / "tables", folder / "examples", source.behaviors)
    return statistics, lambda name: pq.read_table(folder / "tables" / f"{name}.parquet").to_pylist()


# ---- whole queries ---------------------------------------------------------------------------------------------------

LOG = """\
a\t970916105432\t"Red  shoes
a\t970916105432\t"Red  shoes
a\t970916105500\t
b\t970916110000\tboots
b\t970916120000\tboots "high"
c\t970917000000\tred socks
c\t970918000000\t \u00a0
c\t970918000000\tred hats
"""
EXCITE = {"columns": ("user", "time", "query"), "quoted": False, "time_format": "%y%m%d%H%M%S"}
DAY = 874_368_000  # 1997-09-16
CONFIG = PrepareConfig(
    time_split=TimeSplit(valid_from=DAY + 86_400, test_from=DAY + 2 * 86_400),
    suggestions=PrefixCutConfig(cut="keystrokes", random=0),
)


def search_log(folder, text=LOG, name="queries.log", **changes):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return SearchLog(folder / name, **{**EXCITE, **changes})


def test_a_log_of_queries_alone_becomes_searches_prefixes_and_records(tmp_path):
    statistics, rows = prepared(search_log(tmp_path), tmp_path, CONFIG)
    assert statistics["dropped"] == {"search without a query": 2, "repeat of a search in its second": 1}
    names = ("user_id", "timestamp", "query", "session", "split")
    assert [tuple(row[name] for name in names) for row in rows("searches")] == [
        ("a", DAY + 39_272, '"Red  shoes', 0, "train"),
        ("b", DAY + 39_600, "boots", 0, "train"),
        ("b", DAY + 43_200, 'boots "high"', 1, "train"),
        ("c", DAY + 86_400, "red socks", 0, "valid"),
        ("c", DAY + 172_800, "red hats", 1, "test"),
    ]
    assert rows("items") == rows("events") == rows("pairs") == [] and statistics["events"] == 0
    suggested = [(row["prefix"], row["query"], row["feedback"]) for row in rows("suggestions") if row["user_id"] == "b"]
    assert suggested[:2] == [("bo", "boots", "click"), ("bo", 'boots "high"', "show")]
    assert {row["user_id"] for row in rows("users")} == {"a", "b", "c"}
    cases = prefix_cases(Records(tmp_path / "examples", "test"), "test")
    assert len(cases) == len("red hats") - 2 and len(Records(tmp_path / "examples", "train")) == 2
    queries = [row["query"] for row in rows("queries")]
    for history, truths in zip(cases.histories, cases.targets, strict=True):
        assert [queries[row] for row in truths] == ["red hats"]
        assert [queries[row] for row in history["search_query"]] == ["red socks"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("last_session", {"a": "train", "b1": "train", "b2": "valid", "b3": "test"}),
        ("leave_one_out", {"a": "train", "b1": "train", "b2": "valid", "b3": "test"}),
    ],
)
def test_searches_are_what_is_held_out_of_a_log_without_events(tmp_path, split, expected):
    text = "user,time,query\na,10,a\nb,10,b1\nb,9000,b2\nb,18000,b3\n"
    source = search_log(tmp_path, text, "q.csv", columns=(), time_format="", split=split)
    _, rows = prepared(source, tmp_path)
    assert {row["query"]: row["split"] for row in rows("searches")} == expected


def test_one_user_and_one_query(tmp_path):
    source = search_log(
        tmp_path, "user,time,query\na,10,tea\n", "q.csv", columns=(), time_format="", split="last_session"
    )
    _, rows = prepared(source, tmp_path, PrepareConfig(suggestions=PrefixCutConfig()))
    assert [(row["prefix"], row["query"], row["feedback"]) for row in rows("suggestions")] == [("te", "tea", "click")]


def test_files_of_other_formats_and_names(tmp_path):
    table = pa.table({"who": ["a", "b"], "when": [5, 7], "what": ["x\x07y ", "\x07"]})
    pq.write_table(table, tmp_path / "q.parquet")
    source = SearchLog(tmp_path / "q.parquet", user="who", time="when", query="what")
    raw = source.load()
    # A query of control characters is an empty one; in others they stay, as typed.
    assert raw.searches.to_pyarrow()["query"].to_pylist() == ["x\x07y "] and raw.dropped["search without a query"] == 1
    with gzip.open(tmp_path / "q.tsv.gz", "wt") as file:
        file.write("5;a;x\n")
    raw = SearchLog(tmp_path / "q.tsv.gz", columns=("time", "user", "query")).load()
    assert raw.searches.to_pyarrow()["query"].to_pylist() == ["x"]
    assert source.fingerprint() != SearchLog(tmp_path / "q.parquet", user="who", time="when").fingerprint()


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (b"a\t970916105432\tx\xffy\n", {}, r"queries.log, column 'query', row 1: the byte 0xff is no UTF-8"),
        ("a\t970916105432\tx\nb\t97\ty\n", {}, r"column 'time', row 2: 97 is no time of the form %y%m%d%H%M%S"),
        ("a\t970916105432\tx\n\t970916105432\ty\n", {}, r"column 'user', row 2: is empty"),
        ("a\t970916105432\tx\ny\n", {}, r"row 2 \(line 2\): has 1 field, `columns` 3; fill it up with tabs"),
        ("a\t970916105432\n", {}, r"row 1: has 2 fields, but `columns` names 3 \(user, time, query\)"),
        ("a\t970916105432\t\n", {}, r"column 'query': all queries are empty"),
        ("a\t970916105432\tx\n", {"time_format": "%Q"}, r"time_format='%Q' can't be read"),
        ("a\t970916105432\tx\n", {"time_format": ""}, r"column 'time', row 1: 970916105432 is in milliseconds"),
        ("a\t970916105432\tx\n", {"columns": ("user", "time")}, r"columns \['user', 'time'\] lacks 'query'"),
        ('a\t970916105432\t"x\n', {"quoted": True}, r"a quote"),
        ("", {}, r"queries.log is empty"),
        ("id\tq\na\tb\n", {"columns": ()}, r"the columns 'user', 'time', 'query' are missing; it has id, q"),
    ],
)
def test_bad_logs_of_queries_are_refused_in_a_sentence(tmp_path, text, changes, message):
    with pytest.raises(UserError, match=message) as error:
        search_log(tmp_path, text, **changes).load()
    assert "\n" not in str(error.value)


def test_half_a_character_is_refused(tmp_path):
    text = '{"user": "a", "time": 5, "query": "x\\ud83d"}\n'
    with pytest.raises(UserError, match=r"q.jsonl, column 'query', row 1: half a character, \\ud83d"):
        search_log(tmp_path, text, "q.jsonl", columns=(), time_format="").load()


def test_a_query_is_empty_where_nothing_is_left_of_it_normalised():
    """Every character by itself but the surrogates, in the engine and in Python."""
    texts = [chr(code) for code in (*range(1, 0xD800), *range(0xE000, 0x11000), *range(0x1F300, 0x1F700), 0xE0041)]
    engine = connect()
    table = store(engine, pa.table({"row": range(len(texts)), "query": texts}))
    seen = table.mutate(seen=visible(table, "query")).order_by("row").to_pyarrow()["seen"].to_pylist()
    assert [
        hex(ord(text)) for text, is_seen in zip(texts, seen, strict=True) if is_seen != bool(normalised(text))
    ] == []


def test_what_a_log_without_items_cannot_do(tmp_path):
    source = search_log(tmp_path)
    with pytest.raises(UserError, match=r"SearchLog has no events, by which prepare.k_core drops"):
        prepare(source, PrepareConfig(k_core=KCore(min_users_per_item=2)), tmp_path)
    with pytest.raises(UserError, match="SearchLog is a log of queries without items, which toy can't recommend"):
        prepare_with_embeddings(None, RunConfig(data=source, system="toy"))


# ---- prefixes with suggestions ---------------------------------------------------------------------------------------

LINES = """\
大\t三角骨,小蛋糕\t大礼包\t大杂烩\t大码睡裙,大杂烩,大豆被,大豆被\t2.0\t0.47
 So\t\tsoap,soup\tsoap dish\tsofa\t0.97\t0.0
y\tx\t\tyes\t\t1.5\t0.6

"""


def lines(folder, text=LINES, **changes):
    (folder / "data.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return SuggestionLines(folder / "data.txt", **changes)


def test_lines_become_users_with_histories_and_suggestions(tmp_path):
    source = lines(tmp_path, valid_buckets=(), test_buckets=())
    statistics, rows = prepared(source, tmp_path)
    assert [(row["user_id"], row["query"], row["timestamp"], row["session"]) for row in rows("searches")] == [
        ("line 1", "三角骨", 0, 0),
        ("line 1", "小蛋糕", 1, 0),
        ("line 3", "x", 0, 0),
    ]
    names = ("user_id", "timestamp", "prefix", "query", "feedback")
    assert sorted(tuple(row[name] for name in names) for row in rows("suggestions")) == sorted([
        ("line 1", 2, "大", "大杂烩", "order"),
        ("line 1", 2, "大", "大码睡裙", "not_show"),
        ("line 1", 2, "大", "大豆被", "not_show"),
        ("line 2", 0, " So", "soap dish", "click"),
        ("line 2", 0, " So", "sofa", "random"),
        ("line 3", 1, "y", "yes", "item_click"),
    ])  # fmt: skip
    assert statistics["dropped"] == {"rejected query that is chosen or repeated": 2}
    assert rows("related_queries") == [
        {"user_id": "line 1", "place": 0, "query": "大礼包"},
        {"user_id": "line 2", "place": 0, "query": "soap"},
        {"user_id": "line 2", "place": 1, "query": "soup"},
    ]
    assert rows("scores")[0] == {"user_id": "line 1", "pos_score": 2.0, "neg_score": 0.47}
    cases = prefix_cases(Records(tmp_path / "examples", "train"), "train")
    assert sorted(len(history["search_query"]) for history in cases.histories) == [0, 1, 2]


def test_lines_are_split_by_their_prefix(tmp_path):
    source = lines(tmp_path, "".join(f"{n}\t\t\tq{n}\t\t1\t0\n{n} \t\t\tr{n}\t\t1\t0\n" for n in range(30)))
    _, rows = prepared(source, tmp_path)
    splits = {}
    for row in rows("suggestions"):
        splits.setdefault(row["prefix"].strip(), set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "valid", "test"}
    assert source.split_of(" 7") == source.split_of("7")


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("a\tb\n", {}, r"data.txt, line 1: has 2 fields, not 7; write prefix, history"),
        ("  \t\t\tq\t\t1\t0\n", {}, r"line 1: the field 'prefix' is empty"),
        ("a\t\t\t\u200b\t\t1\t0\n", {}, r"line 1: the field 'chosen' is empty"),
        ("a\t\t\tb\t\tx\t0\n", {}, r"line 1: the field 'pos_score' is 'x', which is no number"),
        ("a\t\t\tb\t\t1\tnan\n", {}, r"line 1: the field 'neg_score' is 'nan'"),
        (b"a\t\t\t\xed\xa0\xbd\t\t1\t0\n", {}, r"line 1: byte 0xed is no UTF-8"),
        ("\n", {}, r"data.txt is empty"),
        (LINES, {"split": "time"}, r"can only be split by prefix, not by 'time'"),
    ],
)
def test_bad_lines_are_refused_in_a_sentence(tmp_path, text, changes, message):
    with pytest.raises(UserError, match=message):
        lines(tmp_path, text, **changes).load()
