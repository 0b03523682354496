"""When a run makes its semantic IDs anew: the text encoder decides by what it holds, not by where it lies."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_encoder import make_encoder

from jaxrec import systems
from jaxrec.config import UserError, fingerprint, from_json, parse_cli, to_json
from jaxrec.data.sources import SyntheticMall
from jaxrec.run import Run
from jaxrec.systems import phases, train
from jaxrec.systems.onemall import training as onemall
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.text.keywords import KeywordConfig


@dataclass(frozen=True)
class ReadsQueries(OneMallConfig):
    """A system whose model reads IDs of queries."""

    query_ids: ClassVar[bool] = True


STEPS = {
    phases: ("write_examples", "tokenize", "finetune_items"),
    onemall: ("train_model", "assemble", "training_batches", "exact_loss"),
    systems: ("compare", "present", "load_recommender"),
}


@pytest.fixture
def made(monkeypatch):
    """What `train` does, as a list of names, with work that is only noted down."""
    done = []
    for module, names in STEPS.items():
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, name=name, **__: done.append(name))
    return done


def run_with(monkeypatch, tmp_path, columns: dict, text: EncoderConfig) -> tuple[Run, OneMallConfig]:
    def prepare(source, config, folder):
        pq.write_table(pa.table(columns), folder / "items.parquet")

    monkeypatch.setattr(phases, "prepare", prepare)
    config = OneMallConfig(data=SyntheticMall(), text=text, align=FinetuneConfig())
    return Run.open(tmp_path / "run", config), config


def test_another_encoder_in_the_same_folder_is_noticed(monkeypatch, tmp_path, made):
    make_encoder(tmp_path / "bert", ["milk"])
    text = EncoderConfig(model=str(tmp_path / "bert"))
    run, config = run_with(monkeypatch, tmp_path, {"item_id": ["a"], "text": ["milk"]}, text)
    train(run, config)
    assert {"tokenize", "finetune_items", "train_model"} <= set(made)
    made.clear()
    train(run, config)
    assert made == ["present"]
    made.clear()
    make_encoder(tmp_path / "bert", ["milk"], seed=1)
    with pytest.raises(
        UserError, match="stages/alignment was made from have changed; give another --run, or --replace"
    ):
        train(run, config)
    assert made == []
    train(Run.open(run.path, config, replace=True), config)
    assert {"tokenize", "finetune_items", "train_model", "compare"} <= set(made) and "write_examples" not in made


def test_the_alignment_is_a_stage(monkeypatch, tmp_path, made):
    make_encoder(tmp_path / "bert", ["milk"])
    text = EncoderConfig(model=str(tmp_path / "bert"))
    run, config = run_with(monkeypatch, tmp_path, {"item_id": ["a"], "text": ["milk"]}, text)
    with pytest.raises(UserError, match="--only train: the stage alignment, which it is trained from, is not trained"):
        train(run, config, only="train")
    assert made == []
    train(run, config, until="alignment")
    assert made == ["finetune_items"] and not (run.path / "semantic_ids").exists()
    train(run, config, only="train")
    assert made.count("finetune_items") == 1 and {"tokenize", "train_model", "compare"} <= set(made)
    # Another training needs no other alignment.
    changed = replace(config, batch_size=config.batch_size + 1)
    with pytest.raises(UserError, match=r"batch_size \(64 there, 65 now\); give another --run, or --replace"):
        train(Run.open(run.path, changed), changed)
    made.clear()
    train(Run.open(run.path, changed, replace=True), changed)
    assert {"train_model", "compare"} <= set(made) and not {"finetune_items", "tokenize"} & set(made)


def test_a_new_alignment_on_new_data_is_trained_beside_the_old_training(monkeypatch, tmp_path, made):
    make_encoder(tmp_path / "bert", ["milk"])
    text = EncoderConfig(model=str(tmp_path / "bert"))
    run, config = run_with(monkeypatch, tmp_path, {"item_id": ["a"], "text": ["milk"]}, text)
    old = replace(config, align=AlignConfig())
    train(Run.open(run.path, old), old)
    changed = replace(config, data=SyntheticMall(seed=1))
    train(Run.open(run.path, changed, replace=True), changed, until="alignment")
    assert made[-1] == "finetune_items"
    assert [folder.name for folder in (run.path / "stages").iterdir()] == ["train"]
    Run(run.path).check_trained()
    tuned = []
    monkeypatch.setattr(phases, "tokenize", lambda *_, **given: tuned.append(given["tuned"]))
    train(Run.open(run.path, changed, replace=True), changed)
    assert tuned == [run.path / "next" / "stages" / "alignment" / "tuned"]
    assert (run.path / "stages" / "alignment").exists() and not (run.path / "next").exists()


def test_items_with_embeddings_need_no_encoder(monkeypatch, tmp_path, made):
    text = EncoderConfig(model="no_such_package_here")
    run, config = run_with(monkeypatch, tmp_path, {"item_id": ["a"], "embedding": [[1.0]]}, text)
    train(run, config)
    assert "tokenize" in made


def test_only_what_a_run_has_decides_its_ids():
    plain = OneMallConfig(data=SyntheticMall())
    before = fingerprint("tables", plain.align, plain.semantic_ids, plain.collisions, plain.seed)
    assert phases._id_inputs(plain, "tables", ()) == before
    others = [
        replace(plain, keywords=KeywordConfig()),
        replace(plain, keywords=KeywordConfig(most=9)),
        ReadsQueries(data=SyntheticMall()),
    ]
    assert len({before, *(phases._id_inputs(other, "tables", ()) for other in others)}) == 4


def test_keywords_and_queries_reach_the_ids(monkeypatch, tmp_path, made):
    columns = {"item_id": ["a"], "embedding": [[1.0]]}
    monkeypatch.setattr(
        phases, "prepare", lambda source, config, folder: pq.write_table(pa.table(columns), folder / "items.parquet")
    )
    asked = []
    monkeypatch.setattr(phases, "tokenize", lambda *_, **given: asked.append((given["keywords"], given["query_ids"])))
    for name, kind, keywords in (("a", OneMallConfig, None), ("b", ReadsQueries, KeywordConfig())):
        config = kind(data=SyntheticMall(), keywords=keywords)
        phases.prepare_with_ids(Run.open(tmp_path / name, config), config)
    assert asked == [(None, False), (KeywordConfig(), True)]


def test_searches_and_keywords_are_configured_by_flags(tmp_path):
    flags = ("--align", "SearchFinetuneConfig", "--align.queries.q2q", "swing", "--align.terms.q2i.weight", "2")
    flags += ("--keywords", "KeywordConfig", "--keywords.attributes", "brand", "category")
    config, _ = parse_cli([str(Path(__file__).parent / "mall.py"), "--run", str(tmp_path), *flags])
    assert isinstance(config.align, FinetuneConfig) and config.align.queries.q2q == ("swing",)
    assert config.align.terms.q2i.weight == 2 and config.keywords.attributes == ("brand", "category")
    assert from_json(type(config), to_json(config)) == config
