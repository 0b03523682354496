"""Items in files: the same rows whatever the file, exact blocks, a uniform sample, and errors that say where."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.semantic_ids.files.items import check_distinct, open_items, read_table

X = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
IDS = [f"i{row:02}" for row in range(50)]


def write_table(path, start=0, end=50, group=7, **columns):
    table = {"item_id": IDS[start:end], "embedding": list(X[start:end])} | columns
    kinds = {"item_id": pa.string(), "embedding": pa.list_(pa.float32()), "count": pa.int64(), "title": pa.string()}
    columns = {name: pa.array(values, kinds[name]) for name, values in table.items()}
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def write_folder(path, write, cuts=(0, 20, 20, 31, 50)):
    path.mkdir()
    # Written last to first: the names give the order, and the second part is empty.
    for number, (start, end) in reversed(list(enumerate(pairwise(cuts)))):
        write(path / f"part-{number}", start, end)
    (path / "_SUCCESS").write_text("")
    return path


def matrices(path):
    return write_folder(path, lambda part, start, end: np.save(part.with_suffix(".npy"), X[start:end]))


def tables(path):
    return write_folder(
        path,
        lambda part, start, end: write_table(part.with_suffix(".parquet"), start, end, count=list(range(start, end))),
    )


def saved(path, x):
    np.save(path, x)
    return path


@pytest.fixture(params=["npy", "columns first", "doubles", "parquet", "one row group", "folder of npy", "of parquet"])
def items(request, tmp_path):
    path = tmp_path / "items.npy"
    return open_items(
        {
            "npy": lambda: saved(path, X),
            "columns first": lambda: saved(path, np.asfortranarray(X)),
            "doubles": lambda: saved(path, X.astype(np.float64)),
            "parquet": lambda: write_table(tmp_path / "items.parquet", count=list(range(50))),
            "one row group": lambda: write_table(tmp_path / "items.parquet", group=50, count=list(range(50))),
            "folder of npy": lambda: matrices(tmp_path / "parts"),
            "of parquet": lambda: tables(tmp_path / "parts"),
        }[request.param]()
    )


@pytest.mark.parametrize("rows", [1, 6, 20, 50, 99])
def test_blocks_are_the_rows_in_order(items, rows):
    assert (len(items), items.width) == (50, 3)
    blocks = list(items.blocks(rows))
    assert [len(block.x) for block in blocks] == [rows] * (50 // rows) + [50 % rows] * (50 % rows > 0)
    assert all(block.x.dtype == np.float32 for block in blocks)
    np.testing.assert_array_equal(np.concatenate([block.x for block in blocks]), X)
    ids = [name for block in blocks for name in block.item_ids.to_pylist()]
    assert ids == (IDS if items.named else [str(row) for row in range(50)])
    if items.named:
        np.testing.assert_array_equal(np.concatenate([block.counts for block in blocks]), np.arange(50))
    else:
        assert all(block.counts is None for block in blocks)


def test_a_scan_keeps_all_ids_and_a_sample_of_the_rows(items):
    scan = items.scan(np.random.default_rng(0), 12)
    assert len(scan.item_ids) == 50 and len(scan.rows) == 12 and (np.diff(scan.rows) > 0).all()
    np.testing.assert_array_equal(scan.x, X[scan.rows])
    np.testing.assert_array_equal(items.sample(np.random.default_rng(0), 12), scan.x)
    for scan in (items.scan(), items.scan(np.random.default_rng(0), 50), items.scan(np.random.default_rng(0), 51)):
        np.testing.assert_array_equal(scan.x, X)
        np.testing.assert_array_equal(scan.rows, np.arange(50))


def test_samples_are_uniform(tmp_path):
    items = open_items(saved(tmp_path / "items.npy", X))
    rng = np.random.default_rng(0)
    drawn = np.bincount(np.concatenate([items.scan(rng, 10).rows for _ in range(2000)]), minlength=50)
    # Each row is in a fifth of the samples; the chi-square of 49 degrees is below 100 in all but one of 20,000 cases.
    assert ((drawn - 400) ** 2 / (400 * 0.8)).sum() < 100


def test_a_large_row_group_is_never_read_whole(tmp_path):
    x = np.random.default_rng(0).normal(size=(300_000, 32)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 32).cast(pa.list_(pa.float32()))
    table = pa.table({"item_id": pa.array(np.arange(len(x))).cast(pa.string()), "embedding": vectors})
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=len(x))
    del table, vectors
    before, most, start = pa.total_allocated_bytes(), 0, 0
    for block in open_items(tmp_path / "items.parquet").blocks(4096):
        most = max(most, pa.total_allocated_bytes() - before)
        np.testing.assert_array_equal(block.x, x[start : start + 4096])
        start += len(block.x)
    assert most < x.nbytes / 2


def test_other_columns(tmp_path):
    path = write_table(tmp_path / "items.parquet", title=[f"Thing {row}" for row in range(49)] + [None])
    assert open_items(path).column("title")[-2:] == ["Thing 48", None]
    assert open_items(path).column("brand") is None
    assert open_items(saved(tmp_path / "items.npy", X)).column("title") is None


def test_columns_of_numbers_are_shown_as_texts(tmp_path):
    table = pa.table({"item_id": ["a", "b"], "embedding": [[1.0], [2.0]], "title": [7, None], "category": [1.5, 2.0]})
    pq.write_table(table, tmp_path / "items.parquet")
    items = open_items(tmp_path / "items.parquet")
    assert (items.column("title"), items.column("category")) == (["7", None], ["1.5", "2.0"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_count_that_is_no_number_is_named(tmp_path, value):
    path = tmp_path / "items.parquet"
    counts = pa.array([1.0] * 20 + [None] * 14 + [value] + [2.0] * 15)
    pq.write_table(pa.table({"item_id": IDS, "embedding": list(X), "count": counts}), path)
    for read in (lambda: list(open_items(path).blocks(8)), lambda: read_table(path, ["item_id"], ["count"])):
        with pytest.raises(UserError, match=rf"items.parquet: count of row 34 is {value}: give a number"):
            read()


def test_item_ids_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "items.parquet"
    offsets, text = (pa.py_buffer(each) for each in (np.int32([0, 1, 2]).tobytes(), b"a\xff"))
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, text])
    for ids in (pa.array([["a"], ["b"]]), pa.array([{"a": 1}, {"a": 2}]), pa.array([b"a", b"\xff"]), broken):
        pq.write_table(pa.table({"item_id": ids, "embedding": [[1.0], [2.0]]}), path)
        for read in (lambda: open_items(path).scan(), lambda: read_table(path, ["item_id"])):
            with pytest.raises(UserError, match=rf"{path}: column 'item_id' is .*, but must be UTF-8 text"):
                read()
    for ids in (pa.array([3, 4]), pa.array([b"a", b"b"]), pa.array(["a", "b"]).dictionary_encode()):
        pq.write_table(pa.table({"item_id": ids, "embedding": [[1.0], [2.0]]}), path)
        assert open_items(path).scan().item_ids.to_pylist() in (["3", "4"], ["a", "b"])


def rows_with(row, place, value):
    x = X.copy()
    x[row, place] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"has shape \(3,\), but must be a matrix"),
        (X[:, :0], "row 0 is empty"),
        (X[:0], "has no rows"),
        (np.array([["a"]]), "of type <U1, which are no numbers"),
        (np.array([[None]]), "cannot be read as .npy"),
        (rows_with(31, 2, np.nan), "number 2 of row 31 is NaN or infinity"),
        (rows_with(31, 2, np.inf), "number 2 of row 31 is NaN or infinity"),
        (rows_with(31, 2, 0).astype(np.float64) + 1e39 * (np.arange(50) == 4)[:, None], "number 0 of row 4 is NaN or"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_named(tmp_path, x, message):
    with pytest.raises(UserError, match=message) as error:
        list(open_items(saved(tmp_path / "items.npy", x)).blocks(8))
    assert str(tmp_path / "items.npy") in str(error.value)


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (44, [1.0, np.nan, 2.0], r"number 1 of row 13 \(item_id 'i44', column 'embedding'\) is NaN"),
        (44, [1.0, None, 2.0], r"number 1 of row 13 \(item_id 'i44', column 'embedding'\) is NaN"),
        (44, [1.0, 2.0], r"item_id 'i44' \(row 13\) is 2 wide, those before it 3"),
        (31, [1.0, 2.0], r"item_id 'i31' \(row 0\) is 2 wide, those before it 3"),
        (44, None, r"item_id 'i44' \(row 13\) is missing"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_part(tmp_path, row, value, message):
    path = tables(tmp_path / "parts")
    vectors = [list(map(float, x)) for x in X[31:]]
    vectors[row - 31] = value
    write_table(path / "part-3.parquet", 31, 50, embedding=vectors, count=[0] * 19)
    with pytest.raises(UserError, match=message) as error:
        open_items(path).scan()
    assert str(path / "part-3.parquet") in str(error.value)


def test_parts_that_do_not_fit_are_named(tmp_path):
    path = matrices(tmp_path / "matrices")
    np.save(path / "part-3.npy", X[:, :2])
    with pytest.raises(UserError, match=r"part-3.npy is 2 wide, the parts before it 3"):
        open_items(path).scan()
    write_table(path / "part-4.parquet")
    with pytest.raises(UserError, match=r"mixes .npy and .parquet"):
        open_items(path)
    path = tables(tmp_path / "tables")
    write_table(path / "part-3.parquet", 31, 50)
    with pytest.raises(UserError, match=r"part-3.parquet has no column 'count'; it needs .* and count"):
        open_items(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no .npy or .parquet files"):
        open_items(tmp_path / "empty")


def test_damaged_files_are_named(tmp_path):
    for name, kind in (("a.npy", ".npy"), ("a.parquet", "parquet")):
        (tmp_path / name).write_bytes(b"nothing")
        for path in (tmp_path / name, tmp_path / f"no-{name}"):
            with pytest.raises(UserError, match=f"{path} cannot be read as {kind}"):
                open_items(path)
    path = write_table(tmp_path / "b.parquet")
    data = bytearray(path.read_bytes())
    items = open_items(path)
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"b.parquet is damaged"):
        items.scan()
    path = saved(tmp_path / "c.npy", X)
    items = open_items(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"c.npy cannot be read as .npy"):
        items.scan()


def test_an_item_listed_twice_is_named(tmp_path):
    ids = pa.chunked_array([IDS[:20], ["i50", "i07", "i50"]])
    with pytest.raises(UserError, match=r"a.parquet: item_id 'i07' is listed more than once"):
        check_distinct(ids, tmp_path / "a.parquet")
    check_distinct(pa.chunked_array([IDS[:20], IDS[20:]]), tmp_path)
