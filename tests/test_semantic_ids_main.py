"""The command line of semantic IDs."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.files import read_json
from jaxrec.semantic_ids import CollisionConfig, SemanticIdConfig, read_codes
from jaxrec.semantic_ids import __main__ as command
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.opq import OpqConfig
from jaxrec.semantic_ids.tokenize import write_ids

SMALL = ["--semantic-ids.hierarchy.sizes", "4", "4", "--semantic-ids.remainder", "OpqConfig",
         "--semantic-ids.remainder.sizes", "4", "4"]  # fmt: skip


@pytest.fixture
def items(tmp_path):
    x = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    ids = [f"i{n:03}" for n in range(120)]
    table = {"item_id": ids, "embedding": list(x), "title": [f"Thing {n}" for n in range(120)]}
    pq.write_table(pa.table(table).slice(0, 100), tmp_path / "items.parquet")
    pq.write_table(pa.table(table).slice(100), tmp_path / "more.parquet")
    return tmp_path


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["jaxrec.semantic_ids", *map(str, args)])
    command.main()


def test_from_embeddings_to_ids_and_new_items(items, monkeypatch, capsys):
    run(monkeypatch, "fit", "--items", items / "items.parquet", "--out", items / "ids", *SMALL)
    first = read_codes(items / "ids" / "codes.parquet", [f"i{n:03}" for n in range(100)])
    assert first.codebook_sizes == codebooks.load(items / "ids" / "codebooks.safetensors").sizes == (4, 4, 4, 4)
    assert read_json(items / "ids" / "quality.json")["items"] == 100
    assert "Thing 7" in (items / "ids" / "semantic_ids.html").read_text()
    run(monkeypatch, "append", items / "ids", items / "more.parquet")
    run(monkeypatch, "drift", items / "ids", "--as-json")
    assert "20 new" in capsys.readouterr().out


def test_quantizers_are_chosen_by_name(items):
    config = command.parse_fit(["--items", "a", "--out", "b", *SMALL])
    assert config.semantic_ids.remainder == OpqConfig((4, 4)) and config.semantic_ids.hierarchy.sizes == (4, 4)


def test_titles_and_categories_may_be_numbers(items, monkeypatch):
    table = pq.read_table(items / "items.parquet").drop_columns("title")
    table = table.append_column("title", pa.array(range(1000, 1100))).append_column("category", pa.array([5, 6] * 50))
    pq.write_table(table, items / "items.parquet")
    run(monkeypatch, "fit", "--items", items / "items.parquet", "--out", items / "ids", *SMALL)
    assert "1007" in (items / "ids" / "semantic_ids.html").read_text()


def test_a_configuration_that_cannot_be_is_named_before_the_long_work(items, monkeypatch):
    def refuse(*_):
        raise AssertionError("the items were read")

    monkeypatch.setattr("jaxrec.semantic_ids.files.items.Items.scan", refuse)
    fit = ("fit", "--items", items / "items.parquet", "--out", items / "ids")
    for args, message in (
        ((*SMALL, "--collisions.capacity", "0"), "collisions.capacity=0"),
        (("--semantic-ids.hierarchy.sizes", "256"), "100 rows cannot fill a codebook of 256"),
        ((*SMALL, "--semantic-ids.remainder.sizes", "4", "4", "4", "4"), "6 does not divide by 4"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *fit, *args)
    monkeypatch.setattr(codebooks, "fit", refuse)
    with pytest.raises(UserError, match=r"collisions.capacity=0"):
        write_ids(items, None, [], np.zeros((0, 1)), SemanticIdConfig(), CollisionConfig(capacity=0))


def test_mistakes_are_named(items, monkeypatch):
    with pytest.raises(UserError, match="no command 'fti'; it is one of fit, append"):
        run(monkeypatch, "fti")
    (items / "there").mkdir()
    with pytest.raises(UserError, match="there is there already"):
        run(monkeypatch, "fit", "--items", items / "items.parquet", "--out", items / "there")
    table = pq.read_table(items / "items.parquet")
    pq.write_table(pa.concat_tables([table, table]), items / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet: item_id 'i000' is listed more than once"):
        run(monkeypatch, "fit", "--items", items / "twice.parquet", "--out", items / "new", *SMALL)
    with pytest.raises(UserError, match="100 rows cannot fill a codebook of 256"):
        run(monkeypatch, "fit", "--items", items / "items.parquet", "--out", items / "new",
            "--semantic-ids.hierarchy.sizes", "256")  # fmt: skip
    assert not (items / "new").exists() and not (items / "new.partial").exists()
    with pytest.raises(UserError, match=r"items.parquet/ids cannot be written \(.*\): give another --out"):
        run(monkeypatch, "fit", "--items", items / "items.parquet", "--out", items / "items.parquet" / "ids", *SMALL)


def test_the_folder_is_on_the_disk_before_it_has_its_name(items, monkeypatch):
    synced = []
    monkeypatch.setattr(command, "sync", lambda path: synced.append((path, (items / "ids").exists())))
    run(monkeypatch, "fit", "--items", items / "items.parquet", "--out", items / "ids", *SMALL)
    before = {path.name for path, named in synced if not named}
    assert before == {path.name for path in (items / "ids").iterdir()} | {"ids.partial"}
    assert synced[-1] == (items, True)
