"""The ID space, its file, and the phase that makes them."""

import json
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from jaxrec.config import UserError
from jaxrec.semantic_ids import (
    CollisionConfig,
    FsqConfig,
    ResidualConfig,
    SemanticIdConfig,
    SemanticIds,
    read_codes,
    write_codes,
)
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.table.quality import quality
from jaxrec.semantic_ids.tokenize import tokenize
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig

CODES = np.array([[1, 0], [0, 2], [1, 0], [0, 2], [0, 2], [1, 1]], np.int32)
ITEMS = list("abcdef")


@pytest.fixture
def space():
    return SemanticIds(CODES, (2, 3), popularity=np.array([5, 1, 7, 9, 1, 0]))


def test_an_id_lists_its_items_most_popular_first(space):
    assert space.items((1, 0)).tolist() == [2, 0]
    assert space.items(np.array([0, 2])).tolist() == [3, 1, 4]  # equally popular: the lower index first
    assert space.items((0, 0)).tolist() == []
    assert SemanticIds(CODES, (2, 3)).items((1, 0)).tolist() == [0, 2]
    np.testing.assert_array_equal(space.ids, [[0, 2], [1, 0], [1, 1]])
    np.testing.assert_array_equal(space.ids[space.leaf], CODES)
    assert space.to_text(CODES[1]) == "<0,2>" and space.to_text(CODES[1][:1]) == "<0>"


def test_codes_outside_their_codebook_are_refused():
    with pytest.raises(UserError, match="item 1 has code 2 at level 2"):
        SemanticIds(CODES, (2, 2))
    with pytest.raises(UserError, match="do not fit 3 levels"):
        SemanticIds(CODES, (2, 3, 4))


@pytest.mark.parametrize(
    "sizes", [(3,), (3, 4, 2), (2**31 - 1,) * 3, (5, 2**31 - 1, 2**31 - 1, 3), (1, 2**20, 2**31 - 1, 2**20, 7)]
)
def test_ids_are_grouped_as_unique_rows_are(sizes):
    rng = np.random.default_rng(0)
    few = np.stack([rng.integers(0, min(size, 3), 200) * ((size - 1) // 2 or 1) % size for size in sizes], axis=1)
    space = SemanticIds(few.astype(np.int32), sizes)
    ids, leaf, counts = np.unique(few, axis=0, return_inverse=True, return_counts=True)
    np.testing.assert_array_equal(space.ids, ids)
    np.testing.assert_array_equal(space.leaf, leaf.reshape(-1))
    np.testing.assert_array_equal(space.counts, counts)
    assert space.ids.dtype == space.leaf.dtype == np.int32


def test_no_items_have_no_ids():
    empty = SemanticIds(np.zeros((0, 2), np.int32), (2, 3))
    assert empty.ids.shape == (0, 2) and len(empty.leaf) == len(empty.counts) == 0
    assert empty.items((0, 1)).tolist() == []


def test_file_round_trip_in_catalogue_order(space, tmp_path):
    write_codes(tmp_path / "codes.parquet", ITEMS, space)
    again = read_codes(tmp_path / "codes.parquet", ITEMS[::-1])
    np.testing.assert_array_equal(again.codes, CODES[::-1])
    assert again.codebook_sizes == (2, 3)


def test_a_file_is_read_in_its_own_order(space, tmp_path):
    write_codes(tmp_path / "codes.parquet", pa.array(ITEMS[::-1]), space)
    np.testing.assert_array_equal(read_codes(tmp_path / "codes.parquet").codes, CODES)
    table = pq.read_table(tmp_path / "codes.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(1, 1)]), tmp_path / "codes.parquet")
    with pytest.raises(UserError, match=f"{ITEMS[-2]!r} is listed more than once"):
        read_codes(tmp_path / "codes.parquet")


def test_a_foreign_file_takes_its_sizes_from_its_codes(tmp_path):
    pq.write_table(pa.table({"item_id": ["x", "y"], "c1": [4, 0], "c2": [0, 1]}), tmp_path / "codes.parquet")
    assert read_codes(tmp_path / "codes.parquet", ["x", "y"]).codebook_sizes == (5, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c1": None}, "no column 'c1'"),
        ({"item_id": None}, "no column 'item_id'"),
        ({"c1": None, "c2": None}, "no column 'c1'"),
        ({"c2": ["1", "2"]}, "'c2' is string"),
        ({"c2": [1, None]}, "row 1 has no 'c2'"),
        ({"c2": [1, -4]}, "row 1 has c2=-4"),
        ({"item_id": ["x", "x"]}, "'x' is listed more than once"),
        ({"item_id": ["x", "z"]}, "'z'.*not in items.parquet"),
        ({"item_id": ["x"], "c1": [0], "c2": [0]}, "'y' of items.parquet has no row"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, change, message):
    columns = {"item_id": ["x", "y"], "c1": [4, 0], "c2": [0, 1]} | change
    path = tmp_path / "codes.parquet"
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    with pytest.raises(UserError, match=message) as error:
        read_codes(path, ["x", "y"])
    assert str(path) in str(error.value)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "codes.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_codes(tmp_path / "codes.parquet", ["x"])


@pytest.fixture
def tables(tmp_path):
    """80 items with their own embeddings, and pairs of neighbours."""
    x = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    items = pa.table(
        {
            "item_id": [f"i{n:03}" for n in range(80)],
            "category": ["a", "b"] * 40,
            "count": np.arange(80),
            "embedding": list(x),
        }
    )
    left = np.arange(79, dtype=np.int32)
    pairs = pa.table({"item": left, "other": left + 1, "score": np.ones(79, np.float32), "kind": ["swing"] * 79})
    (tmp_path / "tables").mkdir()
    pq.write_table(items, tmp_path / "tables" / "items.parquet")
    pq.write_table(pairs, tmp_path / "tables" / "pairs.parquet")
    return tmp_path / "tables"


def run_tokenize(tables, out, **align):
    out.mkdir()
    ids = SemanticIdConfig(ResidualConfig(sizes=(4, 4)), FsqConfig(levels=(2, 2, 2), steps=10))
    alignment = AlignConfig(width=4, hidden=8, batch_size=32, **align)
    tokenize(tables, out, EncoderConfig(), alignment, ids, CollisionConfig(), seed=0)


def test_the_phase_writes_what_later_phases_read_the_same_each_time(tables, tmp_path):
    for name in ("out", "again"):
        run_tokenize(tables, tmp_path / name)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    space = read_codes(tmp_path / "out" / "codes.parquet", [f"i{n:03}" for n in range(80)])
    assert space.codebook_sizes == (4, 4, 8)
    embeddings = load_file(tmp_path / "out" / "embeddings.safetensors")["embeddings"]
    books = codebooks.load(tmp_path / "out" / "codebooks.safetensors")
    np.testing.assert_array_equal(codebooks.encode(books, embeddings), space.codes)
    figures = json.loads((tmp_path / "out" / "quality.json").read_text())
    pairs = np.stack([np.arange(79), np.arange(1, 80)], axis=1)
    del figures["alignment"]
    assert figures.pop("collisions")["policy"] == "keep"
    assert figures == json.loads(json.dumps(quality(space, embeddings, partial(codebooks.decode, books), pairs)))


def test_the_phase_names_a_bad_configuration_before_the_long_work(tables, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the items were embedded")

    monkeypatch.setattr("jaxrec.semantic_ids.tokenize.embed_catalogue", refuse)
    small = SemanticIdConfig(ResidualConfig((4,)), None)
    for ids, collisions, message in (
        (small, CollisionConfig(capacity=0), "collisions.capacity=0"),
        (SemanticIdConfig(ResidualConfig((81,)), None), CollisionConfig(), "80 rows cannot fill a codebook of 81"),
        (SemanticIdConfig(None, None), CollisionConfig(), "neither a hierarchy nor a remainder"),
    ):
        with pytest.raises(UserError, match=message):
            tokenize(tables, tmp_path, EncoderConfig(), AlignConfig(), ids, collisions, seed=0)


def test_the_phase_names_bad_tables(tables, tmp_path):
    with pytest.raises(UserError, match="no pairs of kind 'itemcf'"):
        run_tokenize(tables, tmp_path / "kind", kind="itemcf")
    items = pq.read_table(tables / "items.parquet").drop_columns("embedding")
    pq.write_table(items, tables / "items.parquet")
    with pytest.raises(UserError, match="neither a column `text` nor a column `embedding`"):
        run_tokenize(tables, tmp_path / "text")
    ragged = items.append_column("embedding", pa.array([[1.0, 2.0]] * 79 + [[1.0]], pa.list_(pa.float32())))
    pq.write_table(ragged, tables / "items.parquet")
    with pytest.raises(UserError, match=r"items.parquet: the embedding of item_id 'i079' \(row 79\) is 1 wide"):
        run_tokenize(tables, tmp_path / "ragged")
