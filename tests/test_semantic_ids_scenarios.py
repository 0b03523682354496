"""Short videos and live streams in a run: their semantic IDs, and those of new ones, by what they sell."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from tiny_encoder import make_encoder

from jaxrec.config import UserError, from_json, load_config, parse_cli, to_json
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import SyntheticMall
from jaxrec.run import Run
from jaxrec.semantic_ids import CollisionConfig, ResidualConfig, SemanticIdConfig, commands
from jaxrec.semantic_ids.embeddings import with_products
from jaxrec.semantic_ids.files.vectors import read_own
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.table import changes as catalogue
from jaxrec.semantic_ids.table.version_files import read_version
from jaxrec.semantic_ids.table.versions import publish
from jaxrec.semantic_ids.tokenize import tokenize
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onemall.model import assemble
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.scenarios import TowersConfig

CARD, VIDEO, LIVE = "product_card", "short_video", "live_stream"
TOWERS = TowersConfig(hidden=16, batch_size=32, steps=40, learning_rate=1e-2, item_learning_rate=3e-3)
ALIGN = AlignConfig(width=6, hidden=16, batch_size=32, item_residual=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small mall's tables, and its semantic_ids folder with scenarios."""
    root = tmp_path_factory.mktemp("mall")
    (root / "tables").mkdir()
    (root / "ids").mkdir()
    prepare(SyntheticMall(users=60, items=60, tastes=6, sessions_per_user=5), PrepareConfig(), root / "tables")
    texts = pq.read_table(root / "tables" / "items.parquet")["text"].to_pylist()
    make_encoder(root / "bert", [word for text in texts for word in text.replace(".", "").split()])
    run(root / "tables", root / "ids", TOWERS)
    return root


def run(tables, folder, scenarios):
    text = EncoderConfig(model=str(tables.parent / "bert"), cache_dir=str(tables.parent / "cache"))
    ids = SemanticIdConfig(ResidualConfig((6, 4)), None)
    tokenize(tables, folder, text, ALIGN, ids, CollisionConfig(), seed=0, scenarios=scenarios)


def of_catalogue(made):
    """scenario [I], own embeddings as unit vectors [I, 6], those that were quantized [I, 12]."""
    items = pq.read_table(made / "tables" / "items.parquet")
    own = np.stack(pq.read_table(made / "ids" / "own.parquet")["embedding"].to_numpy())
    embeddings = load_file(made / "ids" / "embeddings.safetensors")["embeddings"]
    return np.array(items["scenario"].to_pylist()), own / np.linalg.norm(own, axis=1, keepdims=True), embeddings


def test_each_scenario_has_its_embedding(made):
    scenario, own, embeddings = of_catalogue(made)
    assert embeddings.shape == (60, 12)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    items = pq.read_table(made / "tables" / "items.parquet")
    row = {item: n for n, item in enumerate(items["item_id"].to_pylist())}
    card, video, live = (np.flatnonzero(scenario == name) for name in (CARD, VIDEO, LIVE))
    assert min(len(card), len(video), len(live)) > 3
    half = np.sqrt(0.5)
    np.testing.assert_allclose(embeddings[card], np.tile(own[card], 2) * half, atol=1e-5)
    sold = [row[items["product_ids"][int(n)].as_py()[0]] for n in video]
    np.testing.assert_allclose(embeddings[video], np.concatenate([own[sold], own[video]], axis=1) * half, atol=1e-5)
    # What a stream sells now is in live_streams.parquet; the tower has moved it, but not far.
    newest = {each["item_id"]: each for each in pq.read_table(made / "tables" / "live_streams.parquet").to_pylist()}
    for n in live:
        products = newest[items["item_id"][int(n)].as_py()]["product_ids"]
        mean = own[[row[each] for each in products]].mean(0)
        plain = np.concatenate([mean / np.linalg.norm(mean), own[n]]) * half
        assert 1e-4 < np.linalg.norm(embeddings[n] - plain) < 1


def test_new_items_go_the_same_way(made, tmp_path):
    _, _, embeddings = of_catalogue(made)
    items = pq.read_table(made / "tables" / "items.parquet")
    newest = {each["item_id"]: each for each in pq.read_table(made / "tables" / "live_streams.parquet").to_pylist()}
    sold = [newest.get(each["item_id"], each)["product_ids"] for each in items.to_pylist()]
    columns = {"item_id": [f"new-{item}" for item in items["item_id"].to_pylist()], "text": items["text"]}
    columns |= {"scenario": items["scenario"], "product_ids": pa.array(sold, pa.list_(pa.string()))}
    path = tmp_path / "new.parquet"
    pq.write_table(pa.table(columns), path)
    np.testing.assert_allclose(commands.read_text_items(made / "ids", path)[1], embeddings, atol=1e-5)
    commands.append(made / "ids", path, text=True)
    table = read_version(made / "ids")
    books = codebooks.load(made / "ids" / "codebooks.safetensors")
    np.testing.assert_array_equal(table.codes[60:], codebooks.encode(books, embeddings))


def test_a_stream_that_sells_something_else_is_encoded_anew(made, tmp_path):
    scenario, _, embeddings = of_catalogue(made)
    items = pq.read_table(made / "tables" / "items.parquet").to_pylist()
    stream = items[int(np.flatnonzero(scenario == LIVE)[0])]
    other = next(each for each in items if each["scenario"] == CARD and each["category"] != stream["category"])
    path = tmp_path / "live.parquet"
    columns = {"item_id": [stream["item_id"]], "text": [stream["text"]], "scenario": [LIVE]}
    pq.write_table(pa.table(columns | {"product_ids": [[other["item_id"]]]}), path)
    vector = commands.read_text_items(made / "ids", path)[1][0]
    at = [each["item_id"] for each in items]
    assert (
        vector @ embeddings[at.index(other["item_id"])]
        > embeddings[at.index(stream["item_id"])] @ embeddings[at.index(other["item_id"])]
    )
    commands.reencode(made / "ids", path, text=True)
    for products, message in (
        ([["gone"]], "product_ids names 'gone', whose own embedding is not at hand"),
        (["gone"], "column 'product_ids' is string, but must be a list of item ids"),
    ):
        pq.write_table(pa.table(columns | {"product_ids": products}), path)
        with pytest.raises(UserError, match=message):
            commands.reencode(made / "ids", path, text=True)


def test_products_may_come_in_the_same_file(made, tmp_path):
    path = tmp_path / "new.parquet"
    columns = {"item_id": ["card", "video"], "text": ["Red tea pots no. 1", "Video: Red tea pots no. 2"]}
    columns |= {"scenario": [CARD, VIDEO], "product_ids": pa.array([[], ["card"]], pa.list_(pa.string()))}
    pq.write_table(pa.table(columns), path)
    card, video = commands.read_text_items(made / "ids", path)[1]
    np.testing.assert_allclose(video[:6], card[:6], atol=1e-6)
    assert np.abs(video[6:] - card[6:]).max() > 1e-3


def as_ids(made, tmp_path):
    """A copy of the folder that a test may change."""
    folder = tmp_path / "ids"
    shutil.copytree(made / "ids", folder)
    shutil.rmtree(folder / "versions", ignore_errors=True)
    (folder / "own_later.parquet").unlink(missing_ok=True)
    return folder


def write_new(path, item_ids, texts, scenarios, product_ids):
    columns = {"item_id": item_ids, "text": texts, "scenario": scenarios, "product_ids": product_ids}
    pq.write_table(pa.table(columns), path)
    return path


def test_products_may_have_come_in_an_earlier_version(made, tmp_path):
    folder, none = as_ids(made, tmp_path), pa.array([[]], pa.list_(pa.string()))
    card = write_new(tmp_path / "card.parquet", ["card"], ["Red tea pots no. 1"], [CARD], none)
    video = write_new(tmp_path / "video.parquet", ["video"], ["Video: Red tea pots no. 2"], [VIDEO], [["card"]])
    with pytest.raises(UserError, match=r"names 'card', whose own .* append that item with --text first"):
        commands.append(folder, video, text=True)
    half = commands.read_text_items(folder, card)[1][0, :6]
    commands.append(folder, card, text=True)
    np.testing.assert_allclose(commands.read_text_items(folder, video)[1][0, :6], half, atol=1e-6)
    commands.append(folder, video, text=True)
    # The newest counts, of items that came later and of those that the run was made with.
    first = pq.read_table(made / "tables" / "items.parquet")["item_id"][0].as_py()
    for item in ("card", first):
        write_new(card, [item], ["Blue garden chairs no. 7"], [CARD], none)
        write_new(video, ["video"], ["Video: Red tea pots no. 2"], [VIDEO], [[item]])
        before = commands.read_text_items(folder, video)[1][0, :6]
        commands.reencode(folder, card, text=True)
        half = commands.read_text_items(folder, card)[1][0, :6]
        assert np.abs(before - half).max() > 1e-3
        np.testing.assert_allclose(commands.read_text_items(folder, video)[1][0, :6], half, atol=1e-6)
    later = pq.read_table(folder / "own_later.parquet")["item_id"].to_pylist()
    assert sorted(later) == sorted(["card", "video", first])


def test_killed_while_own_embeddings_are_written_the_old_ones_stay(made, tmp_path):
    folder = as_ids(made, tmp_path)
    program = "import sys, numpy as np; from jaxrec.semantic_ids.files.vectors import keep_own\n"
    program += "for name, value in (('a', 1), ('b', 2)): keep_own(sys.argv[1], [name], np.full((1, 6), value, 'f4'))"
    line = [sys.executable, "-c", program, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run(line, env=environment, check=False).returncode == 0
    before = (folder / "own_later.parquet").read_bytes()
    killed = subprocess.run(line, env=environment | {"JAXREC_KILL_AT": "partial:own"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "own_later.parquet").read_bytes() == before
    ids, own = read_own(folder, pa.array(["b", "x", "a"]), 6)
    assert dict(zip(ids.to_pylist(), own[:, 0].tolist())) == {"a": 1, "b": 2}


def test_only_the_products_that_are_named_are_read(made, tmp_path, monkeypatch):
    def read(path, filters):
        found = read_table(path, filters=filters)
        rows.append(len(found))
        return found

    rows, read_table = [], pq.read_table
    item = read_table(made / "tables" / "items.parquet")["item_id"][3].as_py()
    path = write_new(tmp_path / "new.parquet", ["v"], ["Video: Red tea pots"], [VIDEO], [[item]])
    folder = as_ids(made, tmp_path)
    monkeypatch.setattr("jaxrec.semantic_ids.files.vectors.pq.read_table", read)
    with_products(folder, np.ones((1, 6), np.float32), pq.ParquetFile(path).read())
    assert rows == [1]


@pytest.mark.parametrize(
    "column",
    [
        pa.nulls(2),
        pa.array([[], []]),
        pa.array([[], []], pa.list_(pa.string())),
        pa.array([None, []], pa.large_list(pa.large_string())),
        pa.array([["card"], ["card"]], pa.list_(pa.string(), 1)),
        pa.array([["card"], []], pa.large_list(pa.large_string())),
        pa.array([["card"], []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    ],
    ids=lambda column: str(column.type),
)
def test_lists_of_products_may_be_of_any_kind(made, tmp_path, column):
    texts = ["Red tea pots no. 1", "Video: Red tea pots no. 2"]
    path = write_new(tmp_path / "new.parquet", ["card", "video"], texts, [CARD, VIDEO], column)
    card, video = commands.read_text_items(made / "ids", path)[1]
    sold = column[1].as_py()
    np.testing.assert_allclose(video[:6], card[:6] if sold else video[6:], atol=1e-6)


def test_tables_without_scenarios_are_named(made, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "ids").mkdir()
    for name in ("items", "pairs"):
        table = pq.read_table(made / "tables" / f"{name}.parquet")
        left = [column for column in table.column_names if column != "scenario"]
        pq.write_table(table.select(left), tmp_path / "tables" / f"{name}.parquet")
    (tmp_path / "bert").symlink_to(made / "bert")
    with pytest.raises(UserError, match="no column `scenario`: add it to the items, or set --scenarios None"):
        run(tmp_path / "tables", tmp_path / "ids", TOWERS)


def test_a_model_is_refused_the_embeddings_of_another_list_of_items(made, tmp_path):
    made_run = Run(tmp_path)
    shutil.copytree(made / "tables", made_run.tables)
    shutil.copytree(made / "ids", made_run.semantic_ids)
    shutil.rmtree(made_run.semantic_ids / "versions", ignore_errors=True)
    mall = load_config("tests/mall.py")
    embeddings = load_file(made / "ids" / "embeddings.safetensors")["embeddings"]
    np.testing.assert_array_equal(assemble(made_run, mall).catalogue.embeddings, embeddings)
    # As many items as before, all but the last of them in another row.
    items = pq.read_table(made_run.tables / "items.parquet")
    first, *others = items["item_id"].to_pylist()
    catalogue.remove(made_run.semantic_ids, [first])
    catalogue.append(made_run.semantic_ids, ["new"], embeddings[:1])
    columns = items.set_column(items.column_names.index("item_id"), "item_id", pa.array([*others, "new"]))
    pq.write_table(columns, made_run.tables / "items.parquet")
    publish(made_run.semantic_ids)
    with pytest.raises(UserError, match=r"embeddings.safetensors has the embeddings of another list of items"):
        assemble(made_run, mall)


def test_scenarios_are_chosen_on_the_command_line():
    config, _ = parse_cli(["tests/mall.py", "--run", "a", "--scenarios", "TowersConfig", "--scenarios.steps", "7"])
    assert config.scenarios == TowersConfig(steps=7)
    assert from_json(OneMallConfig, to_json(config)) == config
    plain = parse_cli(["tests/mall.py", "--run", "a"])[0]
    assert plain.scenarios is None
    old = to_json(plain)
    del old["scenarios"]  # As a run has it that was made before there was a choice.
    assert from_json(OneMallConfig, old) == plain
