"""Short videos and live streams in a run: their semantic IDs, and those of new ones, by what they sell."""

import shutil

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
from jaxrec.semantic_ids import CollisionConfig, ResidualConfig, SemanticIdConfig, catalogue, codebooks, commands
from jaxrec.semantic_ids.tokenize import tokenize
from jaxrec.semantic_ids.versions import publish, read_version
from jaxrec.systems.onemall import OneMallConfig
from jaxrec.systems.onemall_model import assemble
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
    publish(made_run.semantic_ids)
    columns = items.set_column(items.column_names.index("item_id"), "item_id", pa.array([*others, "new"]))
    pq.write_table(columns, made_run.tables / "items.parquet")
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
