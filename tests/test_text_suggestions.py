"""The alignment on suggestions: pairs of p2q and q2q by hand, its training without items, and as a stage of a run."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_encoder import make_encoder

from jaxrec.config import UserError, from_json, to_json
from jaxrec.data.pairs import PairConfig
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.query_pairs import AskedPairConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.data.suggestion_log import read_asked, read_suggestions
from jaxrec.files import read_json
from jaxrec.run import Run, stage_path
from jaxrec.semantic_ids import ResidualConfig, SemanticIdConfig
from jaxrec.semantic_ids.related_queries import RelatedQueriesConfig, load_related
from jaxrec.systems import phases
from jaxrec.systems.config import RunConfig
from jaxrec.text.encoder import EncoderConfig, embed_texts
from jaxrec.text.finetune import SuggestionFinetuneConfig, embed, load
from jaxrec.text.pair_batches import TermConfig, TermsConfig
from jaxrec.text.prefixes import PrefixConfig
from jaxrec.text.suggestions import finetune_suggestions, suggestion_pairs
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.stages import run_stages

ALL = TermConfig(batch_size=8, min_cosine=-1.0)
ALIGN = SuggestionFinetuneConfig(
    trains="projection",
    terms=TermsConfig(p2q=ALL, q2q=ALL),
    projection_width=8,
    projection_hidden=8,
    optim=OptimConfig(learning_rate=1e-3, warmup=2),
    training=LoopConfig(steps=20, log_every=10),
    queries=AskedPairConfig(limits=PairConfig(min_common=1)),
)
SOURCE = SyntheticMall(users=60, items=60, tastes=6, sessions_per_user=5, exposures_per_session=1, searched=0.9)


@dataclass(frozen=True)
class TextRunConfig(RunConfig):
    """A run that reads no items."""

    data: SyntheticMall = SOURCE
    related: RelatedQueriesConfig = field(
        default_factory=lambda: RelatedQueriesConfig(SemanticIdConfig(ResidualConfig((4, 4)), None), min_cosine=-1.0)
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Tables of a small mall without its items, and in `bert` an encoder of its words."""
    folder = tmp_path_factory.mktemp("tables")
    prepare(SOURCE, PrepareConfig(), folder)
    for name in ("items", "pairs", "events"):
        (folder / f"{name}.parquet").unlink()
    texts = pq.read_table(folder / "queries.parquet")["query"].to_pylist()
    make_encoder(folder / "bert", [word for text in texts for word in text.split()])
    return folder


@pytest.fixture(scope="module")
def text(tables):
    return EncoderConfig(model=str(tables / "bert"), cache_dir=str(tables / "cache"))


def write_log(folder: Path) -> None:
    typed = [
        (0, 0, "train", "Ru", "Rugs ", "order"),
        (0, 0, "train", "ru", "rugs", "click"),
        (0, 0, "train", "ru", "rags", "show"),
        (0, 1, "train", "ra", "rags", "click"),
        (1, 0, "train", "ru", "rugs", "item_click"),
        (1, 1, "valid", "ru", "rust", "click"),
        (2, 0, "train", "", "rugs", "click"),
    ]
    searched = [(0, 0, "train", "Boots"), (1, 0, "train", "boots"), (1, 0, "train", " "), (2, 0, "test", "boots")]
    for name, rows, columns in (
        ("suggestions", typed, ("user", "session", "split", "prefix", "query", "feedback")),
        ("searches", searched, ("user", "session", "split", "query")),
    ):
        table = pa.table(dict(zip(columns, map(list, zip(*rows)))))
        for each in ("user", "session"):
            table = table.set_column(table.column_names.index(each), each, table[each].cast(pa.int32()))
        pq.write_table(table, folder / f"{name}.parquet")


def test_the_log_is_read_once_a_session(tmp_path):
    write_log(tmp_path)
    typed = read_suggestions(tmp_path, "train", ("click", "order", "item_click"))
    assert [tuple(row.values()) for row in typed.to_pylist()] == [
        (0, 0, "ru", "rags", "show"),
        (0, 0, "ru", "rugs", "click"),
        (0, 1, "ra", "rags", "click"),
        (1, 0, "ru", "rugs", "click"),
        (2, 0, "", "rugs", "click"),
    ]
    asked = read_asked(tmp_path, ("click", "order", "item_click"))
    expected = [(0, 0, "boots"), (0, 0, "rugs"), (0, 1, "rags"), (1, 0, "boots"), (1, 0, "rugs"), (2, 0, "rugs")]
    assert [tuple(row.values()) for row in asked.to_pylist()] == expected
    (tmp_path / "searches.parquet").unlink()
    assert "boots" not in read_asked(tmp_path, ("click", "order", "item_click"))["query"].to_pylist()


def test_pairs_by_hand(tmp_path):
    write_log(tmp_path)

    def named(config):
        texts, pairs = suggestion_pairs(tmp_path, config)
        return {name: {(texts[a], texts[b]) for a, b in zip(p.left, p.right)} for name, p in pairs.items()}

    # Two sessions had both; "rags" was asked in a session of its own.
    assert named(SuggestionFinetuneConfig()) == {"p2q": {("ru", "rugs"), ("ra", "rags")}, "q2q": {("boots", "rugs")}}
    limits = PairConfig(itemcf_within="user", min_common=1)
    of_users = named(SuggestionFinetuneConfig(queries=AskedPairConfig(limits=limits)))
    assert {frozenset(pair) for pair in of_users["q2q"]} == {
        frozenset(pair) for pair in (("boots", "rugs"), ("rags", "rugs"), ("boots", "rags"))
    }
    none = SuggestionFinetuneConfig(queries=AskedPairConfig(q2q=()), prefixes=PrefixConfig(min_count=2))
    assert named(none) == {"p2q": {("ru", "rugs")}, "q2q": set()}


def test_an_alignment_needs_no_items(tables, text, tmp_path):
    tuned = finetune_suggestions(tables, tmp_path, text, ALIGN, seed=0)
    figures = read_json(tuned / "alignment.json")
    assert figures["p2q_pairs"] > 8 and figures["q2q_pairs"] > 8
    assert embed(load(tuned, text), ["red"], text).shape == (1, 8)


def test_a_configuration_that_cannot_be(tables, text, tmp_path):
    with pytest.raises(UserError, match=r"'align\.kinds' names pairs of items"):
        SuggestionFinetuneConfig(kinds=("swing",))
    with pytest.raises(UserError, match=r"'queries\.q2q' names 'siwng'"):
        AskedPairConfig(q2q=("siwng",))
    with pytest.raises(UserError, match=r"has no suggestions\.parquet"):
        finetune_suggestions(tmp_path, tmp_path, text, ALIGN, seed=0)
    config = TextRunConfig(align=ALIGN)
    assert from_json(TextRunConfig, to_json(config)) == config


@pytest.mark.parametrize("align", [None, ALIGN], ids=["as it came", "aligned"])
def test_related_queries_of_a_run(monkeypatch, tables, text, tmp_path, align):
    """The phase `related` behind the stage `alignment`, or without one; there are no items."""

    def without_items(source, config, folder):
        for name in ("suggestions", "searches", "prefixes", "queries"):
            (folder / f"{name}.parquet").write_bytes((tables / f"{name}.parquet").read_bytes())

    monkeypatch.setattr(phases, "prepare", without_items)
    config = TextRunConfig(text=text, **({"align": align} if align else {}))
    run = Run.open(tmp_path / "run", config)
    stages = phases.alignment(run, config, with_ids=False)
    assert [stage.name for stage in stages] == (["alignment"] if align else [])
    if stages:
        run_stages(run, stages)
    made = phases.prepare_related(run, config)
    folder = run.place("related")
    related = load_related(folder, text)
    assert (folder / "alignment.safetensors").exists() == bool(align)
    expected = embed_texts(["red"], text)
    if align:
        expected = embed(load(run.place(stage_path("alignment")) / "tuned", text), ["red"], text)
    np.testing.assert_allclose(related.embeddings(["red"]), expected, atol=1e-6)
    assert (related.related(["red"]) >= 0).any()
    assert phases.prepare_related(run, config) == made
