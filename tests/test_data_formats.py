"""Readers of a user's files: every record of a CSV file, and identifiers and texts as they are written."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import Folder, csv_records, formats
from jaxrec.data.sources.formats import Wanted, read_file
from jaxrec.data.tables import connect, free
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import parse_request

ITEMS = Wanted(("item_id", "title"), required=("item_id", "title"), ids=("item_id",), further=True)


@pytest.fixture(scope="module")
def engine():
    return connect()


@pytest.fixture
def small_chunks(monkeypatch):
    """Files are read a few rows at once, so that small ones have several chunks."""
    monkeypatch.setattr(csv_records, "CHUNK_ROWS", 3)


def read(engine, path, text, wanted=ITEMS):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table, _ = read_file(engine, path, wanted)
    rows = table.order_by("_row").to_pyarrow().to_pylist()
    free(engine, table)
    return rows


CELLS = st.text(st.one_of(st.sampled_from("\",;\t#\\'| \n\r"), st.characters(exclude_categories=["Cs"])), max_size=6)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;\t"),
    style=st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r")]),
    mark=st.booleans(),
)
def test_rows_read_are_the_records_of_the_file(tmp_path_factory, engine, rows, delimiter, style, mark):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=style[0], lineterminator=style[1])
    writer.writerows([("item_id", "title", "note"), *rows])
    path = tmp_path_factory.getbasetemp() / "items.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_records, "CHUNK_ROWS", 3)
        patch.setattr(formats, "_with_numbers", lambda table, _: table)
        found = read(engine, path, ("\ufeff" * mark + file.getvalue()).encode())
    names = ("item_id", "title", "note")
    expected = [dict(zip(names, (cell or None for cell in row), strict=True)) for row in rows]
    assert found == [{**row, "_row": number} for number, row in enumerate(expected, 1)]


def test_nothing_of_a_csv_file_is_taken_for_a_comment_or_a_line_to_skip(engine, tmp_path):
    found = read(engine, tmp_path / "items.csv", "item_id,title\n1,a\n#2,b\n3,c\n")
    assert [row["item_id"] for row in found] == ["1", "#2", "3"]


@pytest.mark.parametrize("title", ["shoe, red", "shoe\nred", 'shoe "red"'])
def test_quotes_that_begin_late_are_quotes(engine, tmp_path, title):
    quoted = '"' + title.replace('"', '""') + '"'
    lines = ["item_id,title", *(f"{n},{quoted if n == 25_000 else 'plain'}" for n in range(30_000))]
    found = read(engine, tmp_path / "items.csv", "\n".join(lines))
    assert len(found) == 30_000 and found[25_000] == {"item_id": "25000", "title": title, "_row": 25_001}


def test_line_ends_may_be_mixed_and_lines_blank(engine, tmp_path, small_chunks):
    text = "item_id,title\r\n1,a\n\n\n\n\n2,b\r3,c\r\n\r\n4,d"
    assert [row["item_id"] for row in read(engine, tmp_path / "items.csv", text)] == ["1", "2", "3", "4"]


TWO_TABLES = "item_id,title\n" + "1,a\n" * 1000 + "item_id,title,brand\n" + "2,b,c\n" * 20
CSV_FAULTS = {
    "two tables": (TWO_TABLES, r"row 1001 \(line 1002\): has 3 fields, the header 2; quote the field that holds a"),
    "a comma too many": ("item_id,title\n1,a\n2,b, c\n", r"row 2 \(line 3\): has 3 fields, the header 2"),
    "after a line break": ('item_id,title\n1,"a\nb"\n2\n', r"row 2 \(line 4\): has 1 field, the header 2; fill it up"),
    "a tab too many": ("item_id\ttitle\n1\ta\tb\n", r"row 1 \(line 2\): has 3 fields.* that holds a tab"),
    "an open quote": ('item_id,title\n1,a\n2,"b\n3,c\n', r"row 2 \(line 3\): a quote is opened and not closed"),
    "backslashes": ('item_id,title\n1,"a \\"b\\""\n', r"row 1 \(line 2\): text follows a closing quote; write `\"`"),
    "an open header": ('item_id,"title\n1,a\n', r"line 1: a quote in the header is not closed"),
    "another delimiter": ("item_id^title\n1^a\n", r"the header is one column, 'item_id.title'; .*--data.delimiter"),
    "Latin-1": ("item_id,title\n1,a\n2,café\n".encode("latin1"), r"row 2: the byte 0xe9 is no UTF-8; .*cp1252"),
    "UTF-16 without mark": ("item_id,title\n1,a\n".encode("utf-16-le"), r"row 1: this is UTF-16; give --data.encoding"),
    "blank lines alone": ("\n\n", r" is empty; it needs the columns item_id, title"),
    "a name twice": ("item_id,title,size,Size\n1,a,1,2\n", r"has 'size' and 'Size', which are one name; rename one"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_faults_of_csv(engine, tmp_path, small_chunks, fault):
    text, message = CSV_FAULTS[fault]
    with pytest.raises(UserError, match=r"items\.csv.*" + message):
        read(engine, tmp_path / "items.csv", text)


JSONL_FAULTS = {
    "an array": ('[{"item_id": "1", "title": "a"}]', r"line 1: a JSON list; write one JSON object a line, without"),
    "an array of many lines": ('[\n{"item_id": "1", "title": "a"}\n]', r"line 1: a JSON list; write one JSON object a"),
    "no JSON": ('{"item_id": "1", "title": "a"}\n{"item_id": }\n', r"line 2: no valid JSON"),
    "infinity": ('{"item_id": "1", "title": "a", "x": Infinity}', r"line 1: no valid JSON \(Infinity is no number"),
    "a float id": ('\n{"item_id": 1.0, "title": "a"}', r"column 'item_id', row 2: 1.0 is a floating-point number; "),
    "an exponent": ('{"item_id": 1e5, "title": "a"}', r"column 'item_id', row 1: 1e5 is a floating-point number"),
    "an object": ('{"item_id": {"a": 1}, "title": "a"}', r"column 'item_id', row 1: holds an object; write ids"),
    "now a list": (
        "".join(f'{{"item_id": "{n}", "title": "a", "x": {"[1]" if n == 4 else 1}}}\n' for n in range(6)),
        r"column 'x', row 5: holds a list; give all rows a list, or none",
    ),
    "half a character": ('{"item_id": "1", "title": "\\ud800"}', r"column 'title', row 1: half a character, .ud800,"),
    "Latin-1": ('{"item_id": "1", "title": "é"}'.encode("latin1"), r"line 1: byte 0xe9 is no UTF-8; save the file as"),
    "UTF-16": ('{"item_id": "1", "title": "a"}'.encode("utf-16"), r"row 1: this is UTF-16; save the file as UTF-8"),
    "blank lines alone": ("\n\n", r" has no rows; it needs the columns item_id, title"),
}  # fmt: skip


@pytest.mark.parametrize("fault", JSONL_FAULTS)
def test_faults_of_jsonl(engine, tmp_path, small_chunks, fault):
    text, message = JSONL_FAULTS[fault]
    with pytest.raises(UserError, match=r"items\.jsonl.*" + message):
        read(engine, tmp_path / "items.jsonl", text)


def test_types_of_jsonl(engine, tmp_path, small_chunks):
    """Further columns are numbers if all rows are; else they are as written, also where a chunk is uniform."""
    rows = [
        '{"item_id": 7, "title": 1.50, "n": 1, "x": 1, "mixed": 1, "large": 1, "flag": true, "tags": [1, "a"]}',
        '{"item_id": "a12", "title": true, "n": 2, "x": NaN, "mixed": 2.0, "flag": null, "tags": null}',
        "",
        '{"item_id": "é", "title": "null", "n": 3, "x": 0.5, "mixed": 3}',
        '{"item_id": 123456789012345678901234, "title": {"a": [1.50, null]}, "mixed": "4", "late": ["b"]}',
        '{"item_id": false, "title": "5", "large": 9223372036854775808}',
    ]
    found = read(engine, tmp_path / "items.jsonl", "\ufeff" + "\n".join(rows))
    columns = {name: [row[name] for row in found] for name in found[0]}
    assert columns == {
        "item_id": ["7", "a12", "é", "123456789012345678901234", "false"],
        "title": ["1.50", "true", "null", '{"a": [1.50, null]}', "5"],
        "n": [1, 2, 3, None, None],
        "x": [1.0, None, 0.5, None, None],
        "mixed": ["1", "2.0", "3", "4", None],
        "large": ["1", None, None, None, "9223372036854775808"],
        "flag": [True, None, None, None, None],
        "tags": [["1", "a"], None, None, None, None],
        "late": [None, None, None, ["b"], None],
        "_row": [1, 2, 4, 5, 6],
    }


def test_numbers_of_csv(engine, tmp_path, small_chunks):
    """Codes are no numbers: their zeros count, and so do digits beyond those that a number keeps."""
    text = """item_id,title,n,x,code,large,mixed,none,huge
        1,7,1,1,007,1,1,,1
        2,1.0,-2,1.5,8,9223372036854775808,2.5,,1e999
        3,1e5,,-1e-3,9,3,three,,2
        4,true,4,,10,4,4,,3"""
    found = read(engine, tmp_path / "items.csv", text.replace("        ", ""))
    columns = {name: [row[name] for row in found] for name in found[0]}
    assert columns == {
        "item_id": ["1", "2", "3", "4"],
        "title": ["7", "1.0", "1e5", "true"],
        "n": [1, -2, None, 4],
        "x": [1.0, 1.5, -0.001, None],
        "code": ["007", "8", "9", "10"],
        "large": ["1", "9223372036854775808", "3", "4"],
        "mixed": ["1", "2.5", "three", "4"],
        "none": [None] * 4,
        "huge": ["1", "1e999", "2", "3"],
        "_row": [1, 2, 3, 4],
    }
    assert isinstance(columns["n"][0], int)


# ---- from the shop's file to the answer ------------------------------------------------------------------------------

IDS = ["25-11-2025", "10:30", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "7", "a12", "007", "1e5", "true", "null", "1.0",
       "NaN", "+1", "é", "e\u0301", " x ", "1_000", "2024-05-31T18:00:00Z", "#1"]  # fmt: skip


class Everything:
    """Recommends the whole catalogue."""

    def recommend(self, histories, k, **_):
        size = min(k, len(IDS))
        items = np.full((len(histories), k), -1, np.int32)
        items[:, :size] = np.arange(size)
        return items, np.zeros((len(histories), k), np.float32)


def write(path, columns):
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        # 7 as a number, beside texts.
        lines = [json.dumps(row, ensure_ascii=False).replace('"7"', "7") for row in rows]
        path.write_text("\n".join(lines))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *(row.values() for row in rows)])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_answers_carry_the_ids_of_the_file_byte_for_byte(tmp_path, suffix):
    events = {
        "user_id": IDS,
        "item_id": IDS,
        "timestamp": [1_700_000_000] * len(IDS),
        "behavior": ["purchase"] * len(IDS),
    }
    write(tmp_path / f"items.{suffix}", {"item_id": IDS, "title": IDS[::-1]})
    write(tmp_path / f"events.{suffix}", events)
    run = tmp_path / "run"
    (run / "tables").mkdir(parents=True)
    prepare(Folder(tmp_path), PrepareConfig(), run / "tables")
    (run / "config.json").write_text('{"system": "none"}')
    retriever = Retriever(run, Everything())
    for id in IDS:
        asked = {"history": [{"item_id": id}]}, {"user_id": id}
        for answer in retriever.answer([parse_request(json.dumps({**each, "k": 50})) for each in asked]):
            assert answer.source == "model" and answer.ignored is None
            items = json.loads(answer.to_json())["items"]
            assert {(item["item_id"], item["title"]) for item in items} == set(zip(IDS, IDS[::-1], strict=True))


@pytest.mark.parametrize("key", ["\\ud800", "a\\u0000b"])
def test_names_that_no_column_can_have_are_refused(engine, tmp_path, key):
    with pytest.raises(UserError, match="has a character that no name can have; rename it"):
        read(engine, tmp_path / "items.jsonl", f'{{"item_id": "a", "title": "A", "{key}": 1}}')


@pytest.mark.parametrize("values", [["[]", "[]"], ["[null]", "[]"], ["null", "null"], ["null"] * 4 + ["[]"]])
def test_vectors_with_nothing_in_them_are_vectors(engine, tmp_path, small_chunks, values):
    wanted = Wanted(("item_id", "embedding"), required=("item_id",), ids=("item_id",), vectors=("embedding",))
    rows = [f'{{"item_id": "{row}", "embedding": {value}}}' for row, value in enumerate(values)]
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    table, _ = read_file(engine, tmp_path / "items.jsonl", wanted)
    assert str(table.embedding.type()) == "array<float64>"
    assert table.order_by("_row").embedding.to_pyarrow().to_pylist() == [json.loads(value) for value in values]


def test_a_field_that_is_too_long_is_not_called_a_quote(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_records, "_LONGEST_FIELD", 1 << 20)
    with pytest.raises(UserError, match=r"row 1 .line 2.: a field has more than 1 MiB, or a quote is opened"):
        read(engine, tmp_path / "items.csv", f"item_id,title\na,{'x' * (1 << 20)}x\n")
