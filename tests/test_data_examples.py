"""Example records against the rows of the events table."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.examples import SPLITS, Records, write_examples

BEHAVIORS = ("exposure", "click", "purchase")

# (user, item, timestamp, behavior, session, split); user 2 has no valid or test events, user 3 no train events.
ROWS = [
    (0, 5, 10, "click", 0, "train"),
    (0, 6, 10, "purchase", 0, "train"),
    (0, 7, 20, "exposure", 1, "train"),
    (0, 5, 30, "purchase", 2, "valid"),
    (0, 8, 40, "purchase", 3, "test"),
    (1, 1, 11, "purchase", 0, "train"),
    (1, 2, 12, "exposure", 1, "valid"),
    (1, 3, 12, "purchase", 1, "valid"),
    (2, 4, 5, "click", 0, "train"),
    (3, 9, 6, "click", 0, "test"),
]


def events_table(rows=ROWS) -> pa.Table:
    user, item, timestamp, behavior, session, split = zip(*rows, strict=True)
    return pa.table(
        {
            "user": pa.array(user, pa.int32()),
            "item": pa.array(item, pa.int32()),
            "user_id": [f"u{u}" for u in user],
            "timestamp": pa.array(timestamp, pa.int64()),
            "behavior": behavior,
            "session": pa.array(session, pa.int32()),
            "split": split,
        }
    )


def write(folder: Path, table: pa.Table) -> Path:
    (folder / "tables").mkdir(parents=True)
    (folder / "examples").mkdir()
    pq.write_table(table, folder / "tables" / "events.parquet")
    write_examples(folder / "tables", folder / "examples", BEHAVIORS)
    return folder / "examples"


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("examples"), events_table())


def expected(split: str) -> list[dict]:
    """By plain loops: the users who have events of a split, with all their events up to it."""
    allowed = SPLITS[: SPLITS.index(split) + 1]
    result = []
    for user in sorted({row[0] for row in ROWS if row[5] == split}):
        rows = [row for row in ROWS if row[0] == user and row[5] in allowed]
        result.append(
            {
                "user": user,
                "item": [row[1] for row in rows],
                "timestamp": [row[2] for row in rows],
                "behavior": [BEHAVIORS.index(row[3]) for row in rows],
                "session": [row[4] for row in rows],
                "split": [SPLITS.index(row[5]) for row in rows],
            }
        )
    return result


@pytest.mark.parametrize("split", SPLITS)
def test_records_hold_the_rows(examples, split):
    records = Records(examples, split)
    assert records.behaviors == BEHAVIORS
    assert [{k: r[k].tolist() if k != "user" else r[k] for k in expected(split)[0]} for r in records] == expected(split)
    record = records[0]
    dtypes = {name: value.dtype.name for name, value in record.items() if name not in ("user", "answer_time")}
    wanted = {"item": "int32", "behavior": "int8", "timestamp": "int64", "session": "int32", "split": "int8"}
    assert dtypes == wanted and isinstance(record["user"], int)
    with pytest.raises(IndexError):
        records[len(records)]


@pytest.mark.parametrize("answer_time", [True, False])
def test_records_say_whether_the_answers_time_may_be_told(tmp_path, answer_time):
    write(tmp_path, events_table())
    (tmp_path / "again").mkdir()
    write_examples(tmp_path / "tables", tmp_path / "again", BEHAVIORS, answer_time)
    assert {record["answer_time"] for record in Records(tmp_path / "again", "test")} == {answer_time}


def test_a_split_without_events_is_empty(tmp_path):
    examples = write(tmp_path, events_table([row for row in ROWS if row[5] == "train"]))
    assert len(Records(examples, "train")) == 3
    assert len(Records(examples, "valid")) == len(Records(examples, "test")) == 0


def test_the_cache_is_bounded_and_changes_nothing(examples):
    small, large = Records(examples, "train", cache_bytes=1200), Records(examples, "train")
    for index in [0, 1, 2, 0, 2, 1, 0]:
        assert small[index]["item"].tolist() == large[index]["item"].tolist()
        cached = ([v for v in record.values() if isinstance(v, np.ndarray)] for record in small._cache.values())
        assert sum(500 + sum(v.nbytes for v in arrays) for arrays in cached) <= 1200
    assert large[0] is large[0]
    assert len(small._cache) == 2 and len(large._cache) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("session"), r"events\.parquet has no column 'session'"),
        (
            lambda t: t.set_column(4, "behavior", [["click"] * 3 + ["buy"] + ["click"] * 6]),
            r"events\.parquet, row 3: behavior 'buy' is unknown; it must be one of exposure, click, purchase",
        ),
        (lambda t: t.filter(pa.compute.equal(t["split"], "test")), "has no train events"),
    ],
)
def test_bad_tables_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path, change(events_table()))


def test_missing_files_are_named(tmp_path, examples):
    with pytest.raises(UserError, match=r"events\.parquet is missing"):
        write_examples(tmp_path, tmp_path, BEHAVIORS)
    with pytest.raises(UserError, match=r"examples\.json is missing"):
        Records(tmp_path, "train")
    with pytest.raises(UserError, match="there is no split 'trian'; it is one of train, valid, test"):
        Records(examples, "trian")


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
    source = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data_examples import events_table, Records, write
examples = write(Path({str(tmp_path)!r}), events_table())
assert list(Records(examples, "train")[0]["item"]) == [5, 6, 7]
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")])
"""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_same_tables_give_the_same_bytes(tmp_path):
    folders = [write(tmp_path / name, events_table()) for name in ("a", "b")]
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.array_record*"))
    assert len(names) == 3
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    rows = [np.asarray(Records(folder, "test").sessions["start"]) for folder in folders]
    np.testing.assert_array_equal(*rows)
