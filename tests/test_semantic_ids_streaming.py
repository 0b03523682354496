"""Semantic IDs block by block: the codes of the in-memory path to the bit, and the command line."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.files import read_json
from jaxrec.semantic_ids import (
    CollisionConfig,
    FsqConfig,
    OpqConfig,
    ResidualConfig,
    RqVaeConfig,
    SemanticIdConfig,
    commands,
    read_codes,
    streaming,
)
from jaxrec.semantic_ids.__main__ import FitConfig
from jaxrec.semantic_ids.__main__ import fit as fit_command
from jaxrec.semantic_ids.files.items import open_items
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.table.drift import drift
from jaxrec.semantic_ids.table.version_files import read_version

KEY = jax.random.key(3)
X = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
SMALL = SemanticIdConfig(ResidualConfig((4, 4)), OpqConfig((4, 4), rotations=2))
QUANTIZERS = {
    "residual": SemanticIdConfig(ResidualConfig((8, 8)), None),
    "balanced, FSQ": SemanticIdConfig(ResidualConfig((4, 4), balanced=(2,)), FsqConfig((2, 2), hidden=8, steps=20)),
    "OPQ": SMALL,
    "RQ-VAE": SemanticIdConfig(RqVaeConfig((4, 4), hidden=(8,), latent_width=4, steps=20, warm_steps=5), None),
}


@pytest.fixture
def items(tmp_path):
    np.save(tmp_path / "items.npy", X)
    return open_items(tmp_path / "items.npy")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(codebooks, "ENCODED_AT_ONCE", 128)


@pytest.mark.parametrize("config", QUANTIZERS.values(), ids=QUANTIZERS.keys())
def test_codes_are_those_of_the_in_memory_path(items, small_blocks, config):
    sample = items.scan(streaming.generator(KEY), 200)
    assert not np.array_equal(sample.x, X[:200])
    books = streaming.fit(KEY, items, config, sample_rows=200)
    jax.tree.map(np.testing.assert_array_equal, books, codebooks.fit(KEY, sample.x, config))
    blocks = list(streaming.encode(books, items))
    assert [len(codes) for codes in blocks] == [128, 128, 44]
    np.testing.assert_array_equal(np.concatenate(blocks), codebooks.encode(books, X))


def test_a_sample_of_all_rows_is_the_in_memory_path(items, small_blocks):
    for rows in (300, 1000):
        books = streaming.fit(KEY, items, SMALL, rows)
        jax.tree.map(np.testing.assert_array_equal, books, codebooks.fit(KEY, X, SMALL))


def test_another_key_draws_another_sample(items):
    rows = [items.scan(streaming.generator(jax.random.key(seed)), 100).rows for seed in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


def command(tmp_path, name="out", **changes):
    config = FitConfig(tmp_path / "items.parquet", tmp_path / name, semantic_ids=SMALL)
    return dataclasses.replace(config, **changes)


@pytest.fixture
def parquet(tmp_path):
    table = {"item_id": [f"i{row:03}" for row in range(300)], "embedding": list(X), "count": np.arange(300)}
    pq.write_table(pa.table(table), tmp_path / "items.parquet", row_group_size=70)
    return tmp_path


@pytest.mark.parametrize("policy", ["keep", "extra_level"])
def test_the_command_encodes_more_items_than_it_holds(parquet, small_blocks, policy):
    figures = fit_command(command(parquet, in_memory=200, collisions=CollisionConfig(policy)))
    out, items = parquet / "out", open_items(parquet / "items.parquet")
    assert sorted(path.name for path in out.iterdir()) == [
        "codebooks.safetensors", "codes.parquet", "quality.json", "semantic_ids.html"
    ]  # fmt: skip
    sample = items.scan(streaming.generator(jax.random.key(0)), 200)
    books = codebooks.fit(jax.random.key(0), sample.x, SMALL)
    codes = codebooks.encode(books, X)
    space = read_codes(out / "codes.parquet", [f"i{row:03}" for row in range(300)])
    np.testing.assert_array_equal(space.codes[:, :4], codes)
    assert read_json(out / "quality.json") == figures and figures["items"] == 300
    assert figures["sample"] == {
        "rows": 200, "of": 300, "codebooks_fitted_to_it": True,
        "figures": ["reconstruction_error", "neighbour_recall@10", "neighbour_recall_by_id@10"],
    }  # fmt: skip
    lost = ((sample.x - codebooks.decode(books, codes[sample.rows])) ** 2).sum()
    assert figures["reconstruction_error"][3] == pytest.approx(lost / ((sample.x - sample.x.mean(0)) ** 2).sum())
    page = (out / "semantic_ids.html").read_text()
    assert "i299" in page and "Measured on 200 items, drawn at random." in page
    if policy == "extra_level":
        assert len(space.ids) == 300
        # Of the items under one ID the most popular, here the last, has number 0.
        last = {tuple(code): row for row, code in enumerate(codes.tolist())}
        assert (space.codes[list(last.values()), 4] == 0).all()


def test_the_catalogue_lives_on_without_embeddings(parquet):
    fit_command(command(parquet, in_memory=200))
    more = pa.table({"item_id": ["new"], "embedding": list(X[7:8] + 0.01)})
    pq.write_table(more, parquet / "more.parquet")
    commands.append(parquet / "out", parquet / "more.parquet")
    commands.remove(parquet / "out", parquet / "more.parquet")
    table = read_version(parquet / "out")
    assert table.version == 3 and len(table.item_ids) == 301
    np.testing.assert_array_equal(table.encoded, table.codes)
    assert [row["error_ratio"] for row in drift(parquet / "out")] == [None, 1, None]


def test_items_are_encoded_anew_without_embeddings(parquet):
    fit_command(command(parquet, in_memory=200))
    before = pq.read_table(parquet / "out" / "codes.parquet").to_pylist()
    same, other = (pa.table({"item_id": ["i003", "i250"], "embedding": list(x)}) for x in (X[[3, 250]], X[[250, 3]]))
    pq.write_table(same, parquet / "more.parquet")
    commands.reencode(parquet / "out", parquet / "more.parquet")
    assert read_version(parquet / "out").version == 1
    pq.write_table(other, parquet / "more.parquet")
    commands.reencode(parquet / "out", parquet / "more.parquet", publish=True)
    after = pq.read_table(parquet / "out" / "codes.parquet").to_pylist()
    swapped = {3: 250, 250: 3}
    for row, codes in enumerate(after):
        assert codes == before[swapped.get(row, row)] | {"item_id": f"i{row:03}"}
    pq.write_table(pa.table({"item_id": ["new"], "embedding": list(X[3:4])}), parquet / "more.parquet")
    commands.append(parquet / "out", parquet / "more.parquet")
    table = read_version(parquet / "out")
    assert table.version == 3
    np.testing.assert_array_equal(table.codes[300], table.codes[250])


def test_as_many_items_as_it_holds_are_quantized_in_memory(parquet):
    figures = fit_command(command(parquet, in_memory=300))
    assert (parquet / "out" / "embeddings.safetensors").exists() and "sample" not in figures


def test_a_matrix_names_items_by_their_rows(items, tmp_path):
    for name, in_memory in (("whole", 300), ("blocks", 200)):
        fit_command(command(tmp_path, name, items=tmp_path / "items.npy", in_memory=in_memory))
        written = pq.read_table(tmp_path / name / "codes.parquet")["item_id"].to_pylist()
        assert written == [str(row) for row in range(300)]
    with pytest.raises(UserError, match=r"items.npy has no item ids: give a parquet file with item_id and embedding"):
        commands.append(tmp_path / "whole", tmp_path / "items.npy")


def test_mistakes_are_named_before_the_long_work(parquet, monkeypatch):
    def refuse(*_):
        raise AssertionError("the items were read")

    monkeypatch.setattr("jaxrec.semantic_ids.files.items.Items.scan", refuse)
    wide = SemanticIdConfig(ResidualConfig((256,)))
    for changes, message in (
        ({"in_memory": 0}, "in_memory=0: let memory hold"),
        ({"collisions": CollisionConfig("nearest_free")}, r"has 300 items and in_memory=200: choose 'keep' or 'extra_"),
        ({"collisions": CollisionConfig("keep", capacity=0)}, "collisions.capacity=0"),
        ({"semantic_ids": wide}, "200 rows cannot fill a codebook of 256 codes"),
        ({"semantic_ids": SemanticIdConfig(None, None)}, "neither a hierarchy nor a remainder"),
    ):
        with pytest.raises(UserError, match=message):
            fit_command(command(parquet, **({"in_memory": 200} | changes)))
    assert not (parquet / "out").exists() and not (parquet / "out.partial").exists()


def test_mistakes_in_the_items_are_named(parquet):
    table = pq.read_table(parquet / "items.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(5, 1)]), parquet / "items.parquet")
    with pytest.raises(UserError, match=r"items.parquet: item_id 'i005' is listed more than once"):
        fit_command(command(parquet, in_memory=200))
    assert not (parquet / "out").exists() and not (parquet / "out.partial").exists()


def test_codebooks_of_another_width_are_refused(items, tmp_path):
    books = streaming.fit(KEY, items, SMALL, 200)
    np.save(tmp_path / "narrow.npy", X[:, :4])
    with pytest.raises(UserError, match="4 wide, but the codebooks were fitted to a width of 6"):
        next(streaming.encode(books, open_items(tmp_path / "narrow.npy")))
