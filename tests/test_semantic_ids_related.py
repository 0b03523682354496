"""Related queries of a run: what is written and looked up, unseen and odd prefixes, an example's own answer."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_encoder import make_encoder

from jaxrec.config import UserError
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import SyntheticMall
from jaxrec.files import read_json
from jaxrec.semantic_ids import ResidualConfig, RqVaeConfig, SemanticIdConfig
from jaxrec.semantic_ids.files.vectors import read_embeddings
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig
from jaxrec.semantic_ids.related_queries import RelatedQueriesConfig, load_related
from jaxrec.semantic_ids.related_writing import write_related
from jaxrec.text.encoder import EncoderConfig, embed_texts
from jaxrec.text.prefixes import PrefixConfig

RQVAE = RqVaeConfig(
    (6, 5), (8, 8, 8), latent_width=4, warm_steps=50, steps=50, batch_size=64, start=KMeansConfig(iterations=2)
)
CONFIG = RelatedQueriesConfig(
    SemanticIdConfig(RQVAE, None), PrefixConfig(queries=3), related=4, min_cosine=-1.0, max_cosine=0.999
)
EMPTY = ("", "  \t", "\x00")
ODD = ("靴を探す", "مرحبا", "running \U0001f45f", "\ud83d", "a" * 10_000, "shoe " * 2_000)


def write_tables(folder, suggestions, searches=()):
    """The query tables of a run with rows (user, session, prefix, query, feedback) and (user, session, query)."""
    columns = dict(zip(("user", "session", "prefix", "query", "feedback"), map(list, zip(*suggestions))))
    split = ["train" if session < 9 else "valid" for session in columns["session"]]
    pq.write_table(pa.table(columns | {"split": split}), folder / "suggestions.parquet")
    pq.write_table(pa.table({"prefix": sorted(set(columns["prefix"]))}), folder / "prefixes.parquet")
    columns = dict(zip(("user", "session", "query"), map(list, zip(*searches)))) if searches else {}
    if columns:
        pq.write_table(pa.table(columns | {"split": ["train"] * len(searches)}), folder / "searches.parquet")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Tables of a small mall, and in `bert` an encoder of its letters."""
    folder = tmp_path_factory.mktemp("tables")
    source = SyntheticMall(users=60, items=100, tastes=10, sessions_per_user=6, exposures_per_session=1, searched=0.8)
    prepare(source, PrepareConfig(), folder)
    (folder / "items.parquet").unlink()  # no item is needed
    words = [word for name in ("queries", "prefixes") for text in texts_of(folder, name) for word in text.split()]
    make_encoder(folder / "bert", words)
    return folder


def texts_of(folder, name):
    return pq.read_table(folder / f"{name}.parquet")[{"queries": "query", "prefixes": "prefix"}[name]].to_pylist()


@pytest.fixture(scope="module")
def text(tables):
    return EncoderConfig(model=str(tables / "bert"), cache_dir=str(tables / "cache"))


@pytest.fixture(scope="module")
def made(tables, text):
    folder = tables / "related"
    folder.mkdir()
    write_related(tables, folder, text, CONFIG, seed=0)
    return folder


@pytest.fixture(scope="module")
def related(made, text):
    return load_related(made, text)


def test_what_is_written(tables, text, made, related):
    table = pq.read_table(made / "related_queries.parquet")
    assert table.column_names == ["query", "sessions", "c1", "c2"] and table["query"].to_pylist() == related.texts
    vectors = read_embeddings(made / "query_embeddings.safetensors", related.texts)
    np.testing.assert_allclose(vectors, embed_texts(related.texts, text), atol=1e-6)
    codes = np.stack([table["c1"], table["c2"]], axis=1)
    np.testing.assert_array_equal(codes, codebooks.encode(related.codebooks, vectors))
    assert related.codebooks.sizes == (6, 5)
    # Sessions that searched it or chose it in training, each once.
    searches, suggestions = (pq.read_table(tables / f"{name}.parquet") for name in ("searches", "suggestions"))
    known = {text: set() for text in related.texts}
    for row in searches.to_pylist():
        if row["split"] == "train":
            known[row["query"]].add((row["user"], row["session"]))
    for row in suggestions.to_pylist():
        if row["split"] == "train" and row["feedback"] in ("order", "item_click", "click"):
            known[row["query"]].add((row["user"], row["session"]))
    assert related.sessions.tolist() == [len(known[text]) for text in related.texts]
    figures = read_json(made / "quality.json")
    assert figures["queries"]["items"] == len(related.texts) and len(figures["prefixes"]["sharing_codes"]) == 2


def test_prefixes_are_enhanced_and_quantized(tables, text, made, related):
    """Eq. 2 with the most frequent completions, by hand."""
    prefixes = pq.read_table(made / "prefixes.parquet")
    assert prefixes["prefix"].to_pylist() == sorted({prefix.strip() for prefix in texts_of(tables, "prefixes")})
    counts: dict = {}
    rows = pq.read_table(tables / "suggestions.parquet").to_pylist()
    for row in rows:
        if row["split"] == "train" and row["feedback"] in ("order", "item_click", "click"):
            of_prefix = counts.setdefault(row["prefix"].strip(), {})
            of_prefix.setdefault(row["query"], set()).add((row["user"], row["session"]))
    own = dict(zip(prefixes["prefix"].to_pylist(), embed_texts(prefixes["prefix"].to_pylist(), text)))
    of_query = dict(zip(related.texts, embed_texts(related.texts, text)))
    expected = []
    for prefix, vector in own.items():
        taken = sorted(counts.get(prefix, {}).items(), key=lambda each: (-len(each[1]), each[0]))[:3]
        mean = np.mean([of_query[query] for query, _ in taken], axis=0) if taken else vector
        expected.append((vector + mean) / 2)
    found = related.embeddings(list(own))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    codes = related.codes(list(own))
    np.testing.assert_array_equal(codes, codebooks.encode(related.codebooks, found))
    np.testing.assert_array_equal(codes, np.stack([prefixes["c1"], prefixes["c2"]], axis=1))
    assert any(len(of_prefix) > 1 for of_prefix in counts.values())


def test_a_look_up_of_many_is_that_of_each(tables, text, made, related):
    prefixes = [*texts_of(tables, "prefixes"), "never typed", *ODD, *EMPTY]
    together = related.related(prefixes)
    assert together.dtype == np.int32 and together.shape == (len(prefixes), 4)
    fresh = load_related(made, text)
    for prefix, row in zip(prefixes, together):
        np.testing.assert_array_equal(fresh.related([prefix])[0], row)
        np.testing.assert_array_equal(fresh.related([prefix])[0], row, "what is remembered")
    np.testing.assert_array_equal(related.related([prefix.upper() + " " for prefix in prefixes[:9]]), together[:9])
    assert (together[-len(EMPTY) :] == -1).all() and (together[: -len(EMPTY)] >= 0).all()
    assert all(len(set(row)) == len(row) for row in together[: -len(EMPTY)].tolist())
    assert related.related([]).shape == (0, 4)


def test_an_unseen_prefix_has_its_own_embedding(text, related):
    np.testing.assert_allclose(related.embeddings(["never typed"]), embed_texts(["never typed"], text), atol=1e-6)
    codes, empty = related.codes(["never typed", " "])
    np.testing.assert_array_equal(codes, codebooks.encode(related.codebooks, related.embeddings(["never typed"]))[0])
    assert empty.tolist() == [0, 0] and not related.embeddings([""]).any()


def test_what_is_remembered_is_bounded(made, text, tmp_path):
    folder = shutil.copytree(made, tmp_path / "related")
    values = json.loads((folder / "related.json").read_text())
    (folder / "related.json").write_text(json.dumps(values | {"remembered": 2}))
    few = load_related(folder, text)
    few.related(["red", "blue"])
    encoded = []
    few._embedder = lambda texts, embedder=few._embedder: encoded.extend(texts) or embedder(texts)
    few.related(["red"])
    few.related(["green"])
    few.related(["red"])
    assert encoded == ["green"], "the one asked for longest ago was forgotten: blue"
    few.related(["blue", "x" * 500])
    few.related(["x" * 500])
    assert encoded == ["green", "blue", "x" * 500, "x" * 500], "long ones are not remembered"


def test_the_answer_of_an_example_is_not_told_by_its_own_session(tmp_path, text):
    """A query that one session knew is no related query of its example; what others knew stays."""
    rows = [
        (0, 0, "ru", "Running Shoes", "order"),
        (0, 0, "run", "running shoes", "click"),
        (0, 0, "ru", "running shoes", "click"),
        (1, 0, "ru", "rubber boots", "click"),
        (2, 0, "ru", "rubber boots", "order"),
        (2, 1, "ru", "rugs", "show"),
        (3, 0, "rug", "rugs", "click"),
        (3, 9, "rust", "rusty nails", "click"),
    ]
    write_tables(tmp_path, rows, [(0, 0, "running  shoes"), (3, 0, "rugs"), (4, 0, "rugs")])
    (tmp_path / "related").mkdir()
    config = replace(CONFIG, semantic_ids=SemanticIdConfig(ResidualConfig((2, 2)), None), max_cosine=1.0)
    write_related(tmp_path, tmp_path / "related", text, config, seed=0)
    made = load_related(tmp_path / "related", text)
    assert made.texts == ["rubber boots", "rugs", "running shoes"] and made.sessions.tolist() == [2, 2, 1]

    def queries(prefix, answer=""):
        return {made.texts[row] for row in made.related([prefix], [answer])[0] if row >= 0}

    assert queries("ru") == queries("ru", "unheard of") == {"rubber boots", "rugs", "running shoes"}
    # The session of the example is the only one that knew it, though it typed two prefixes and searched.
    assert queries("ru", "running shoes") == queries("run", " Running shoes") == {"rubber boots", "rugs"}
    assert queries("ru", "rubber boots") == queries("ru", "rugs") == {"rubber boots", "rugs", "running shoes"}
    # Eq. 2 without the example: "run" was completed by it alone, "ru" by one of two completions.
    own, vectors = embed_texts(["ru", "run"], text), embed_texts(made.texts, text)
    rows, answers = np.array([made._prefix_rows["ru"], made._prefix_rows["run"]]), np.array([2, 2])
    found, same = made._completions(rows, answers)
    assert found.tolist() == [[0, -1, -1], [-1, -1, -1]] and same.tolist() == [False, False]
    _, enhanced = made._quantized(["ru", "run"], rows, found, same)
    np.testing.assert_allclose(enhanced, [(own[0] + vectors[0]) / 2, own[1]], atol=1e-6)
    found, same = made._completions(rows, np.array([0, 1]))
    assert found.tolist() == [[0, 2, -1], [2, -1, -1]] and same.tolist() == [True, True]
    twice = replace(config, min_sessions=2)
    shutil.rmtree(tmp_path / "related")
    (tmp_path / "related").mkdir()
    write_related(tmp_path, tmp_path / "related", text, twice, seed=0)
    made = load_related(tmp_path / "related", text)
    assert made.texts == ["rubber boots", "rugs"] and queries("ru", "rugs") == {"rubber boots"}


def test_answers_are_found_as_often_in_training_as_held_out(made):
    """Sessions of the mall are alike: what a training reads must tell as much of its answer as what a server reads."""
    answers = read_json(made / "quality.json")["answers"]
    assert answers["held_out"] > 0.2
    assert abs(answers["train"] - answers["held_out"]) < 0.1, answers
    assert answers["with_itself"] >= answers["train"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"related": 0}, r"'related\.related' is 0; give 1 or more"),
        ({"min_cosine": 1.5}, r"'related\.min_cosine' is 1\.5; give a cosine"),
        ({"max_cosine": float("nan")}, r"'related\.max_cosine' is nan; give a cosine"),
    ],
)
def test_a_configuration_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        RelatedQueriesConfig(**given)


def test_tables_that_cannot_be_used(tmp_path, text):
    write_tables(tmp_path, [(0, 0, "ru", "rugs", "click"), (1, 0, "ru", "rags", "show")])
    out = tmp_path / "related"
    out.mkdir()
    with pytest.raises(UserError, match="2 rows cannot fill a codebook of 6 codes"):
        write_related(tmp_path, out, text, CONFIG, seed=0)
    with pytest.raises(UserError, match=r"in 2 sessions of training: lower related\.min_sessions"):
        write_related(tmp_path, out, text, replace(CONFIG, min_sessions=2), seed=0)
    write_tables(tmp_path, [(0, 0, "ru", "rugs", "show")])
    with pytest.raises(UserError, match=r"no query of .* was searched or chosen"):
        write_related(tmp_path, out, text, CONFIG, seed=0)
    (tmp_path / "suggestions.parquet").unlink()
    with pytest.raises(UserError, match=r"has no suggestions\.parquet"):
        write_related(tmp_path, out, text, CONFIG, seed=0)
    assert not list(out.iterdir()), "nothing half written"


def test_a_damaged_folder_is_named(made, text, tmp_path):
    folder = shutil.copytree(made, tmp_path / "related")
    (folder / "prefixes.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"prefixes\.parquet cannot be read .* phase `related` again"):
        load_related(folder, text)
    (folder / "related.json").unlink()
    with pytest.raises(UserError, match=r"related\.json"):
        load_related(folder, text)
