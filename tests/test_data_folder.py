"""A user's own folder: the three formats agree, and every fault is refused by file, column and row."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import Folder

ITEMS = [
    {"item_id": "p1", "title": "Red shoes", "category": "Shoes", "brand": "A", "price": 10.5,
     "scenario": "product_card", "color": "red"},
    {"item_id": "p2", "title": "Blue shoes", "category": "Shoes", "brand": "B", "price": None,
     "scenario": "product_card", "color": "blue"},
    {"item_id": "v1", "title": "Shoes on film", "category": None, "brand": None, "price": 3,
     "scenario": "short_video", "color": None},
]  # fmt: skip
T = 1_700_000_000
EVENTS = [
    {"user_id": "u1", "item_id": "p1", "timestamp": T, "behavior": "click"},
    {"user_id": "u1", "item_id": "p1", "timestamp": T + 60, "behavior": "purchase"},
    {"user_id": "u1", "item_id": "p2", "timestamp": T + 60 + 1801, "behavior": "purchase"},
    {"user_id": "u2", "item_id": "v1", "timestamp": T, "behavior": "purchase"},
    {"user_id": "u1", "item_id": "v1", "timestamp": T + 9000, "behavior": "purchase"},
]
SEARCHES = [{"user_id": "u1", "timestamp": T - 5, "query": "shoes", "search_id": "q1"}]
SUGGESTIONS = [{"user_id": "u1", "timestamp": T - 9, "prefix": "sh", "query": "shoes", "feedback": "order"}]


def write(folder, name, rows, suffix="jsonl"):
    for old in folder.glob(f"{name}.*"):
        old.unlink()
    path = folder / f"{name}.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "items", ITEMS)
    write(tmp_path, "events", EVENTS)
    return tmp_path


def test_the_formats_agree(folder):
    results = []
    for suffix in ("jsonl", "csv", "parquet"):
        files = {"items": ITEMS, "events": EVENTS, "searches": SEARCHES, "suggestions": SUGGESTIONS}
        for name, rows in files.items():
            write(folder, name, rows, suffix)
        raw = Folder(folder).load()
        tables = (raw.items, raw.events, raw.searches, raw.suggestions)
        results.append([table.order_by(table.columns).to_pyarrow().to_pylist() for table in tables])
    assert results[0] == results[1] == results[2]
    items, events, searches, suggestions = results[0]
    assert items[0] == {"item_id": "p1", "title": "Red shoes", "text": "Red shoes. Shoes. A", "category": "Shoes",
                        "brand": "A", "price": 10.5,
     "scenario": "product_card", "color": "red"}  # fmt: skip
    assert items[2]["text"] == "Shoes on film" and items[1]["price"] is None
    # A pause of more than half an hour begins a session.
    assert [row["session_id"][-1] for row in sorted(events, key=lambda row: (row["user_id"], row["timestamp"]))] == [
        "0",
        "0",
        "1",
        "2",
        "0",
    ]
    assert searches == [{**SEARCHES[0], "session_id": "000000000"}]
    assert suggestions == [{**SUGGESTIONS[0], "session_id": "000000000"}]


@pytest.mark.parametrize("time", ["2023-11-14 22:13:20", "2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_times_may_be_timestamps(folder, time, suffix):
    write(folder, "events", [{**EVENTS[0], "timestamp": time}], suffix)
    assert Folder(folder).load().events.timestamp.to_pyarrow().to_pylist() == [T]


def test_prepared_from_a_folder(folder):
    write(folder, "events", [*EVENTS, {**EVENTS[0], "item_id": "gone"}])
    (folder / "out").mkdir()
    statistics = prepare(Folder(folder), PrepareConfig(), folder / "out")
    assert statistics["dropped"] == {"event of an unknown item": 1}
    assert statistics["users"] == 2 and statistics["test_users"] == 1 and statistics["items"] == 3


def test_session_id_and_further_columns_are_kept(folder):
    rows = [
        {
            **row,
            "session_id": None if n == 0 else "mine",
            "scenario": "product_card",
            "watch_seconds": 1.5,
        }
        for n, row in enumerate(EVENTS)
    ]
    write(folder, "events", rows)
    events = Folder(folder).load().events
    assert {"scenario", "watch_seconds"} <= set(events.columns)
    assert sorted(events.session_id.to_pyarrow().to_pylist()) == ["000000000", "mine", "mine", "mine", "mine"]


def test_users_may_have_profiles(folder):
    write(folder, "users", [{"user_id": "u2", "age": 30, "city": ""}, {"user_id": "u9", "age": 1, "city": "Ulm"}])
    (folder / "out").mkdir()
    prepare(Folder(folder), PrepareConfig(), folder / "out")
    found = pq.read_table(folder / "out" / "users.parquet").to_pylist()
    assert found == [{"user_id": "u1", "age": None, "city": None}, {"user_id": "u2", "age": "30", "city": None}]
    write(folder, "users", [{"user_id": "u1"}, {"user_id": "u1"}])
    with pytest.raises(
        UserError, match=r"users\.jsonl, column 'user_id', row 2: 'u1' occurs twice; give every user one"
    ):
        Folder(folder).load()


def test_product_ids_and_embeddings(folder):
    rows = [{**row, "product_ids": ["p1"] if row["item_id"] == "v1" else [], "embedding": [0.5, 1.0]} for row in ITEMS]
    for suffix in ("jsonl", "parquet"):
        write(folder, "items", rows, suffix)
        items = Folder(folder).load().items.order_by("item_id").to_pyarrow()
        assert items["product_ids"].to_pylist() == [[], [], ["p1"]]
        assert items["embedding"].to_pylist() == [[0.5, 1.0]] * 3 and items["embedding"].type.value_type == pa.float32()
    write(folder, "items", [{**row, "product_ids": "p1|p2"} for row in ITEMS], "csv")
    assert Folder(folder).load().items.to_pyarrow()["product_ids"].to_pylist() == [["p1", "p2"]] * 3


def test_the_width_of_embeddings_is_that_of_the_first_row_wherever_it_stands(folder):
    rows = [json.dumps({**row, "embedding": [0.5, 1.0]}) for row in ITEMS]
    (folder / "items.jsonl").write_text("\n" + "\n".join(rows))
    assert Folder(folder).load().items.to_pyarrow()["embedding"].to_pylist() == [[0.5, 1.0]] * 3
    (folder / "items.jsonl").write_text("\n".join(["", *rows[:2], json.dumps({**ITEMS[2], "embedding": [1.0]})]))
    with pytest.raises(UserError, match="'embedding', row 4: has not the width 2 of row 2"):
        Folder(folder).load()


def changed(rows, place, **values):
    return [{**row, **values} if n == place else row for n, row in enumerate(rows)]


def without(rows, column):
    return [{key: value for key, value in row.items() if key != column} for row in rows]


FAULTS = {
    "no events file": (
        "events",
        None,
        "no events.parquet, events.csv or events.jsonl, and no other file with user_id,",
    ),
    "empty file": ("events", [], "events.jsonl is empty"),
    "missing column": (
        "events",
        without(EVENTS, "behavior"),
        "events.jsonl: the column 'behavior' is missing; say which with --data.columns behavior=...; it has user_id,",
    ),
    "misspelt column": (
        "items",
        [{"item_id": "p1", "titel": "x"}],
        "'title' is missing; say which with --data.columns title=titel$",
    ),
    "unknown behavior": (
        "events",
        changed(EVENTS, 1, behavior="bought"),
        "events.jsonl, column 'behavior', row 2: 'bought' is none of",
    ),
    "float ids": (
        "events",
        [{**row, "user_id": 1.5} for row in EVENTS],
        "column 'user_id', row 1: 1.5 is a floating-point number",
    ),
    "milliseconds": (
        "events",
        changed(EVENTS, 3, timestamp=T * 1000),
        r"column 'timestamp', row 4: 1700000000000 is in milliseconds",
    ),
    "a time in words": (
        "events",
        changed(EVENTS, 3, timestamp="yesterday"),
        "column 'timestamp', row 4: .*yesterday.* is no time",
    ),
    "microseconds": (
        "events",
        changed(EVENTS, 3, timestamp=T * 10**6),
        "row 4: .* is in microseconds; divide by 1,000,0",
    ),
    "nanoseconds": (
        "events",
        changed(EVENTS, 3, timestamp=T * 10**9),
        "row 4: .* is in nanoseconds; divide by 1,000,000",
    ),
    "beyond 64 bits": (
        "events",
        changed(EVENTS, 3, timestamp=2**63),
        "row 4: 9223372036854775808 is no time; write whole",
    ),
    "a date in digits": (
        "events",
        [{**row, "timestamp": 20240531 + n} for n, row in enumerate(EVENTS[:1])],
        "row 1: 20240531 is a date without separators; write it as 2024-05-31",
    ),
    "a date in digits among seconds": (
        "events",
        changed(EVENTS, 2, timestamp=20240531),
        "row 3: 20240531 is a date without separators",
    ),
    "date and time in digits": (
        "events",
        changed(EVENTS, 2, timestamp="20240531180000"),
        "row 3: .* without separators",
    ),
    "day before month": (
        "events",
        changed(EVENTS, 2, timestamp="01-02-2024"),
        "row 3: '01-02-2024' is no time; write whol",
    ),
    "the end of time": (
        "events",
        changed(EVENTS, 2, timestamp="9999-12-31"),
        "row 3: '9999-12-31' is after the year 5138, which is no time of an event",
    ),
    "infinity": ("events", changed(EVENTS, 2, timestamp="infinity"), "row 3: 'infinity' is no time"),
    "a count": (
        "items",
        [{**row, "Count": 3} for row in ITEMS],
        "items.jsonl: the column 'Count' has the name of a column",
    ),
    "float sessions": (
        "events",
        [{**row, "session_id": 1.0} for row in EVENTS],
        "'session_id', row 1: 1.0 is a floating",
    ),
    "an item of floats": (
        "items",
        [{**row, "product_ids": [1.5]} for row in ITEMS],
        "'product_ids', row 1: .1.5. is a flo",
    ),
    "a negative time": ("events", changed(EVENTS, 3, timestamp=-5), "row 4: -5 is before 1970"),
    "mostly unknown items": (
        "events",
        [{**row, "item_id": "x"} for row in EVENTS[:3]] + EVENTS[3:],
        "3 of 5 events .* row 1 \\('x'\\)",
    ),
    "unknown scenario": (
        "events",
        [{**row, "scenario": "radio"} for row in EVENTS],
        "column 'scenario', row 1: 'radio' is none of",
    ),
    "watch_seconds in words": (
        "events",
        [{**row, "watch_seconds": "long"} for row in EVENTS],
        "column 'watch_seconds', row 1",
    ),
    "no users at all": (
        "events",
        [{**row, "user_id": None} for row in EVENTS],
        "no event is left; 5 of 5 rows are an event without a user; say which columns hold .* with --data.columns",
    ),
    "no ids at all": (
        "items",
        [{**row, "item_id": ""} for row in ITEMS],
        "'item_id': is empty in all rows; fill it in, or say which column has it with --data.columns item_id=",
    ),
    "price in words": ("items", changed(ITEMS, 1, price="$ 12"), "items.jsonl, column 'price', row 2: .* is no number"),
    "item scenario": ("items", changed(ITEMS, 0, scenario="card"), "items.jsonl, column 'scenario', row 1: 'card'"),
    "unknown product": (
        "items",
        changed(ITEMS, 2, product_ids=["p1", "p9"]),
        "column 'product_ids', row 3: there is no item 'p9'",
    ),
    "product_ids no list": (
        "items",
        [{**row, "product_ids": 7} for row in ITEMS],
        "'product_ids', row 1: there is no item '7'",
    ),
    "embedding widths": (
        "items",
        [{**row, "embedding": [1.0] * (2 if n == 1 else 3)} for n, row in enumerate(ITEMS)],
        "column 'embedding', row 2: has not the width 3 of row 1",
    ),
    "embedding null": (
        "items",
        changed([{**row, "embedding": [1.0]} for row in ITEMS], 2, embedding=None),
        "'embedding', row 3",
    ),
    "embedding of words": (
        "items",
        [{**row, "embedding": ["a"]} for row in ITEMS],
        "'embedding', row 1: holds something else than numbers",
    ),
    "feedback": (
        "suggestions",
        changed(SUGGESTIONS, 0, feedback="liked"),
        "suggestions.jsonl, column 'feedback', row 1: 'liked' is none of order, item_click, click, show,",
    ),
    "query column": (
        "suggestions",
        without(SUGGESTIONS, "query"),
        "suggestions.jsonl: the column 'query' is missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(folder, fault):
    name, rows, message = FAULTS[fault]
    if rows is None:
        (folder / f"{name}.jsonl").unlink()
    else:
        write(folder, name, rows)
    with pytest.raises(UserError, match=message):
        Folder(folder).load()


def test_faults_of_csv_and_parquet(folder):
    write(folder, "events", changed(EVENTS, 1, timestamp="12:61"), "csv")
    with pytest.raises(UserError, match=r"events.csv, column 'timestamp', row 2: '12:61' is no time"):
        Folder(folder).load()
    (folder / "events.csv").write_text("user_id,item_id,timestamp,behavior\n")
    with pytest.raises(UserError, match=r"events.csv has no rows"):
        Folder(folder).load()
    (folder / "events.csv").unlink()
    (folder / "events.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"events.parquet can't be read as parquet"):
        Folder(folder).load()
    write(folder, "events", [{**row, "timestamp": float(row["timestamp"]) + 0.5} for row in EVENTS], "parquet")
    with pytest.raises(UserError, match=r"events.parquet, column 'timestamp', row 1"):
        Folder(folder).load()


def test_faults_of_parquet_types(folder):
    def refused(name, column, values, message):
        rows = {"items": ITEMS, "events": EVENTS}[name]
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        table = pa.Table.from_pylist(rows)
        if column in table.column_names:
            table = table.drop_columns(column)
        pq.write_table(table.append_column(column, values), folder / f"{name}.parquet")
        with pytest.raises(UserError, match=message):
            Folder(folder).load()

    times = pa.array([2**64 - 1] * 5, pa.uint64())
    refused(
        "events", "timestamp", times, r"'timestamp', row 1: 18446744073709551615 is no time; write whole Unix seconds"
    )
    refused(
        "events", "timestamp", pa.array([20240531] * 5), r"'timestamp', row 1: 20240531 is a date without separators"
    )
    late = pa.array([253402214400] * 5, pa.timestamp("s"))
    refused("events", "timestamp", late, r"'timestamp', row 1: .*9999, 12, 31.* is after the year 5138")
    floats = pa.array([None, 123456789012.0, 1.0, 1.0, 1.0])
    refused(
        "events", "session_id", floats, r"'session_id', row 2: 123456789012.0 is a floating-point number; write ids"
    )
    refused(
        "events", "user_id", floats.cast(pa.decimal128(20, 2)), r"'user_id', row 2: 123456789012.00 is a floating-poi"
    )
    write(folder, "events", EVENTS)
    refused("items", "item_id", pa.array([1.0, 2.0, 3.0]), r"'item_id', row 1: 1.0 is a floating-point number")
    refused(
        "items", "product_ids", pa.array([[1.0], [], []]), r"'product_ids', row 1: \[1.0\] is a floating-point number"
    )
    refused("items", "brand", pa.array([["a"], [], []]), r"column 'brand': holds array<string>; write it as text")
    refused(
        "items", "count", pa.array([1, 2, 3]), r"items.parquet: the column 'count' has the name of a column that prep"
    )
    refused(
        "items", "TITLE", pa.array(["a", "b", "c"]), r"has 'title' and 'TITLE', which are one name; rename one of them"
    )


def test_a_log_that_counts_from_its_own_beginning_may_pass_through_what_looks_like_dates(folder):
    times = [0, 20240531, 20240599]
    write(folder, "events", [{**EVENTS[n], "timestamp": time} for n, time in enumerate(times)], "csv")
    assert sorted(Folder(folder).load().events.timestamp.to_pyarrow().to_pylist()) == times


def test_names_of_columns_in_any_case_and_what_they_were_taken_for(folder, capsys):
    """A missing number is missing as null, empty or NaN, of a price as of a further attribute."""
    rows = [
        {"Item_ID": "p1", "TITLE": "a", "Price": "1.5", "Brand": "A", "Category": "C", "Text": "t", "Stock": "3",
         "ean": "007", "_note": "x"},
        {"Item_ID": "p2", "TITLE": "b", "Price": "", "Brand": "", "Category": "", "Text": "", "Stock": "", "ean": "8",
         "_note": ""},
    ]  # fmt: skip
    write(folder, "items", rows, "csv")
    write(folder, "events", [{**row, "device": "mobile"} for row in EVENTS[:3]], "csv")
    items = Folder(folder).load().items.order_by("item_id").to_pyarrow().to_pylist()
    assert items == [
        {"item_id": "p1", "title": "a", "text": "t", "category": "C", "brand": "A", "price": 1.5,
         "Stock": 3, "ean": "007"},
        {"item_id": "p2", "title": "b", "text": "b", "category": "", "brand": "", "price": None,
         "Stock": None, "ean": "8"},
    ]  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "items.csv: text: item_id, title, brand, category, text, ean; numbers: price, Stock; not used: _note" in said
    assert "events.csv: text: user_id, item_id, behavior; times: timestamp; not used: device" in said
    prices = pa.array([float("nan"), None, 2.5])
    table = pa.table({"item_id": ["a", "p1", "p2"], "title": ["x", "y", "z"], "price": prices})
    (folder / "items.csv").unlink()
    pq.write_table(table, folder / "items.parquet")
    assert Folder(folder).load().items.order_by("item_id").price.to_pyarrow().to_pylist() == [None, None, 2.5]


def test_faults_of_the_folder_and_its_configuration(folder):
    with pytest.raises(UserError, match="there is no folder"):
        Folder(folder / "nowhere").load()
    with pytest.raises(UserError, match="target_behaviors"):
        Folder(folder, target_behaviors=("order",)).load()
    (folder / "items.csv").write_text("item_id,title\n")
    with pytest.raises(UserError, match=r"holds both items.csv and items.jsonl"):
        Folder(folder).load()


def test_fingerprint_follows_content_and_configuration(folder):
    first = Folder(folder).fingerprint()
    assert first == Folder(folder).fingerprint() != Folder(folder, split="time").fingerprint()
    write(folder, "events", EVENTS[:3])
    assert Folder(folder).fingerprint() != first
