"""Embeddings that are broken, few, all the same or of another type: every quantizer, and every way in."""

import sys
from decimal import Decimal

import jax
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.semantic_ids import (
    FsqConfig,
    KMeansConfig,
    OpqConfig,
    ResidualConfig,
    RqVaeConfig,
    SemanticIdConfig,
    read_codes,
)
from jaxrec.semantic_ids import __main__ as command
from jaxrec.semantic_ids.commands import read_ids, read_items
from jaxrec.semantic_ids.quantizers import codebooks, rows
from jaxrec.semantic_ids.table.changes import append
from jaxrec.semantic_ids.table.version_files import read_version
from jaxrec.semantic_ids.table.versions import publish

KEY = jax.random.key(0)
QUICK = KMeansConfig(iterations=5)
RQVAE = RqVaeConfig((4, 4), hidden=(8,), latent_width=4, warm_steps=50, steps=100, batch_size=16, start=QUICK)
GRID = FsqConfig((2, 2), hidden=8, steps=20)
CONFIGS = {
    "residual": SemanticIdConfig(ResidualConfig((4, 4)), None),
    "balanced": SemanticIdConfig(ResidualConfig((4, 4), balanced=(2,)), None),
    "rqvae": SemanticIdConfig(RQVAE, None),
    "fsq": SemanticIdConfig(None, GRID),
    "opq": SemanticIdConfig(None, OpqConfig((4, 4), rotations=3)),
    "residual-fsq": SemanticIdConfig(ResidualConfig((4, 4)), GRID),
    "rqvae-opq": SemanticIdConfig(RQVAE, OpqConfig((4, 4), rotations=3)),
}
ALONE = [kind for kind in CONFIGS if "-" not in kind]
X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return {kind: codebooks.fit(KEY, X, config) for kind, config in CONFIGS.items()}


def ways_in(kind, fitted, x):
    """fit, encode and encode_catalogue of the codebooks; for a quantizer alone its own fit and encode too."""
    config, books = CONFIGS[kind], fitted[kind]
    calls = {
        "fit": lambda: codebooks.fit(KEY, x, config),
        "encode": lambda: codebooks.encode(books, x),
        "encode_catalogue": lambda: codebooks.encode_catalogue(books, x, config),
    }
    if kind in ALONE:
        (part,), own = books.parts, config.hierarchy or config.remainder
        module = codebooks.MODULES[type(part)]
        calls |= {"its own fit": lambda: module.fit(KEY, x, own), "its own encode": lambda: module.encode(part, x)}
    return calls


def with_row_7(value, dtype=np.float32):
    x = X.astype(dtype)
    x[7, 3] = value
    return x


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (with_row_7(np.nan), r"row 7 of the embeddings holds NaN or infinity \(1 such rows\)"),
        (with_row_7(-np.inf), "row 7 of the embeddings holds NaN or infinity"),
        (with_row_7(1e300, np.float64), "row 7 of the embeddings holds NaN or infinity"),
        (with_row_7(np.nan, np.float16), "row 7 of the embeddings holds NaN or infinity"),
        (
            with_row_7(1e20),
            r"row 7 of the embeddings holds 1e\+20, but squares overflow beyond 1e\+13 \(1 such rows\): mend",
        ),
        (with_row_7(-2e13), r"row 7 of the embeddings holds -2e\+13, but squares overflow"),
        (
            X * 1e18,
            r"row 0 of the embeddings holds -?\d\.\d+e\+1\d, but squares overflow beyond 1e\+13 \(40 such rows\)",
        ),
        (X.astype(object), "of type object, which are no numbers"),
        (X > 0, "of type bool, which are no numbers"),
        ([["1", "2", "3", "4"]] * 40, "which are no numbers"),
        ([[1.0, 2.0, 3.0, 4.0]] * 39 + [[1.0, 2.0]], r"row 39 is of another width \(2\) than row 0 \(4\)"),
        (X[0], r"must be a matrix \[items, width\], but have shape \(4,\)"),
        (X[:, :0], r"must be a matrix \[items, width\], but have shape \(40, 0\)"),
    ],
    ids=[
        "nan",
        "inf",
        "large-double",
        "half-nan",
        "one-large",
        "negative-large",
        "all-large",
        "object",
        "bool",
        "text",
        "ragged",
        "vector",
        "no-width",
    ],
)
def test_rows_that_cannot_be_used_are_named_on_every_way_in(fitted, kind, x, message):
    for name, call in ways_in(kind, fitted, x).items():
        with pytest.raises(UserError, match=message):
            pytest.fail(f"{name} took it: {call()}")


@pytest.mark.parametrize(
    ("kind", "factor"),
    [(kind, factor) for kind in CONFIGS for factor in (2.0**-30, 2.0**-23, 2.0**20, 2.0**30)]
    # These factors round every number, which 150 steps of an RQ-VAE make more of.
    + [(kind, factor) for kind in CONFIGS if "rqvae" not in kind for factor in (1e-7, 1e6)],
)
def test_the_unit_of_the_embeddings_changes_no_id(fitted, kind, factor):
    scaled = (X * factor).astype(np.float32)
    books = codebooks.fit(KEY, scaled, CONFIGS[kind])
    codes = codebooks.encode(fitted[kind], X)
    np.testing.assert_array_equal(codebooks.encode(books, scaled), codes)
    np.testing.assert_allclose(
        codebooks.decode(books, codes) / factor, codebooks.decode(fitted[kind], codes), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_numbers_whose_squares_vanish_are_refused(kind):
    with pytest.raises(UserError, match=r"the largest number of the embeddings is \d.*e-20, and squares vanish below"):
        codebooks.fit(KEY, X * np.float32(1e-20), CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_width_is_refused_when_encoding(fitted, kind):
    for width in (3, 5):
        for name, call in ways_in(kind, fitted, np.ones((6, width), np.float32)).items():
            if "encode" in name:
                with pytest.raises(UserError, match=f"{width} wide, but the codebooks were fitted to a width of 4"):
                    call()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_rows_than_codes_are_refused_but_by_a_grid(fitted, kind, rows):
    for name, call in ways_in(kind, fitted, X[:rows]).items():
        if "fit" not in name:
            continue
        if kind == "fsq" and rows:
            assert call().sizes == (4,)
        else:
            with pytest.raises(UserError, match=f"{rows} rows cannot fill a codebook of"):
                call()


def test_a_row_is_named_by_its_place_among_all(fitted, monkeypatch):
    monkeypatch.setattr(codebooks, "ENCODED_AT_ONCE", 8)
    x = X.copy()
    x[[21, 30], 1] = np.nan
    with pytest.raises(UserError, match=r"row 21 of the embeddings holds NaN or infinity \(2 such rows\)"):
        codebooks.encode(fitted["residual-fsq"], x)
    monkeypatch.setattr(rows, "CHECKED_AT_ONCE", 8)
    assert rows.unusable(x).tolist() == [21, 30] and rows.unusable(x[:21]).tolist() == []


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.int64, np.uint16])
def test_other_numbers_are_taken_as_float32(fitted, kind, dtype):
    x = np.abs(np.round(X * 8)).astype(dtype)
    plain = x.astype(np.float32)
    for given in (x, jax.numpy.asarray(x), x.tolist()):
        np.testing.assert_array_equal(codebooks.encode(fitted[kind], given), codebooks.encode(fitted[kind], plain))
    jax.tree.map(
        np.testing.assert_array_equal,
        codebooks.fit(KEY, x, CONFIGS[kind]),
        codebooks.fit(KEY, plain, CONFIGS[kind]),
    )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_rows_that_are_all_the_same_get_one_id_that_stands_for_them(kind, value):
    x = np.full((20, 4), value, np.float32) * np.float32([1, -2, 3, 4])
    books = codebooks.fit(KEY, x, CONFIGS[kind])
    codes = codebooks.encode(books, x)
    assert len(np.unique(codes, axis=0)) == 1
    np.testing.assert_array_equal(codebooks.encode(books, x[:1]), codes[:1])
    # The grid's decoder is trained, by steps that do not shrink with the data.
    np.testing.assert_allclose(codebooks.decode(books, codes), x, atol=0.02 if kind == "fsq" else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_rows_get_equal_ids_also_where_there_are_fewer_of_them_than_codes(kind):
    distinct = X[:3] * 10
    row = np.arange(40) % 3
    books = codebooks.fit(KEY, distinct[row], CONFIGS[kind])
    codes = codebooks.encode(books, distinct[row])
    np.testing.assert_array_equal(codes, codes[:3][row])
    decoded = codebooks.decode(books, codes)
    assert np.isfinite(decoded).all()
    if kind not in ("rqvae", "fsq", "rqvae-opq"):  # which have so few parameters or codes that they are not exact
        assert len(np.unique(codes, axis=0)) == 3
        np.testing.assert_allclose(decoded, distinct[row], atol=1e-3)


def test_a_balanced_catalogue_of_equal_rows_is_split():
    x = np.ones((20, 4), np.float32)
    config = SemanticIdConfig(ResidualConfig((4,), balanced=(1,)), None)
    books = codebooks.fit(KEY, x, config)
    sizes = np.bincount(codebooks.encode_catalogue(books, x, config)[:, 0], minlength=4)
    assert sizes.min() >= 4 and sizes.max() <= 6
    assert len(np.unique(codebooks.encode(books, x))) == 1


def test_product_quantizers_that_do_not_fit_the_width_are_refused_before_the_long_work(monkeypatch):
    monkeypatch.setattr(codebooks.residual, "fit", lambda *args: pytest.fail("the hierarchy was fitted first"))
    with pytest.raises(UserError, match=r"OPQ sizes=\(4, 4, 4\).*4 does not divide by 3: give as many sizes as one of"):
        codebooks.fit(KEY, X, SemanticIdConfig(ResidualConfig((4,)), OpqConfig((4, 4, 4))))


def test_ids_of_another_version_than_the_tables_are_refused(fitted, tmp_path):
    ids = [f"i{n:02}" for n in range(40)]
    path = write_items(tmp_path / "items.parquet", ids, X)
    command.fit(command.FitConfig(path, tmp_path / "ids", CONFIGS["residual"]))
    append(tmp_path / "ids", ["new"], X[:1] + 1)
    publish(tmp_path / "ids")
    with pytest.raises(UserError, match=r"'new' \(row 40\) is not in items.parquet .*: give these tables IDs of"):
        read_codes(tmp_path / "ids" / "codes.parquet", ids)
    publish(tmp_path / "ids", 1)
    with pytest.raises(UserError, match=r"'new' of items.parquet has no row: give these tables IDs of"):
        read_codes(tmp_path / "ids" / "codes.parquet", [*ids, "new"])
    with pytest.raises(UserError, match="version 1 of the semantic IDs has no active item_id 'new'"):
        read_version(tmp_path / "ids", 1).space([*ids, "new"])
    assert read_version(tmp_path / "ids", 2).space([*ids, "new"]).levels == 2


def write_items(path, ids, embeddings, **columns):
    pq.write_table(pa.table({"item_id": ids, "embedding": embeddings if isinstance(embeddings, pa.Array) else
                             list(embeddings), **columns}), path)  # fmt: skip
    return path


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["jaxrec.semantic_ids", *map(str, args)])
    command.main()


SMALL = ("--semantic-ids.hierarchy.sizes", "4", "4", "--semantic-ids.remainder", "None")
NAMED = r"items.parquet: number \d of row 7 \(item_id 'i07', column 'embedding'\) is NaN or infinity"


@pytest.mark.parametrize(
    ("embeddings", "more", "message"),
    [
        (with_row_7(np.nan), SMALL, NAMED),
        (with_row_7(np.inf), SMALL, NAMED),
        (with_row_7(1e300, np.float64), SMALL, NAMED),
        (pa.array([[1.0, 2.0]] * 7 + [[1.0, None]] + [[1.0, 2.0]] * 32), SMALL, NAMED),
        (pa.array([[1, 2]] * 7 + [[1, None]] + [[1, 2]] * 32), SMALL, NAMED),
        (pa.array([[1.0, 2.0]] * 39 + [[1.0]]), SMALL, r"item_id 'i39' \(row 39\) is 1 wide, those before it 2"),
        (pa.array([[]] * 40, pa.list_(pa.float32())), SMALL, "embedding in row 0 is empty"),
        (pa.array(["1"] * 40), SMALL, "column 'embedding' is string, but must be a list of numbers"),
        (X[:3], SMALL, "3 rows cannot fill a codebook of 4 codes"),
        (X[:1], SMALL, "1 rows cannot fill a codebook of 4 codes"),
        (X[:0], SMALL, "has no rows"),
        (X, (*SMALL[:3], "--semantic-ids.remainder", "OpqConfig", "--semantic-ids.remainder.sizes", "4", "4", "4"),
         "4 does not divide by 3"),
    ],
    ids=["nan", "inf", "large", "null", "integer-null", "ragged", "no-width", "text", "few", "one", "none", "opq"],
)  # fmt: skip
def test_the_command_line_names_file_and_item(tmp_path, monkeypatch, embeddings, more, message):
    ids = pa.array([f"i{n:02}" for n in range(len(embeddings))], pa.string())
    if not len(embeddings):
        embeddings = pa.array([], pa.list_(pa.float32()))
    path = write_items(tmp_path / "items.parquet", ids, embeddings)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "fit", "--items", path, "--out", tmp_path / "ids", *more)
    assert not (tmp_path / "ids").exists()


@pytest.mark.parametrize("command_name", ["append", "reencode"])
def test_later_items_are_held_to_the_same(tmp_path, monkeypatch, command_name):
    path = write_items(tmp_path / "items.parquet", [f"i{n:02}" for n in range(40)], X)
    run(monkeypatch, "fit", "--items", path, "--out", tmp_path / "ids", *SMALL)
    for embeddings, message in (
        (with_row_7(np.nan), NAMED),
        (np.ones((40, 3), np.float32), "3 wide, but the codebooks"),
    ):
        write_items(path, [f"i{n:02}" for n in range(40)], embeddings)
        with pytest.raises(UserError, match=message):
            run(monkeypatch, command_name, tmp_path / "ids", path)


@pytest.mark.parametrize(
    "embeddings", [np.ones((8, 4), np.float32), X[[0, 1] * 4], X[:8].astype(np.float64), np.arange(32).reshape(8, 4)]
)
def test_the_command_line_takes_the_same_rows_and_other_numbers(tmp_path, monkeypatch, embeddings):
    path = write_items(tmp_path / "items.parquet", list("abcdefgh"), embeddings)
    run(monkeypatch, "fit", "--items", path, "--out", tmp_path / "ids", *SMALL)
    codes = read_codes(tmp_path / "ids" / "codes.parquet", list("abcdefgh")).codes
    _, first, of_row = np.unique(embeddings, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(codes, codes[first][of_row.ravel()])


@pytest.mark.parametrize(
    "ids", [[1.0, 2.0], [None, 123456789012.0], [Decimal("1.50"), Decimal("2.00")], np.array([1, 2], np.float32)]
)
def test_floating_point_numbers_are_no_ids(tmp_path, ids):
    """123456789012.0 would be the item 1.23456789012e+11."""
    pq.write_table(pa.table({"item_id": ids, "embedding": [[1.0], [2.0]]}), tmp_path / "items.parquet")
    for read in (read_items, read_ids):
        with pytest.raises(
            UserError, match=r"items.parquet: column 'item_id' holds floating-point numbers .*: write ids"
        ):
            read(tmp_path / "items.parquet")


def test_whole_numbers_are_ids_as_they_are_written(tmp_path):
    ids = pa.array([2**63, 123456789012], pa.uint64())
    pq.write_table(pa.table({"item_id": ids, "embedding": [[1.0], [2.0]]}), tmp_path / "items.parquet")
    assert read_ids(tmp_path / "items.parquet") == ["9223372036854775808", "123456789012"]
    assert read_items(tmp_path / "items.parquet")[0] == ["9223372036854775808", "123456789012"]
