"""A shop's export in its own words goes in unedited: names, behaviors, dialects, dirt, ratings, one file alone."""

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError, from_json, to_json
from jaxrec.data.prepare import PrepareConfig, prepare, survey
from jaxrec.data.sources import Folder

PRODUCTS = """Product ID;Title;Group;Price (EUR);Stock
A-1;Red shoes;Shoes;1.299,00;3
A-2;;Shoes;7,5;0
A-2;Blue shoes, again;Shoes;7,5;0
A-3;Grün;Hüte;;12
"""
LOG = """what,customer,Product ID,created_at
view,u1,A-1,2024-05-31T18:00:00+02:00
buy,u1,A-1,2024-05-31T18:03:00+02:00
view,,A-1,2024-05-31T18:00:00+02:00
scroll,u2,A-1,2024-05-31T18:00:00+02:00
buy,u2,gone,2024-05-31T18:00:00+02:00
buy,u2,A-2,2024-05-31T16:00:00Z
buy,u2,A-3,
"""
COLUMNS = ("item_id=Product ID", "user_id=customer", "timestamp=created_at", "behavior=what", "category=Group",
           "price=Price (EUR)")  # fmt: skip
WORDS = ("buy=purchase", "view=click", "scroll=")
T = 1_717_171_200  # 2024-05-31 16:00:00 UTC


@pytest.fixture
def export(tmp_path):
    (tmp_path / "goods.csv").write_text(PRODUCTS.replace("\n", "\r\n", 2))
    (tmp_path / "log.csv").write_text(LOG)
    return tmp_path


def rows(table, *order):
    return table.order_by(list(order)).to_pyarrow().to_pylist()


def test_an_export_in_other_words_is_read_as_it_is(export, capsys):
    source = Folder(export, columns=COLUMNS, behaviors=WORDS)
    assert source.behaviors == ("click", "purchase"), "in the order of strength, not of the flag"
    raw = source.load()
    items = rows(raw.items, "item_id")
    assert [row["title"] for row in items] == ["Red shoes", "A-2", "Grün"]
    assert [row["price"] for row in items] == [1299.0, 7.5, None] and [row["Stock"] for row in items] == [3, 0, 12]
    assert items[1]["text"] == "Shoes" and items[2]["category"] == "Hüte"
    events = [(row["user_id"], row["item_id"], row["behavior"], row["timestamp"]) for row in
              rows(raw.events, "user_id", "timestamp")]  # fmt: skip
    assert events == [("u1", "A-1", "click", T), ("u1", "A-1", "purchase", T + 180), ("u2", "A-2", "purchase", T)]
    assert {reason: count for reason, count in raw.dropped.items() if count} == {
        "row of an item that was listed before": 1,
        "event without a user": 1,
        "event without a time": 1,
        "event of a behavior that is left out": 1,
        "event of an unknown item": 1,
    }
    assert raw.facts == {"rows_read": {"log.csv": 7, "goods.csv": 4}, "items_without_title": 1}
    said = " ".join(capsys.readouterr().out.split())
    assert "log.csv (events): text: behavior (what), user_id (customer), item_id (Product ID)" in said
    assert "price (Price (EUR)), Stock" in said


def test_parquet_gives_what_csv_gives(export):
    source = Folder(export, columns=COLUMNS, behaviors=WORDS)
    expected = [rows(table, "item_id") for table in (source.load().items, source.load().events)]
    with (export / "log.csv").open(newline="") as file:
        log = pa.Table.from_pylist(
            [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
        )
    times = pa.array([None if time is None else T + 180 * (number == 1) for number, time in
                      enumerate(log["created_at"].to_pylist())], pa.int64())  # fmt: skip
    zoned = times.cast(pa.timestamp("s", "UTC")).cast(pa.timestamp("us", "Europe/Berlin"))
    log = log.set_column(log.column_names.index("created_at"), "created_at", zoned)
    (export / "log.csv").unlink()
    pq.write_table(log, export / "log.parquet")
    read = Folder(export, columns=COLUMNS, behaviors=WORDS).load()
    assert [rows(table, "item_id") for table in (read.items, read.events)] == expected


def test_preparation_says_what_was_kept_and_why_so_many_are_tested(export, capsys):
    source = Folder(export, columns=COLUMNS, behaviors=WORDS)
    (export / "out").mkdir()
    statistics = prepare(source, PrepareConfig(), export / "out")
    said = " ".join(capsys.readouterr().out.split())
    for part in ("read 7 rows of log.csv", "dropped 1 event without a user", "kept 3 events: click 1, purchase 2",
                 "kept 3 items, of which 1 without a title", "tested 0 of 2 users: those with 3 or more sessions",
                 "2 have 1"):  # fmt: skip
        assert part in said
    counts = survey(source, PrepareConfig())
    same = ("users", "items", "events", "dropped", "events_by_split", "test_users", "users_by_target_sessions")
    assert {name: counts[name] for name in same} == {name: statistics[name] for name in same}
    assert counts["train_targets"] == 2 and counts["item_columns"]["Stock"] == "int64"


def message(folder, **fields):
    with pytest.raises(UserError) as error:
        Folder(folder, **fields).load()
    return str(error.value)


def test_every_message_names_the_flag_that_mends_it(export):
    said = message(export)
    assert "log.csv seems to be it" in said and "goods.csv seems to be it" in said and "--data.files items=" in said
    assert "--data.columns user_id=customer item_id='Product ID' timestamp=created_at behavior=..." in said
    said = message(export, columns=COLUMNS)
    assert "--data.behaviors buy=... view=... scroll=..." in said and "'buy' (4 rows)" in said
    said = message(export, columns=COLUMNS, behaviors=WORDS[:2])
    assert "row 4: 'scroll' is none of buy, view" in said and said.count("buy=purchase view=click scroll=...")
    assert "there is no column 'Gruppe'" in message(export, columns=(*COLUMNS[:4], "category=Gruppe"), behaviors=WORDS)
    assert "has no such file; it has goods.csv, log.csv" in message(export, files=("items=products.csv",))
    assert "write TABLE=FILE; tables are items" in message(export, files=("products.csv",))
    assert "--data.target-behaviors click" in message(
        export, columns=COLUMNS, behaviors=("view=click", "buy=", "scroll=")
    )
    (export / "more.csv").write_text(PRODUCTS)
    assert "say which it is with --data.files items=goods.csv" in message(export, columns=COLUMNS, behaviors=WORDS)
    assert Folder(export, columns=COLUMNS, behaviors=WORDS, files=("items=goods.csv",)).load()
    (export / "goods.csv").write_text(PRODUCTS.replace("7,5", "7,5 EUR"))
    said = message(export, columns=COLUMNS, behaviors=WORDS, files=("items=goods.csv",))
    assert "row 1: '1.299,00' is no number" in said and "--data.columns price= leaves the column out" in said
    left = ("price=", *COLUMNS[:5], "Stock=")
    raw = Folder(export, columns=left, behaviors=WORDS, files=("items=goods.csv",)).load()
    assert "Stock" not in raw.items.columns and raw.items.price.count().to_pyarrow().as_py() == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"columns": ("Product ID",)}, 'write OURS=THEIRS, such as item_id="Product ID"'),
        ({"columns": ("itemid=Product ID",)}, "jaxrec has no column 'itemid'; did you mean item_id?"),
        ({"columns": ("title=A", "title=B")}, "gives 'title' twice, as 'A' and 'B'"),
        ({"columns": ("title=A", "text=a")}, "gives the column 'a' two names"),
        ({"behaviors": ("=click",)}, "write WORD=BEHAVIOR, such as view=click"),
        ({"behaviors": ("a=click", "a=cart")}, "gives 'a' twice, as 'click' and 'cart'"),
        ({"behaviors": ("a=",)}, "leaves all events out"),
        ({"behaviors": ("click",), "words": ("a=cart",)}, "data.words has the behavior 'cart'"),
    ],
)
def test_flags_that_contradict_themselves(tmp_path, fields, said):
    with pytest.raises(UserError, match="--data") as error:
        Folder(tmp_path, **fields)
    assert said in str(error.value)


def test_the_configuration_survives_json_and_counts_in_the_fingerprint(export):
    source = Folder(export, columns=COLUMNS, behaviors=WORDS)
    assert from_json(Folder, to_json(source)) == source
    other = Folder(export, columns=COLUMNS, behaviors=("buy=purchase", "view=click", "scroll=click"))
    assert other.behaviors == source.behaviors and other.fingerprint() != source.fingerprint()


def test_a_column_may_be_called_differently_in_each_file(tmp_path):
    (tmp_path / "items.csv").write_text("id,title\n1,a\n2,b\n")
    (tmp_path / "events.csv").write_text("id,user_id,sku,timestamp,behavior\n77,u,1,5,purchase\n")
    columns = ("items.item_id=id", "events.item_id=sku")
    assert rows(Folder(tmp_path, columns=columns).load().events, "item_id")[0]["item_id"] == "1"


# ---- dialects --------------------------------------------------------------------------------------------------------

HEAD, BODY = (
    ("Artikel", "Name", "Menge"),
    [("1", "Käse; alt", "3,25"), ("2", 'Öl "extra"', "1.000,5"), ("3", "Brot", "")],
)


def written(delimiter, ends, encoding):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerows([HEAD, *BODY])
    lines = file.getvalue().split("\n")
    return "".join(line + ends[number % len(ends)] for number, line in enumerate(lines) if line).encode(encoding)


@settings(max_examples=25, deadline=None)
@given(
    delimiter=st.sampled_from([",", ";", "\t", "|", "^", "~"]),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1, max_size=3),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le"]),
)
def test_a_file_is_the_same_in_every_dialect(tmp_path_factory, delimiter, ends, encoding):
    folder = tmp_path_factory.mktemp("dialect")
    (folder / "artikel.csv").write_bytes(written(delimiter, ends, encoding))
    (folder / "events.csv").write_text("user_id,item_id,timestamp,behavior\nu,1,5,purchase\n")
    stated = {"encoding": encoding} if encoding in ("cp1252", "utf-16-le") else {}
    if encoding in ("utf-16-le", "utf-16"):  # the events are in another encoding than the items
        (folder / "events.csv").write_bytes("user_id,item_id,timestamp,behavior\nu,1,5,purchase\n".encode(encoding))
    if delimiter in "^~":
        (folder / "events.csv").write_bytes(
            f"user_id{delimiter}item_id{delimiter}timestamp{delimiter}behavior\nu{delimiter}1{delimiter}5"
            f"{delimiter}purchase\n".encode(encoding)
        )
        stated["delimiter"] = delimiter
    raw = Folder(folder, columns=("item_id=Artikel", "title=Name", "stock=Menge"), **stated).load()
    found = [(row["item_id"], row["title"], row["stock"]) for row in rows(raw.items, "item_id")]
    assert found == [("1", "Käse; alt", 3.25), ("2", 'Öl "extra"', 1000.5), ("3", "Brot", None)]


@pytest.mark.parametrize(
    ("values", "decimal", "found"),
    [
        (["1,5", "2"], "", [1.5, 2]),
        (["1,234", "2,345"], "", ["1,234", "2,345"]),  # perhaps thousands: they stay text
        (["1,234", "2,345"], ",", [1.234, 2.345]),
        (["1,234", "2,5"], "", [1.234, 2.5]),
        (["1.234", "2.5"], "", [1.234, 2.5]),
        (["1.234", "2,5"], ".", ["1.234", "2,5"]),
        (["1,5", "x"], "", ["1,5", "x"]),
        (["1,5", "2.5"], "", ["1,5", "2.5"]),
    ],
)
def test_decimal_commas_are_read_where_nothing_else_can_be_meant(tmp_path, values, decimal, found):
    (tmp_path / "items.csv").write_text("item_id;title;n\n" + "".join(f"{n};t;{v}\n" for n, v in enumerate(values)))
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,behavior\nu,1,5,purchase\n")
    assert [row["n"] for row in rows(Folder(tmp_path, decimal=decimal).load().items, "item_id")] == found


@pytest.mark.parametrize(
    ("time", "fields"),
    [
        ("2024-05-31T16:00:00Z", {}),
        ("2024-05-31 16:00:00 UTC", {}),
        ("2024-05-31T18:00:00.250+0200", {}),
        ("2024-05-31T18:00:00+02", {}),
        (f"{T}000", {"time_unit": "milliseconds"}),
        (f"{T}123456", {"time_unit": "microseconds"}),
        ("31.05.2024 16:00", {"time_format": "%d.%m.%Y %H:%M"}),
    ],
)
def test_times_as_shops_write_them(tmp_path, time, fields):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,behavior\nu,1,{time},purchase\n")
    assert rows(Folder(tmp_path / "log.csv", **fields).load().events, "item_id")[0]["timestamp"] == T


@pytest.mark.parametrize(
    ("time", "flag"),
    [(f"{T}000", "--data.time-unit milliseconds"), ("31.05.2024 16:00", "--data.time-format '%d.%m.%Y")],
)
def test_times_that_need_a_flag_name_it(tmp_path, time, flag):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,behavior\nu,1,{time},purchase\n")
    assert flag in message(tmp_path / "log.csv")


# ---- ratings, and logs of one file -----------------------------------------------------------------------------------

RATINGS = {
    "ratings.csv": ("userId,movieId,rating,timestamp\n1,10,4.0,5\n1,20,2.5,6\n", {
        "columns": ("user_id=userId", "item_id=movieId")}),
    "u.data": ("1\t10\t4\t5\n1\t20\t2\t6\n", {"header": ("user_id", "item_id", "rating", "timestamp")}),
    "ratings.dat": ("1::10::4::5\n1::20::2::6\n", {
        "header": ("user_id", "item_id", "rating", "timestamp"), "delimiter": "::"}),
    "beauty.jsonl": ('{"reviewerID": "1", "asin": "10", "overall": 4.0, "unixReviewTime": 5}\n'
                     '{"reviewerID": "1", "asin": "20", "overall": 2.0, "unixReviewTime": 6}\n', {
        "columns": ("user_id=reviewerID", "item_id=asin", "rating=overall", "timestamp=unixReviewTime")}),
}  # fmt: skip


@pytest.mark.parametrize("name", RATINGS)
def test_a_file_of_ratings_is_a_source(tmp_path, name):
    text, fields = RATINGS[name]
    (tmp_path / name).write_text(text)
    alone = {"behaviors": ("rating",), "target_behaviors": ("rating",), **fields}
    raw = Folder(tmp_path / name, **alone).load()
    assert [(row["item_id"], row["timestamp"], row["behavior"]) for row in rows(raw.events, "item_id")] == [
        ("10", 5, "rating"), ("20", 6, "rating")]  # fmt: skip
    assert [row["title"] for row in rows(raw.items, "item_id")] == ["10", "20"]
    liked = Folder(tmp_path / name, least_rating=3, **alone).load()
    assert [row["item_id"] for row in rows(liked.events, "item_id")] == ["10"]
    assert liked.dropped["event with a rating below 3"] == 1


def test_ratings_may_have_a_table_of_items_beside_others(tmp_path):
    (tmp_path / "ratings.csv").write_text(RATINGS["ratings.csv"][0])
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n10,Heat (1995),Action|Crime\n20,Up,Family\n")
    (tmp_path / "links.csv").write_text("movieId,imdbId\n10,0113277\n")
    columns = ("user_id=userId", "item_id=movieId", "category=genres")
    raw = Folder(tmp_path, behaviors=("rating",), target_behaviors=("rating",), columns=columns).load()
    assert [row["title"] for row in rows(raw.items, "item_id")] == ["Heat (1995)", "Up"]
    assert "the column 'behavior' is missing" in message(tmp_path, columns=columns, files=("events=ratings.csv",))


def test_a_log_of_one_file_tells_of_its_items(tmp_path):
    (tmp_path / "log.csv").write_text(
        "event_time,event_type,product_id,category_code,brand,price,user_id\n"
        "2019-10-01 00:00:00 UTC,view,1,old.name,acme,10.5,u\n2019-10-01 00:00:01 UTC,view,1,phone,acme,9.5,u\n"
        "2019-10-01 00:00:02 UTC,purchase,2,,,,u\n"
    )
    columns = ("timestamp=event_time", "behavior=event_type", "item_id=product_id", "category=category_code")
    source = Folder(tmp_path / "log.csv", columns=columns, behaviors=("view=click", "purchase"))
    items = rows(source.load().items, "item_id")
    assert items[0] == {"item_id": "1", "title": "1", "text": "phone. acme", "category": "phone", "brand": "acme",
                        "price": 9.5}  # fmt: skip
    assert items[1]["text"] == "2" and items[1]["price"] is None
    assert [row["behavior"] for row in rows(source.load().events, "timestamp")] == ["click", "click", "purchase"]


def test_a_header_in_another_encoding_names_the_flag(tmp_path):
    (tmp_path / "waren.csv").write_bytes("Nr;Größe;Titel\n1;ä;b\n".encode("cp1252"))
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,behavior\nu,1,5,purchase\n")
    assert "waren.csv, column 'header', row 0: the byte 0xf6 is no UTF-8; " in (said := message(tmp_path))
    assert "--data.encoding cp1252" in said
    raw = Folder(tmp_path, encoding="cp1252", columns=("item_id=Nr", "title=Titel")).load()
    assert rows(raw.items, "item_id")[0]["Größe"] == "ä"


def test_decimals_of_parquet_are_numbers(tmp_path):
    cost = pa.array(["1.5", "2.5"]).cast(pa.decimal128(20, 2))
    table = pa.table({"item_id": ["1", "2"], "title": ["a", "b"], "price": cost, "cost": cost})
    pq.write_table(table, tmp_path / "items.parquet")
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,behavior\nu,1,5,purchase\n")
    items = Folder(tmp_path).load().items
    assert str(items.price.type()) == str(items.cost.type()) == "float64"


def test_a_run_of_an_earlier_version_lacks_what_came_later(export):
    values = to_json(Folder(export))
    for name in ("columns", "words", "files", "header", "delimiter", "encoding", "time_unit", "least_rating"):
        del values[name]
    assert from_json(Folder, values) == Folder(export)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_ids_that_a_tool_wrote_as_floats_are_read_where_one_says_so(tmp_path, suffix):
    (tmp_path / "items.csv").write_text("item_id,title\n12,a\n")
    floats = pa.table(
        {"user_id": [7.0, None], "item_id": ["12"] * 2, "timestamp": [5, 6], "behavior": ["purchase"] * 2}
    )
    if suffix == "parquet":
        pq.write_table(floats, tmp_path / "events.parquet")
    elif suffix == "jsonl":
        line = '{"user_id": %s, "item_id": 12.0, "timestamp": 5, "behavior": "purchase"}\n'
        (tmp_path / "events.jsonl").write_text(line % "7.0" + line % "NaN")
    else:
        (tmp_path / "events.csv").write_text(
            "user_id,item_id,timestamp,behavior\n7.0,12.0,5,purchase\n,12.0,5,purchase\n"
        )
    if suffix != "csv":
        assert "; or give --data.whole-ids True, which reads 12.0 as 12" in message(tmp_path)
    raw = Folder(tmp_path, whole_ids=True).load()
    assert [(row["user_id"], row["item_id"]) for row in rows(raw.events, "item_id")] == [("7", "12")]
    assert raw.dropped["event without a user"] == 1
