"""IDs of queries: those of the table, unknown ones, keywords, later items, every kind of alignment, bad folders."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_encoder import make_encoder

from jaxrec.config import UserError
from jaxrec.data.pairs import PairConfig
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.query_pairs import QueryPairConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.files import read_json
from jaxrec.semantic_ids import CollisionConfig, FsqConfig, SemanticIdConfig, rq_opq
from jaxrec.semantic_ids.commands import read_text_items
from jaxrec.semantic_ids.embeddings import embed_new, finetune_items
from jaxrec.semantic_ids.files.vectors import read_embeddings
from jaxrec.semantic_ids.keyword_embeddings import load_keywords
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig
from jaxrec.semantic_ids.queries import load_query_ids
from jaxrec.semantic_ids.tokenize import tokenize
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig, embed_texts, load_encoder, with_params
from jaxrec.text.finetune import SearchFinetuneConfig, Tuned, save
from jaxrec.text.keywords import KeywordConfig
from jaxrec.text.pair_batches import TermConfig, TermsConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

IDS = rq_opq((6, 5, 4), (3, 3))
TERMS = TermsConfig(**{name: TermConfig(batch_size=8, min_cosine=-1.0) for name in ("i2i", "q2q", "q2i", "rank")})
ON_SEARCHES = SearchFinetuneConfig(
    trains="projection",
    terms=TERMS,
    projection_width=8,
    projection_hidden=8,
    optim=OptimConfig(learning_rate=1e-3, warmup=2),
    training=LoopConfig(steps=20, log_every=10),
    queries=QueryPairConfig(limits=PairConfig(itemcf_within="user", min_common=1)),
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Tables of a small mall, and in `bert` an encoder of its words."""
    folder = tmp_path_factory.mktemp("tables")
    source = SyntheticMall(users=40, items=60, tastes=6, sessions_per_user=5, exposures_per_session=2, searched=0.8)
    prepare(source, PrepareConfig(), folder)
    texts = pq.read_table(folder / "items.parquet")["text"].to_pylist()
    make_encoder(folder / "bert", [word for text in texts for word in (*text.split(), *text.lower().split())])
    return folder


@pytest.fixture(scope="module")
def text(tables):
    return EncoderConfig(model=str(tables / "bert"), cache_dir=str(tables / "cache"))


@pytest.fixture(scope="module")
def made(tables, text):
    """A semantic_ids folder with keywords and queries."""
    folder = tables / "ids"
    folder.mkdir()
    align = AlignConfig(width=8, hidden=8, epochs=0.1)
    tokenize(tables, folder, text, align, IDS, CollisionConfig(), 0, keywords=KeywordConfig(), query_ids=True)
    return folder


@pytest.fixture(scope="module")
def ids(made):
    return load_query_ids(made)


def queries_of(tables):
    return pq.read_table(tables / "queries.parquet")["query"].to_pylist()


def test_codes_are_those_of_quantizing_by_hand(tables, text, made, ids):
    queries = queries_of(tables)
    keywords, own = load_keywords(made), embed_new(made, queries, text_config=text)
    by_hand = own.copy()
    for row, query in enumerate(queries):
        if found := keywords.keywords.match_many([query])[0]:
            by_hand[row] = (own[row] + np.mean([keywords.vectors[each] for each in found], axis=0)) / 2
    assert not np.allclose(by_hand, own)
    np.testing.assert_allclose(ids.embeddings(queries), by_hand, atol=1e-6)
    codes = ids.codes(queries)
    assert codes.shape == (len(queries), 5) and codes.dtype == np.int32
    np.testing.assert_array_equal(codes, codebooks.encode(ids.codebooks, ids.embeddings(queries)))
    table = pq.read_table(made / "query_codes.parquet")
    assert table.column_names == ["query", "c1", "c2", "c3", "c4", "c5"] and table["query"].to_pylist() == queries
    np.testing.assert_array_equal(np.stack([table[f"c{m}"] for m in range(1, 6)], axis=1), codes)
    # An item's text is embedded in the same way.
    texts = pq.read_table(tables / "items.parquet")["text"].to_pylist()
    np.testing.assert_allclose(keywords.vectors, embed_new(made, keywords.keywords.texts, text_config=text), atol=1e-6)
    assert len(texts) == len(pq.read_table(made / "codes.parquet"))


def test_unknown_queries_are_encoded_alike_in_any_batch(tables, made, ids, tmp_path):
    queries = queries_of(tables)
    folder = shutil.copytree(made, tmp_path / "ids")
    for name in ("query_codes.parquet", "query_embeddings.safetensors"):
        (folder / name).unlink()
    without = load_query_ids(folder)
    np.testing.assert_allclose(without.embeddings(queries), ids.embeddings(queries), atol=1e-6)
    together = without.codes(queries)
    assert (together == ids.codes(queries)).mean() > 0.99
    for rows in ([3], [5, 3, 3], range(7)):
        np.testing.assert_array_equal(without.codes([queries[row] for row in rows]), together[list(rows)])


def test_queries_are_compared_by_their_normalised_texts(tables, ids):
    query = queries_of(tables)[0]
    first, other, empty, new = ids.codes([query, f"  {query.upper()} ", "  ", "never seen 靴"])
    assert first.tolist() == other.tolist() and empty.tolist() == [0] * 5 and new.max() > 0
    assert ids.has_id([query, "", " \t"]).tolist() == [True, False, False]
    assert not ids.embeddings([""]).any() and ids.codes([]).shape == (0, 5)
    assert ids.codes(["shoe " * 2000]).shape == (1, 5)


def test_centroids_add_up_to_what_codes_decode_to(tables, made, ids):
    levels = codebooks.centroids(codebooks.load(made / "codebooks.safetensors"))
    assert [level.shape for level in levels] == [(6, 8), (5, 8), (4, 8), (3, 8), (3, 8)]
    codes = ids.codes(queries_of(tables))
    total = sum(level[codes[:, m]] for m, level in enumerate(levels))
    np.testing.assert_allclose(total, codebooks.decode(ids.codebooks, codes), atol=1e-5)
    np.testing.assert_allclose(levels[0][codes[:, 0]], codebooks.decode(ids.codebooks, codes[:, :1]), atol=1e-6)


def test_the_third_level_alone_is_balanced(made, tables):
    config = rq_opq()
    assert config.hierarchy.sizes == (4096, 1024, 512) and config.hierarchy.balanced == (3,)
    assert config.remainder.sizes == (256, 256)
    sizes = np.bincount(pq.read_table(made / "codes.parquet")["c3"])
    assert sizes.tolist() and sizes.min() >= 12 and sizes.max() <= 18  # 60 items in 4 codes, 10% off, rounded up


def test_later_items_are_enhanced_alike(tables, made, tmp_path):
    items = pq.read_table(tables / "items.parquet")
    pq.write_table(items.select(["item_id", "text", "category", "brand"]).slice(0, 9), tmp_path / "later.parquet")
    item_ids, vectors, *_ = read_text_items(made, tmp_path / "later.parquet")
    there = read_embeddings(made / "embeddings.safetensors", items["item_id"])
    assert item_ids == items["item_id"].to_pylist()[:9]
    np.testing.assert_allclose(vectors, there[:9], atol=1e-5)
    table = pa.table({"item_id": ["new"], "embedding": [[0.0] * 16]})
    pq.write_table(table, tmp_path / "later.parquet")
    with pytest.raises(UserError, match="no column 'text', in which the keywords"):
        read_text_items(made, tmp_path / "later.parquet")


def test_figures(made):
    figures = read_json(made / "quality.json")
    assert figures["keywords"]["by_attribute"].keys() == {"category", "brand"}
    assert figures["keywords"]["items_with_keywords"] == 1
    assert len(figures["prefixes"]) == 5 and "independent_coding_rate" in figures


def test_an_alignment_on_searches(tables, text, tmp_path):
    tuned = finetune_items(tables, tmp_path / "work", text, ON_SEARCHES, seed=0)
    figures = read_json(tuned / "alignment.json")
    assert {f"{name}_pairs" for name in ("i2i", "q2q", "q2i", "rank")} <= figures.keys()
    check_alone(tables, text, tmp_path, ON_SEARCHES, tuned)


def test_an_encoder_that_was_tuned(tables, text, tmp_path):
    encoder = load_encoder(text.model)
    other = jax.tree.map(lambda weights: weights * 1.5, encoder.params)
    save(Tuned(with_params(encoder, other), None, {}), tmp_path / "work" / "tuned")
    folder = check_alone(tables, text, tmp_path, replace(ON_SEARCHES, trains="encoder"), tmp_path / "work" / "tuned")
    queries = queries_of(tables)
    assert not np.allclose(load_query_ids(folder).embeddings(queries), embed_texts(queries, text), atol=1e-2)


def check_alone(tables, text, tmp_path, config, tuned):
    """The IDs of queries need nothing but the folder, which is returned."""
    folder = tmp_path / "ids"
    folder.mkdir()
    tokenize(tables, folder, text, config, IDS, CollisionConfig(), 0, tuned=tuned, query_ids=True)
    shutil.rmtree(tmp_path / "work")
    ids, queries = load_query_ids(folder), queries_of(tables)
    codes = ids.codes(queries)
    np.testing.assert_array_equal(codes, codebooks.encode(ids.codebooks, ids.embeddings(queries)))
    np.testing.assert_allclose(ids.embeddings(queries), embed_new(folder, queries, text_config=text), atol=1e-6)
    assert ids.codes(["unheard of"]).shape == (1, 5)
    return folder


def test_nothing_is_embedded_for_a_keyword_column_that_is_none(tables, tmp_path):
    nowhere, wrong = EncoderConfig(model="no_such_package_here"), KeywordConfig(attributes=("brnd",))
    with pytest.raises(UserError, match=r"keywords\.attributes names 'brnd'"):
        tokenize(tables, tmp_path, nowhere, AlignConfig(), IDS, CollisionConfig(), 0, keywords=wrong)


def test_bad_folders(tables, made, text, tmp_path):
    folder = shutil.copytree(made, tmp_path / "ids")
    (folder / "keywords.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"keywords\.parquet holds no keywords"):
        load_query_ids(folder)
    (folder / "text.json").write_text('{"model": null, "max_tokens": 8}')
    with pytest.raises(UserError, match="brought embeddings of their own"):
        load_query_ids(folder)
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    fsq = SemanticIdConfig(ResidualConfig((4,)), FsqConfig((2, 2), steps=1))
    codebooks.save(codebooks.fit(jax.random.key(0), x, fsq), folder / "codebooks.safetensors")
    with pytest.raises(UserError, match="Fsq has no centroids"):
        codebooks.centroids(codebooks.load(folder / "codebooks.safetensors"))
