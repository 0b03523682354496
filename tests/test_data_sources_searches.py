"""Sources of searches: click logs, judged pairs, KuaiSearch's schema; the tables that they are prepared into."""

import gzip
import hashlib
import json

import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.examples import Records, write_examples
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import ClickLog, JudgedPairs, KuaiSearch, SyntheticMall
from jaxrec.data.splits import TimeSplit
from jaxrec.evaluation.cases import search_cases


def prepared(source, folder, config=None):
    """(statistics, a function from the name of a table to its rows)."""
    folder.mkdir()
    statistics = prepare(source, config or PrepareConfig(), folder)
    return statistics, lambda name: pq.read_table(folder / f"{name}.parquet").to_pylist()


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---- click logs ------------------------------------------------------------------------------------------------------

CLICKS = """user\tquery_time\tclick_time\tsku\tquery
1\t2011-08-11 05:00:00.25\t2011-08-11 05:00:09\t007\tXbox  360
1\t2011-08-11 05:00:00.25\t2011-08-11 05:01:00\t8\tXbox  360
2\t2011-08-11 06:00:00\t2011-08-11 06:00:05\t007\txbox 360
2\t2011-08-11 06:10:00\t2011-08-11 06:10:05\t007\thalo
2\t2011-08-11 06:15:00\t2011-08-11 06:15:05\t007\tmario
3\t2011-08-12 06:00:00\t2011-08-12 06:00:05\t007\tzelda
3\t2011-08-13 06:00:00\t2011-08-13 06:00:05\t9\tonly in test
"""
BEST_BUY = {"time": "query_time", "event_time": "click_time", "item": "sku"}
BOUNDARIES = PrepareConfig(time_split=TimeSplit(valid_from=1_313_100_000, test_from=1_313_200_000))


def click_log(folder, text=CLICKS, **changes):
    with gzip.open(folder / "clicks.tsv.gz", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return ClickLog(folder / "clicks.tsv.gz", **{**BEST_BUY, **changes})


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks")
    return prepared(click_log(folder, query_texts=2), folder / "out", BOUNDARIES)


def test_a_search_is_a_user_a_time_and_a_query(clicks):
    statistics, rows = clicks
    searches, events = rows("searches"), rows("events")
    assert statistics["searches"] == 6 and statistics["events"] == 7
    assert [(row["user_id"], row["timestamp"], row["query"], row["split"]) for row in searches] == [
        ("1", 1_313_038_800, "Xbox  360", "train"),
        ("2", 1_313_042_400, "xbox 360", "train"),
        ("2", 1_313_043_000, "halo", "train"),
        ("2", 1_313_043_300, "mario", "train"),
        ("3", 1_313_128_800, "zelda", "valid"),
        ("3", 1_313_215_200, "only in test", "test"),
    ]
    led = [(row["item_id"], row["timestamp"], row["behavior"], searches[row["search"]]["query"]) for row in events]
    assert led[:3] == [
        ("007", 1_313_038_809, "click", "Xbox  360"),
        ("8", 1_313_038_860, "click", "Xbox  360"),
        ("007", 1_313_042_405, "click", "xbox 360"),
    ]
    # A pause of less than half an hour is inside a session.
    assert [row["session"] for row in searches] == [0, 0, 0, 0, 0, 1]


def test_items_without_a_text_have_the_text_of_their_training_queries(clicks):
    """In every spelling, the most frequent first, two of them here; none of validation or test."""
    statistics, rows = clicks
    assert {row["item_id"]: (row["title"], row["text"]) for row in rows("items")} == {
        "007": ("xbox 360", "xbox 360. halo"),  # not mario, which comes after halo
        "8": ("xbox 360", "xbox 360"),
        "9": ("9", "9"),
    }
    assert statistics["items_without_text"] == 1


def test_a_file_of_items_gives_their_texts(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title,genre\n007,Console,games\n8,Pad,\n9,Game,games\n")
    source = click_log(tmp_path, items=tmp_path / "items.csv")
    statistics, rows = prepared(source, tmp_path / "out", BOUNDARIES)
    assert [(row["title"], row["genre"]) for row in rows("items")] == [
        ("Console", "games"),
        ("Pad", None),
        ("Game", "games"),
    ]
    assert "items_without_text" not in statistics
    assert source.fingerprint() != click_log(tmp_path).fingerprint()


def test_a_click_log_of_several_behaviors_and_another_encoding(tmp_path):
    text = "user,time,query,item,behavior\na,100,caf\xe9,1,click\na,100,caf\xe9,2,exposure\na,9000,tea,1,click\n"
    (tmp_path / "log.csv").write_bytes(text.encode("cp1252"))
    source = ClickLog(tmp_path / "log.csv", behaviors=("exposure", "click"), encoding="cp1252", split="last_session")
    _, rows = prepared(source, tmp_path / "out")
    searches = rows("searches")
    assert [row["query"] for row in searches] == ["caf\xe9", "tea"]
    assert [(row["behavior"], row["search"]) for row in rows("events")] == [("exposure", 0), ("click", 0), ("click", 1)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\thalo", "\t ", r"clicks.tsv.gz, column 'query', row 4: is empty; fill it in"),
        (
            "2011-08-11 05:00:09",
            "2011-08-11 04:00:09",
            r"column 'click_time', row 1: '2011-08-11 04:00:09' is before its",
        ),
        ("2\t2011-08-11 06:00:00", "2\tyesterday", r"column 'query_time', row 3: 'yesterday' is no time"),
        ("\t9\t", "\t\t", r"column 'sku', row 7: is empty"),
        ("3\t2011-08-13", "\t2011-08-13", r"column 'user', row 7: is empty"),
        ("sku", "article", r"clicks.tsv.gz: the column 'sku' is missing"),
        ("\tzelda", "\tz\xe9lda\t", r"row 6 \(line 7\): has 6 fields, the header 5"),
    ],
)
def test_faults_of_click_logs(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        click_log(tmp_path, CLICKS.replace(old, new, 1)).load()


def test_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"column 'query', row 4: the byte 0xe9 is no UTF-8; save the file as UTF-8"):
        click_log(tmp_path, CLICKS.replace("halo", "h\xe9lo").encode("latin-1")).load()
    with pytest.raises(UserError, match=r"column 'query', row 4: the byte 0x81 is no CP1252; save the file as UTF-8"):
        click_log(tmp_path, CLICKS.replace("halo", "h\x81lo").encode("latin-1"), encoding="cp1252").load()
    with pytest.raises(UserError, match=r"there is no file .*other.csv; correct the path"):
        ClickLog(tmp_path / "other.csv").load()
    (tmp_path / "clicks.tsv.gz").write_text(CLICKS)
    with pytest.raises(UserError, match=r"clicks.tsv.gz can't be unpacked"):
        ClickLog(tmp_path / "clicks.tsv.gz", **BEST_BUY).load()
    (tmp_path / "clicks.xls").write_text(CLICKS)
    with pytest.raises(UserError, match=r"clicks.xls is no table that can be read"):
        ClickLog(tmp_path / "clicks.xls", **BEST_BUY).load()


# ---- judged pairs ----------------------------------------------------------------------------------------------------

TITLES = {"1": "Steel angle bracket for shelves", "2": "Bracket", "3": "Deck paint", "4": "angle"}


def bucket(query):
    return int(hashlib.md5(query.encode()).hexdigest(), 16) % 10


def judged_pairs(folder, rows=None, **changes):
    """Five queries, whose buckets decide their splits; `angle` is held out too, and the title of a product."""
    rows = rows or [
        ("l bracket", "1", "3"), ("l bracket", "2", "2.33"), ("l bracket", "3", "1"),
        ("paint", "3", "2.67"), ("angle", "1", "3"), ("angle", "4", "2"), ("rare", "2", "1.33"),
    ]  # fmt: skip
    (folder / "pairs.tsv").write_text("query\tproduct\tgrade\n" + "".join("\t".join(row) + "\n" for row in rows))
    (folder / "products.csv").write_text("id,title,maker\n" + "".join(f"{k},{v},Acme\n" for k, v in TITLES.items()))
    columns = {"item": "product", "test_buckets": (bucket("angle"),), "valid_buckets": (bucket("paint"),)}
    return JudgedPairs(folder / "pairs.tsv", folder / "products.csv", **{**columns, **changes})


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    source = judged_pairs(folder, title_parts=2)
    return source, *prepared(source, folder / "out"), folder


def test_judged_queries_are_split_by_their_hash_and_lead_to_relevant_items(judged):
    source, statistics, rows, _ = judged
    of = {query: source.split_of(query) for query in ("l bracket", "paint", "angle", "rare")}
    assert (of["angle"], of["paint"]) == ("test", "valid")
    searches, queries = rows("searches"), [row["query"] for row in rows("queries")]
    judged = {row["query"]: row["split"] for row in searches if row["user_id"].startswith("query: ")}
    assert judged == of
    led = {(searches[row["search"]]["query"], row["item_id"], row["behavior"], row["split"]) for row in rows("events")}
    assert {row for row in led if row[2] == "relevant"} == {
        ("l bracket", "1", "relevant", of["l bracket"]),
        ("l bracket", "2", "relevant", of["l bracket"]),
        ("paint", "3", "relevant", "valid"),
        ("angle", "1", "relevant", "test"),
    }
    grades = {(queries[r["query_index"]], r["item"] + 1): (r["grade"], r["split"]) for r in rows("judgments")}
    assert grades == {
        ("l bracket", 1): (3.0, of["l bracket"]), ("l bracket", 2): (2.33, of["l bracket"]),
        ("l bracket", 3): (1.0, of["l bracket"]), ("paint", 3): (2.67, "valid"), ("angle", 1): (3.0, "test"),
        ("angle", 4): (2.0, "test"), ("rare", 2): (1.33, of["rare"]),
    }  # fmt: skip
    assert statistics["judgments"] == 7 and [row["maker"] for row in rows("items")] == ["Acme"] * 4


def test_all_writings_of_a_judged_query_are_in_one_split(tmp_path):
    """Else a query of test would be trained on in another writing."""
    source = judged_pairs(
        tmp_path, [("angle", "1", "3"), ("Angle ", "4", "3"), ("ＡＮＧＬＥ", "2", "3"), ("x", "3", "3")]
    )
    assert {bucket(query) for query in ("Angle", "ANGLE", "ＡＮＧＬＥ")} != {bucket("angle")}
    assert {source.split_of(query) for query in ("angle", "Angle ", " ANGLE", "ＡＮＧＬＥ")} == {"test"}
    searches = source.load().searches.to_pyarrow().to_pylist()
    splits = {row["query"]: row["given_split"] for row in searches if row["user_id"].startswith("query: ")}
    assert {query for query, split in splits.items() if split == "test"} >= {"angle", "ＡＮＧＬＥ"}


def test_titles_and_parts_of_them_are_queries_in_training_alone(judged, tmp_path):
    source, _, rows, _ = judged
    searches, found = rows("searches"), {}
    for row in rows("events"):
        if row["behavior"] == "title":
            assert row["split"] == "train" == searches[row["search"]]["split"]
            found.setdefault(row["item_id"], []).append(searches[row["search"]]["query"])
    assert sorted(found) == ["1", "2", "3"], "the title of 4 is a query of test"
    for item, texts in found.items():
        assert TITLES[item] in texts and len(set(texts)) == len(texts)
        assert all(f" {text} " in f" {TITLES[item]} " for text in texts)
    assert 1 < len(found["1"]) <= 3 and len(found["2"]) == len(found["3"]) == 1
    without = judged_pairs(tmp_path, titles_as_queries=False).load().events.to_pyarrow()
    assert without["behavior"].to_pylist() == ["relevant"] * 4
    assert source.load().events.to_pyarrow().equals(source.load().events.to_pyarrow())


def test_a_judged_query_is_a_case_with_an_empty_history(judged, tmp_path):
    source, statistics, rows, folder = judged
    (tmp_path / "examples").mkdir()
    write_examples(folder / "out", tmp_path / "examples", source.behaviors, statistics["answer_time"])
    cases = search_cases(Records(tmp_path / "examples", "test"), (0, 1), "test")
    assert len(cases) == 1 and cases.targets.tolist() == [[0]] and not len(cases.histories[0]["item"])
    assert rows("queries")[cases.histories[0]["query"]]["query"] == "angle"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("q", "1", "3.5"), r"pairs.tsv, column 'grade', row 2: 3.5 is outside of the scale from 1 to 3; correct it"),
        (("q", "1", "good"), r"column 'grade', row 2: 'good' is no number"),
        (("q", "1", ""), r"column 'grade', row 2: is empty; grade the pair"),
        (
            ("q", "77", "3"),
            r"column 'product', row 2: 77 is no item of products.csv; add it there, or set unknown_items",
        ),
        ((" ", "1", "3"), r"column 'query', row 2: is empty"),
        (("paint", "3", "2"), r"column 'product', row 2: 3 was judged for this query before; keep one of the rows"),
    ],
)
def test_faults_of_judged_pairs(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        judged_pairs(tmp_path, [("paint", "3", "3"), row]).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relevant": 4}, r"relevant=4 must be within grades"),
        ({"test_buckets": (10,)}, r"test_buckets=\(10,\) must be numbers from 0 to 9"),
        ({"test_buckets": (2,), "valid_buckets": (2, 3)}, r"share a bucket"),
        ({"split": "time"}, r"no users and no times to split by"),
        ({"encoding": "martian"}, r"encoding='martian' can't be read"),
        ({"title": "maker's"}, r"the column \"maker's\" is missing; rename 'maker'"),
    ],
)
def test_settings_of_judged_pairs_that_cant_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        judged_pairs(tmp_path, **changes).load()


def test_judgments_of_unknown_items_are_dropped_where_one_says_so(tmp_path):
    rows = [("paint", "3", "3"), ("paint", "77", "3")]
    statistics, _ = prepared(judged_pairs(tmp_path, rows, unknown_items="drop"), tmp_path / "out")
    assert statistics["dropped"] == {"judgment of an unknown item": 1} and statistics["judgments"] == 1


# ---- KuaiSearch ------------------------------------------------------------------------------------------------------


def kuai_search(folder, **changes):
    items = [{"item_id": n, "item_title": f"\u8863\u670d {n}", "brand_name": "B", "seller_name": "S",
              "category_level1_name": "Wear", "category_level2_name": "Coats", "category_level3_name": "UNKNOWN"}
             for n in range(1, 5)]  # fmt: skip
    searches = [
        {"user_id": 7, "session_id": 1, "impressed_item_ids": [1, 2, 3], "clicked_item_ids": [2],
         "purchased_item_ids": [], "time_index": 50, "query": "\u5927\u8863", "split": "train"},
        {"user_id": 7, "session_id": 2, "impressed_item_ids": [3, 99], "clicked_item_ids": [3],
         "purchased_item_ids": [3], "time_index": 60, "query": "coat", "split": "test"},
        {"user_id": 8, "session_id": 3, "impressed_item_ids": [99], "clicked_item_ids": [99],
         "purchased_item_ids": [], "time_index": 40, "query": "Hat", "split": "train"},
    ]  # fmt: skip
    lines(folder / "items.jsonl", items), lines(folder / "recall.jsonl", searches)
    lines(folder / "users.jsonl", [{"user_id": 7, "gender": "F", "age_bucket": "31-40"}])
    return KuaiSearch(folder, **changes)


def test_what_a_search_showed_is_below_what_was_clicked_and_purchased(tmp_path):
    statistics, rows = prepared(kuai_search(tmp_path), tmp_path / "out")
    searches = rows("searches")
    assert [(row["user_id"], row["query"], row["split"]) for row in searches] == [
        ("7", "\u5927\u8863", "train"), ("7", "coat", "test"), ("8", "Hat", "train"),
    ]  # fmt: skip
    assert [(row["item_id"], row["behavior"], row["search"], row["split"]) for row in rows("events")] == [
        ("1", "exposure", 0, "train"), ("2", "exposure", 0, "train"), ("3", "exposure", 0, "train"),
        ("2", "click", 0, "train"), ("3", "exposure", 1, "test"), ("3", "click", 1, "test"),
        ("3", "purchase", 1, "test"),
    ]  # fmt: skip
    assert statistics["dropped"] == {"event of an unknown item": 3}
    assert rows("users") == [
        {"user_id": "7", "gender": "F", "age_bucket": "31-40"}, {"user_id": "8", "gender": None, "age_bucket": None},
    ]  # fmt: skip
    item = rows("items")[0]
    assert (item["category"], item["brand"], item["seller"]) == ("Coats", "B", "S")
    assert item["text"] == "\u8863\u670d 1. Wear. Coats. B"


def test_unknown_items_are_kept_where_one_says_so(tmp_path):
    statistics, rows = prepared(kuai_search(tmp_path, keep_unknown=True), tmp_path / "out")
    assert {row["item_id"]: row["text"] for row in rows("items")}["99"] == "hat"
    assert statistics["dropped"] == {} and statistics["items_without_text"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": " "}, r"recall.jsonl, line 1: the query is missing"),
        ({"split": "dev"}, r"line 1: the split 'dev' is none of train, valid, test"),
        ({"time_index": "noon"}, r"line 1: the time_index noon is no whole number"),
        ({"impressed_item_ids": 5}, r"line 1: 'impressed_item_ids' is no list"),
        ({"impressed_item_ids": [1.5]}, r"line 1: 'impressed_item_ids' 1.5 is a floating-point number"),
        ({"user_id": None}, r"line 1: the field 'user_id' is missing"),
        ({"impressed_item_ids": [50, 51, 52, 53]}, r"7 of 11 listed items are not in items.jsonl, the first is '50'"),
    ],
)
def test_faults_of_kuai_search(tmp_path, change, message):
    source = kuai_search(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text(encoding="utf-8").splitlines()]
    lines(tmp_path / "recall.jsonl", [{**rows[0], **change}, *rows[1:]])
    with pytest.raises(UserError, match=message):
        source.load()


# ---- given splits ----------------------------------------------------------------------------------------------------


def test_a_source_without_splits_is_not_split_as_given(tmp_path):
    with pytest.raises(UserError, match="SyntheticMall gives no splits; set its split to something else"):
        prepared(SyntheticMall(users=4, items=20, tastes=2, tastes_per_user=1, split="given"), tmp_path / "out")
    source = kuai_search(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text(encoding="utf-8").splitlines()]
    lines(tmp_path / "recall.jsonl", [{**rows[0], "split": "test"}, {**rows[1], "split": "train"}])
    _, table = prepared(source, tmp_path / "fallen")
    assert {row["split"] for row in table("events")} == {"test"}, "training never holds what came after a test session"
