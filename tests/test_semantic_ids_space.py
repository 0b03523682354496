"""The ID space, its file, its figures, and the phase that makes them."""

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from jaxrec.config import UserError
from jaxrec.semantic_ids import Codebooks, SemanticIdConfig, SemanticIdSpace, codebooks, read_codes, write_codes
from jaxrec.semantic_ids.fsq import FsqConfig
from jaxrec.semantic_ids.quality import collisions, level_use, neighbour_recall, quality, shared_prefixes
from jaxrec.semantic_ids.tokenize import tokenize
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig

CODES = np.array([[1, 0], [0, 2], [1, 0], [0, 2], [0, 2], [1, 1]], np.int32)
ITEMS = list("abcdef")


@pytest.fixture
def space():
    return SemanticIdSpace(CODES, (2, 3), popularity=np.array([5, 1, 7, 9, 1, 0]))


def test_an_id_lists_its_items_most_popular_first(space):
    assert space.items((1, 0)).tolist() == [2, 0]
    assert space.items(np.array([0, 2])).tolist() == [3, 1, 4]  # equally popular: the lower index first
    assert space.items((0, 0)).tolist() == []
    assert SemanticIdSpace(CODES, (2, 3)).items((1, 0)).tolist() == [0, 2]
    np.testing.assert_array_equal(space.ids, [[0, 2], [1, 0], [1, 1]])
    np.testing.assert_array_equal(space.ids[space.leaf], CODES)
    assert space.to_text(CODES[1]) == "<0,2>" and space.to_text(CODES[1][:1]) == "<0>"


def test_codes_outside_their_codebook_are_refused():
    with pytest.raises(UserError, match="item 1 has code 2 at level 2"):
        SemanticIdSpace(CODES, (2, 2))
    with pytest.raises(UserError, match="do not fit 3 levels"):
        SemanticIdSpace(CODES, (2, 3, 4))


def test_collisions_by_hand(space):
    # One of six items has an ID to itself; one of three IDs belongs to one item.
    assert collisions(space) == {
        "conflict_rate": pytest.approx(5 / 6),
        "exclusive_rate": pytest.approx(1 / 3),
        "largest_bucket": 3,
    }


def test_level_use_by_hand():
    use = level_use(np.array([0, 0, 3, 3]), 8)
    assert use == {"use": 0.25, "entropy_bits": 1.0, "most_bits": 3.0, "largest": 2}


def test_shared_prefixes_by_hand():
    pairs = np.array([[0, 2], [0, 5], [0, 1], [1, 3]])
    assert shared_prefixes(CODES, pairs)["pairs"] == [0.75, 0.5]


def test_neighbours_are_kept_by_codes_that_keep_everything():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    every_row = Codebooks((jax.numpy.asarray(x),), None)
    assert neighbour_recall(np.arange(40)[:, None], every_row, x) == 1.0
    assert neighbour_recall(np.zeros((40, 1), int), every_row, x) < 0.6


def test_file_round_trip_in_catalogue_order(space, tmp_path):
    write_codes(tmp_path / "codes.parquet", ITEMS, space)
    again = read_codes(tmp_path / "codes.parquet", ITEMS[::-1])
    np.testing.assert_array_equal(again.codes, CODES[::-1])
    assert again.codebook_sizes == (2, 3)


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
    ids = SemanticIdConfig(levels=(4, 4), fsq=(2, 2, 2), fsq_fit=FsqConfig(steps=10))
    tokenize(tables, out, EncoderConfig(), AlignConfig(width=4, hidden=8, batch_size=32, **align), ids, seed=0)


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
    assert figures == json.loads(json.dumps(quality(space, books, embeddings, pairs)))


def test_the_phase_names_bad_tables(tables, tmp_path):
    with pytest.raises(UserError, match="no pairs of kind 'itemcf'"):
        run_tokenize(tables, tmp_path / "kind", kind="itemcf")
    items = pq.read_table(tables / "items.parquet").drop_columns("embedding")
    pq.write_table(items, tables / "items.parquet")
    with pytest.raises(UserError, match="neither a column `text` nor a column `embedding`"):
        run_tokenize(tables, tmp_path / "text")
    ragged = items.append_column("embedding", pa.array([[1.0, 2.0]] * 79 + [[1.0]], pa.list_(pa.float32())))
    pq.write_table(ragged, tables / "items.parquet")
    with pytest.raises(UserError, match="row 79 is 1 wide"):
        run_tokenize(tables, tmp_path / "ragged")
