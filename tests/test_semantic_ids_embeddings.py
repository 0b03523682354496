"""Item embeddings of a run, by every kind of alignment, and those of new items, which must be made the same way."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from tiny_encoder import make_encoder

from jaxrec.config import UserError, from_json, to_json
from jaxrec.files import read_json
from jaxrec.semantic_ids import CollisionConfig, FsqConfig, ResidualConfig, SemanticIdConfig, commands
from jaxrec.semantic_ids.embeddings import ALIGNMENT, aligned, embed_new, finetune_items, read_pairs
from jaxrec.semantic_ids.table.version_files import read_version
from jaxrec.semantic_ids.tokenize import tokenize
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig, embed_texts
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.text.pair_batches import TermConfig, TermsConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

COLORS, GOODS = ("red", "blue", "green", "white", "black"), ("shirt", "cup", "lamp", "shoe", "chair", "pen")
TEXTS = [f"{extra} {color} {thing}" for extra in ("new", "fine") for color in COLORS for thing in GOODS]
IDS = [f"i{n:02}" for n in range(len(TEXTS))]
COLOR = np.array([COLORS.index(text.split()[1]) for text in TEXTS])
LEARNED = OptimConfig(learning_rate=3e-3, warmup=5, weight_decay=0.0)
FINETUNE = FinetuneConfig(
    terms=TermsConfig(i2i=TermConfig(min_cosine=-1.0)),
    held_out=0.2,
    projection_width=8,
    projection_hidden=16,
    projection_learning_rate=1e-2,
    optim=LEARNED,
    training=LoopConfig(steps=30, log_every=10),
)
ALIGNMENTS = {
    "align": AlignConfig(width=8, hidden=16, batch_size=32, learning_rate=1e-2, item_residual=False),
    "encoder": FINETUNE,
    "projection": replace(FINETUNE, trains="projection"),
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Items "new red shirt": those of one color are swing pairs, the same goods are itemcf pairs."""
    folder = tmp_path_factory.mktemp("tables")
    words = [word for text in TEXTS for word in text.split()]
    make_encoder(folder / "bert", words)
    pq.write_table(pa.table({"item_id": IDS, "text": TEXTS, "count": np.arange(60)}), folder / "items.parquet")
    parts = []
    for kind, group in (("swing", COLOR), ("itemcf", np.arange(60) % 6)):
        left, right = np.nonzero((group[:, None] == group) & (np.arange(60)[:, None] < np.arange(60)))
        parts.append({"item": left.astype(np.int32), "other": right.astype(np.int32), "kind": [kind] * len(left)})
    pq.write_table(pa.concat_tables([pa.table(part) for part in parts]), folder / "pairs.parquet")
    return folder


@pytest.fixture(scope="module")
def made(tables):
    """The semantic_ids folder of every kind of alignment."""
    text_config = EncoderConfig(model=str(tables / "bert"), cache_dir=str(tables / "cache"))
    ids = SemanticIdConfig(ResidualConfig((5, 4)), FsqConfig((2, 2), steps=10))
    folders = {}
    for name, config in ALIGNMENTS.items():
        tuned = None
        if isinstance(config, FinetuneConfig):
            tuned = finetune_items(tables, tables / f"{name}-work", text_config, config, seed=0)
        folders[name] = tables / name
        folders[name].mkdir()
        tokenize(tables, folders[name], text_config, config, ids, CollisionConfig(), seed=0, tuned=tuned)
    return folders


def right_neighbours(vectors):
    scores = vectors @ vectors.T - 9 * np.eye(60)
    return (COLOR[np.argsort(-scores, axis=1)[:, :11]] == COLOR[:, None]).mean()


@pytest.fixture(autouse=True)
def own_cache(tables, monkeypatch):
    monkeypatch.setenv("JAXREC_CACHE", str(tables / "cache"))


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_pairs_of_the_tables_move_the_embeddings(tables, made, name):
    before = embed_texts(TEXTS, EncoderConfig(model=str(tables / "bert")))
    vectors = load_file(made[name] / "embeddings.safetensors")["embeddings"]
    assert vectors.shape == (60, 16 if name == "encoder" else 8)
    assert right_neighbours(vectors) > right_neighbours(before) + 0.2
    figures = read_json(made[name] / "quality.json")["alignment"]
    recall = "pair_recall@50" if name == "align" else "i2i_recall@50"
    assert figures[f"{recall}_after"] >= figures[f"{recall}_before"]


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_new_items_are_embedded_as_the_first_were(made, tmp_path, name):
    folder = made[name]
    np.testing.assert_allclose(
        embed_new(folder, TEXTS), load_file(folder / "embeddings.safetensors")["embeddings"], atol=1e-6
    )
    path = tmp_path / "new.parquet"
    pq.write_table(pa.table({"item_id": [f"new-{item}" for item in IDS], "text": TEXTS}), path)
    commands.append(folder, path, text=True)
    table = read_version(folder)
    np.testing.assert_array_equal(table.codes[60:], table.codes[:60])


def test_items_that_did_not_change_keep_what_was_learned_beside_their_text(tables, tmp_path):
    text_config = EncoderConfig(model=str(tables / "bert"), cache_dir=str(tables / "cache"))
    ids = SemanticIdConfig(ResidualConfig((5, 4)), None)
    config = replace(ALIGNMENTS["align"], item_residual=True)
    folder = tmp_path / "ids"
    folder.mkdir()
    tokenize(tables, folder, text_config, config, ids, CollisionConfig(), seed=0)
    first = load_file(folder / "embeddings.safetensors")["embeddings"]
    some, vectors = [41, 7, 59], embed_texts(TEXTS, text_config)
    columns = {"text": [TEXTS[n] for n in some] * 2, "embedding": [vectors[n] for n in some] * 2}
    for name, values in columns.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"item_id": [IDS[n] for n in some] + ["x", "y", "z"], name: values}), path)
        x = commands.read_text_items(folder, path)[1]
        np.testing.assert_allclose(x[:3], first[some], atol=1e-6)
        np.testing.assert_allclose(x[3:], embed_new(folder, [TEXTS[n] for n in some]), atol=1e-6)
        assert np.abs(x[3:] - x[:3]).max() > 0.1
    commands.append(folder, path, text=True)  # Now the first items are those of version 1, and no longer all.
    pq.write_table(pa.table({"item_id": IDS, "text": TEXTS}), tmp_path / "all.parquet")
    commands.reencode(folder, tmp_path / "all.parquet", text=True)
    assert read_version(folder).version == 2
    save_file({"mean": np.zeros(16, np.float32), "residual": np.zeros((3, 8), np.float32)}, folder / ALIGNMENT)
    with pytest.raises(UserError, match=r"knows 3 items, but the first version of the IDs has 60"):
        aligned(folder, vectors, IDS)


def test_embeddings_of_the_encoder_go_through_a_projection_but_not_past_a_tuned_encoder(tables, made, tmp_path):
    vectors = embed_texts(TEXTS, EncoderConfig(model=str(tables / "bert")))
    for name in ("align", "projection"):
        np.testing.assert_allclose(aligned(made[name], vectors), embed_new(made[name], TEXTS), atol=1e-6)
    path = tmp_path / "new.parquet"
    pq.write_table(pa.table({"item_id": IDS, "embedding": list(vectors)}), path)
    assert commands.read_text_items(made["projection"], path)[1].shape == (60, 8)
    with pytest.raises(UserError, match="an encoder that was fine-tuned: give the items' texts"):
        commands.read_text_items(made["encoder"], path)


@pytest.mark.parametrize(
    ("text", "message"),
    [([1, 2], "column 'text' is int64, but must be text"), (["a", None], r"item_id 'y' \(row 1\) has no text")],
)
def test_texts_that_cannot_be_read_are_named(made, tmp_path, text, message):
    pq.write_table(pa.table({"item_id": ["x", "y"], "text": text}), tmp_path / "new.parquet")
    with pytest.raises(UserError, match=message):
        commands.read_text_items(made["align"], tmp_path / "new.parquet")


def test_columns_that_nobody_asks_for_may_differ_from_part_to_part(made, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, rows, price, count in (("a", [0, 1], [1, 2], [3, 4]), ("b", [2], ["x"], [0.5])):
        part = {"item_id": [IDS[n] for n in rows], "text": [TEXTS[n] for n in rows], "price": price, "count": count}
        pq.write_table(pa.table(part), folder / f"{name}.parquet")
    ids, x, counts, own = commands.read_text_items(made["align"], folder)
    assert ids == IDS[:3] and counts.tolist() == [3, 4, 0.5] and own is None
    np.testing.assert_allclose(x, embed_new(made["align"], TEXTS[:3]), atol=1e-6)
    assert commands.read_ids(folder) == IDS[:3]
    pq.write_table(pa.table({"item_id": [IDS[2]], "text": [5]}), folder / "b.parquet")
    with pytest.raises(UserError, match=r"the parts of .*parts do not fit each other \(.*text"):
        commands.read_text_items(made["align"], folder)


def test_kinds_of_pairs_are_chosen(tables):
    swing, itemcf = (read_pairs(tables / "pairs.parquet", [kind]) for kind in ("swing", "itemcf"))
    assert (COLOR[swing[:, 0]] == COLOR[swing[:, 1]]).all() and (itemcf[:, 0] % 6 == itemcf[:, 1] % 6).all()
    assert len(read_pairs(tables / "pairs.parquet", ["itemcf", "swing"])) == len(swing) + len(itemcf)
    with pytest.raises(UserError, match=r"no pairs of kind 'swang' \(it has 'swing', 'itemcf'\): set align.kind"):
        read_pairs(tables / "pairs.parquet", ["swing", "swang"])


def test_items_with_embeddings_of_their_own_are_no_texts_to_tune_on(tables, tmp_path):
    pq.write_table(pa.table({"item_id": ["x"], "embedding": [[1.0]]}), tmp_path / "items.parquet")
    with pytest.raises(UserError, match=r"embeddings of its own, which no text encoder made.*--align AlignConfig"):
        finetune_items(tmp_path, tmp_path / "work", EncoderConfig(), FINETUNE, seed=0)


def test_a_configuration_says_which_alignment():
    from mall import config

    tuned = replace(config, align=ALIGNMENTS["projection"])
    for each in (config, tuned):
        assert from_json(OneMallConfig, to_json(each)) == each
    old = to_json(config)
    del old["align"]["type"]  # As a run has it that was made before there was a choice.
    assert from_json(OneMallConfig, old) == config


def test_a_run_tunes_in_a_stage_of_its_own_and_goes_on(tmp_path):
    chosen = "--align FinetuneConfig --align.trains projection --align.optim.warmup 5 --align.projection-width 16"
    chosen += " --align.training.steps 20 --align.training.log-every 5 --align.training.checkpoint-every 10"
    chosen += " --align.terms.i2i.min-cosine -1"
    line = [sys.executable, "train.py", "tests/mall.py", "--run", str(tmp_path / "run"), *chosen.split()]
    environment = {**os.environ, "JAXREC_CACHE": str(tmp_path / "cache")}
    for point in ("step:10", "done:semantic_ids"):
        done = subprocess.run(
            line, cwd=Path(__file__).parent.parent, env={**environment, "JAXREC_KILL_AT": point}, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert "going on from step 10" in done.stdout
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("alignment", step) for step in (5, 10, 15, 20)]
    stage, ids = tmp_path / "run" / "stages" / "alignment", tmp_path / "run" / "semantic_ids"
    assert (stage / "tuned" / "projection.safetensors").read_bytes() == (ids / "alignment.safetensors").read_bytes()
    assert load_file(ids / "embeddings.safetensors")["embeddings"].shape == (120, 16)
    assert read_json(ids / "quality.json")["alignment"]["i2i_pairs"] > 50
