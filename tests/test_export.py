"""The artefact: the same bits without the library, and a sentence for everything that doesn't fit together."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exported import snippet, without_the_library
from jax import export as jax_export
from onemall_parts import (
    BEHAVIORS,
    FEATURES,
    ITEMS,
    MODEL,
    SIZES,
    make_arrays,
    make_assembly,
    make_history,
    make_variables,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrec import export
from jaxrec.config import UserError, fingerprint
from jaxrec.export import ExportConfig, write_artefact
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.systems.sequential.model import SequentialRecommender
from jaxrec.targets import SemanticIdSpace
from jaxrec.text.tokenizer import TokenizerConfig, train_tokenizer

ROOT = Path(__file__).parent.parent
BATCHES = (1, 3, 8)
K, WIDTH = 5, 7
TWO_LENGTHS = dataclasses.replace(FEATURES, buckets=(3, 6))
IDS = [f"item {index} é" for index in range(ITEMS)]
LONG = [make_history(seed, 10 + seed) for seed in range(8)]
CONFIG = ExportConfig(k=K, beam_width=WIDTH)


@pytest.fixture(scope="module")
def recommender() -> GenerativeRecommender:
    assembly = make_assembly(dataclasses.replace(MODEL, layers=1, qformer_layers=2))
    return GenerativeRecommender(assembly, make_variables(assembly), TWO_LENGTHS, DecodingConfig(WIDTH, 4))


@pytest.fixture(scope="module", autouse=True)
def traced_once(recommender):
    """Tests that write the same artefact again need not trace it again."""
    made, export_modules = export.export_modules(recommender, CONFIG), export.export_modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export, "export_modules", lambda *of: made if of == (recommender, CONFIG) else export_modules(*of)
        )
        yield


@pytest.fixture(scope="module")
def folder(recommender, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "artefact"
    write_artefact(recommender, IDS, folder, CONFIG, {"system": "onemall"})
    return folder


@pytest.fixture(scope="module")
def requests(recommender):
    """Of each length: the inputs of as many histories as the largest batch has."""
    short = [make_history(seed, seed % 3) for seed in range(8)]
    return {
        length: make_arrays(histories, recommender.assembly, dataclasses.replace(FEATURES, buckets=(length,)))
        for length, histories in ((3, short), (6, LONG))
    }


@pytest.fixture(scope="module")
def expected(recommender, requests):
    """(length, batch) -> (items, scores, nan) of the jitted function in this process."""
    answers = {}
    for length, arrays in requests.items():
        for batch in BATCHES:
            found = recommender._search(recommender.served, first(arrays, batch), None, WIDTH, K)
            answers[length, batch] = jax.device_get((found.answers, found.scores, found.nan))
    return answers


def first(arrays: dict, count: int) -> dict:
    return {name: array[:count] for name, array in arrays.items()}


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite_manifest(folder: Path, **changes) -> None:
    """Changes the manifest as another export would have written it."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    del manifest["fingerprint"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))


class ReadingTexts:
    """A recommender, or its assembly, whose contexts are made of a tokenizer's tokens."""

    def __init__(self, original, **more):
        self.__dict__ |= {"original": original} | more

    def __getattr__(self, name):
        return getattr(self.original, name)


def test_the_tokenizer_of_a_system_that_reads_queries(recommender, folder, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["red boots", "tea"], TokenizerConfig(vocabulary=275))
    made = export.export_modules(recommender, CONFIG)
    monkeypatch.setattr(export, "export_modules", lambda *_: made)
    reading = ReadingTexts(recommender, assembly=ReadingTexts(recommender.assembly, tokenizer=tokenizer))
    manifest = write_artefact(reading, IDS, tmp_path / "artefact", CONFIG)
    assert {"tokenizer.model", "text_tokenizer.json"} <= set(manifest["files"])
    artefact = export.load(tmp_path / "artefact")
    assert artefact.tokens(" Red BOOTS").tolist() == tokenizer.encode(["red boots"])[0]
    assert artefact.tokens("").shape == (0,) and artefact.tokens("靴 👢").dtype == np.int32
    with pytest.raises(UserError, match="has no tokenizer"):
        export.load(folder).tokens("boots")


class Typing(ReadingTexts):
    """An assembly that makes two fields of what was typed."""

    def read_texts(self, history):
        return {**history, "tokens": np.zeros(0, np.int32), "led_to": None}


def test_a_history_whose_texts_were_not_read_is_refused(recommender, folder, tmp_path, monkeypatch):
    """Else it would be answered as if nothing was typed."""
    made = export.export_modules(recommender, CONFIG)
    monkeypatch.setattr(export, "export_modules", lambda *_: made)
    reading = ReadingTexts(recommender, assembly=Typing(recommender.assembly))
    manifest = write_artefact(reading, IDS, tmp_path / "artefact", CONFIG)
    assert manifest["text_fields"] == ["led_to", "tokens"]
    assert json.loads((folder / "manifest.json").read_text())["text_fields"] == []
    artefact, typed = export.load(tmp_path / "artefact"), [LONG[0] | {"query": "boots"}, LONG[1]]
    read = [reading.assembly.read_texts(history) for history in typed]
    np.testing.assert_array_equal(artefact.prepare(read)["day"], export.load(folder).prepare(typed)["day"])
    with pytest.raises(UserError, match=r"history 1 lacks led_to, tokens, .* give what .*\.read_texts\(history\)"):
        artefact.prepare([read[0], typed[1]])


def test_the_manifest_tells_what_a_caller_needs(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    assert [module["file"] for module in manifest["modules"]] == ["retrieve_3.stablehlo", "retrieve_6.stablehlo"]
    inputs = manifest["modules"][1]["inputs"]
    assert inputs["history_0_item"] == {"shape": ["batch", 6], "dtype": "int32"}
    assert inputs["habit"] == {"shape": ["batch", 6, 4], "dtype": "float32"}
    assert inputs["day"] == {"shape": ["batch"], "dtype": "int32"}
    outputs = {name: (output["shape"], output["dtype"]) for name, output in manifest["outputs"].items()}
    assert outputs == {
        "items": (["batch", K], "int32"), "scores": (["batch", K], "float32"),
        "valid": (["batch", K], "bool"), "nan": (["batch"], "bool"),
    }  # fmt: skip
    assert manifest["catalogue"]["codebook_sizes"] == list(SIZES) and manifest["catalogue"]["items"] == ITEMS
    assert manifest["k"] == K and manifest["beam_widths"] == [WIDTH] * 3
    assert manifest["behaviors"] == list(BEHAVIORS) and manifest["target_behaviors"] == ["purchase"]
    assert manifest["jax"] == jax.__version__ and manifest["platforms"] == ["cpu", "cuda", "tpu"]
    for file in ("model", "catalogue", "trie"):
        for name, array in load_file(folder / f"{file}.safetensors").items():
            record = {"shape": list(array.shape), "dtype": str(array.dtype), "file": f"{file}.safetensors"}
            assert manifest["weights"][name] == record
    # What only training reads is not there: the item tower, the embeddings, the drawing probabilities.
    assert "trie/tokens/0" in manifest["weights"] and "catalogue/codes" in manifest["weights"]
    assert not [name for name in manifest["weights"] if re.search("item_tower|embedding|log_q|attributes", name)]


def test_modules_are_of_any_batch_and_of_all_three_platforms(folder):
    for length in (3, 6):
        module = jax_export.deserialize(bytearray((folder / f"retrieve_{length}.stablehlo").read_bytes()))
        assert module.platforms == ("cpu", "cuda", "tpu")
        assert {str(aval.shape[0]) for aval in module.out_avals} == {"batch"}
        assert len(module.mlir_module()) < 2_000_000


def test_a_process_without_the_library_gives_the_same_bits(folder, requests, expected, tmp_path):
    item_ids, answers = without_the_library(folder, requests, BATCHES, tmp_path)
    assert item_ids == IDS and set(answers) == set(expected)
    for case, (items, scores, nan) in expected.items():
        np.testing.assert_array_equal(answers[case]["items"], items)
        np.testing.assert_array_equal(answers[case]["scores"].view(np.int32), scores.view(np.int32))
        np.testing.assert_array_equal(answers[case]["valid"], items >= 0)
        np.testing.assert_array_equal(answers[case]["nan"], nan)
    assert len({tuple(row) for row in answers[6, 8]["items"].tolist()}) > 1, "requests differ"


def test_loaded_with_the_library_from_histories(folder, recommender):
    artefact = export.load(folder)
    assert artefact.item_ids == IDS
    inputs = artefact.prepare(LONG)
    items, scores = recommender.recommend(LONG, K)
    answers = artefact.retrieve(inputs)
    np.testing.assert_array_equal(answers["items"], items)
    np.testing.assert_allclose(answers["scores"], scores, atol=2e-5)
    for shown, row, score in zip(artefact.show(answers), items, answers["scores"], strict=True):
        assert shown == [(IDS[item], value) for item, value in zip(row, score.tolist(), strict=True)]
    with pytest.raises(UserError, match="input 'user' is missing; the inputs are"):
        artefact.retrieve({name: array for name, array in inputs.items() if name != "user"})
    with pytest.raises(UserError, match="input 'allowed' is no input of this artefact"):
        artefact.retrieve(inputs | {"allowed": np.ones((8, ITEMS), bool)})
    with pytest.raises(UserError, match=r"no module takes inputs of the shapes .*day \[8\].*; pad them to one of 3, 6"):
        artefact.retrieve(inputs | {"past_item": inputs["past_item"][:7]})
    with pytest.raises(UserError, match="input 'day' is int64; give int32"):
        artefact.retrieve(inputs | {"day": inputs["day"].astype(np.int64)})


def test_with_filters_only_allowed_items_are_answered(recommender, requests, tmp_path):
    one_length = GenerativeRecommender(recommender.assembly, recommender.variables, FEATURES, DecodingConfig(WIDTH, 4))
    config = ExportConfig(k=ITEMS, beam_width=24, filters=True, platforms=("cpu",))
    write_artefact(one_length, IDS, tmp_path / "artefact", config)
    artefact = export.load(tmp_path / "artefact")
    allowed = np.random.default_rng(0).random((8, ITEMS)) < 0.4
    answers = artefact.retrieve(requests[6] | {"allowed": allowed})
    for row in range(8):
        assert set(answers["items"][row][answers["valid"][row]]) == set(np.flatnonzero(allowed[row]))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "retrieve_6.stablehlo", "items.jsonl"])
def test_a_damaged_file_is_refused(folder, tmp_path, file):
    copy = copy_of(folder, tmp_path)
    damage(copy / file)
    with pytest.raises(UserError, match=rf"{re.escape(file)} is damaged or of another export"):
        export.load(copy)
    namespace: dict = {}
    exec(snippet(), namespace)
    with pytest.raises(ValueError, match=rf"{re.escape(file)} is damaged"):
        namespace["load"](copy)
    (copy / file).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(file)} is missing; copy the folder"):
        export.load(copy)


@pytest.mark.parametrize("file", ["trie.safetensors", "catalogue.safetensors"])
def test_a_file_of_another_version_of_the_catalogue_is_refused(folder, tmp_path, file):
    copy = copy_of(folder, tmp_path)
    with safe_open(copy / file, "numpy") as old:
        assert old.metadata() == {
            "catalogue": json.loads((copy / "manifest.json").read_text())["catalogue"]["fingerprint"]
        }
    save_file(load_file(copy / file), copy / file, metadata={"catalogue": "0123456789abcdef"})
    with pytest.raises(UserError, match=rf"{re.escape(file)} belongs to another version of the catalogue \(0123"):
        export.load(copy)


def fingerprint_of(item_ids: list[str], codes: np.ndarray) -> str:
    return SemanticIdSpace(codes, (4, 4)).describe(item_ids)["fingerprint"]


def test_the_fingerprint_of_a_catalogue_changes_with_items_order_and_codes():
    codes = np.array([[0, 1], [2, 3]])
    original = fingerprint_of(["a", "b"], codes)
    assert original == fingerprint_of(["a", "b"], codes.astype(np.int64))
    others = [(["b", "a"], codes), (["a", "c"], codes), (["a", "b"], codes[::-1])]
    assert original not in [fingerprint_of(*other) for other in others]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is no manifest of format 1"),
        ({"calling_convention": 10_000, "jax": "9.9"}, "was exported by jax 9.9, whose modules jax .* can't run"),
        ({"platforms": ["tpu"]}, "was exported for tpu, but this process runs on cpu"),
    ],
)
def test_a_manifest_that_does_not_fit_here(folder, tmp_path, changes, message):
    copy = copy_of(folder, tmp_path)
    rewrite_manifest(copy, **changes)
    with pytest.raises(UserError, match=message):
        export.load(copy)


def test_a_manifest_that_was_edited_and_a_folder_without_one(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace(f'"k": {K}', f'"k": {K + 1}'))
    with pytest.raises(UserError, match="was changed after the export"):
        export.load(copy)
    with pytest.raises(UserError, match="holds no artefact"):
        export.load(tmp_path)


def test_whole_or_not_at_all(recommender, folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is there already; give a new folder"):
        write_artefact(recommender, IDS, folder, CONFIG)
    with pytest.raises(UserError, match="2 item ids for 20 items"):
        write_artefact(recommender, IDS[:2], tmp_path / "artefact", CONFIG)
    assert not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_arrays", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_artefact(recommender, IDS, tmp_path / "artefact", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_run_is_exported_with_its_ids_and_the_version_of_its_catalogue(recommender, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "tables").mkdir(parents=True)
    for number in range(1, 8):
        (run / "semantic_ids" / "versions" / f"{number:06d}").mkdir(parents=True)
    pq.write_table(pa.table({"item_id": IDS}), run / "tables" / "items.parquet")
    (run / "config.json").write_text('{"system": "here"}')
    (run / "semantic_ids" / "versions" / "current.json").write_text('{"version": 7}')
    with pytest.raises(UserError, match="unknown system 'here'; known are onemall"):
        export.export_run(run, tmp_path / "artefact")
    monkeypatch.setattr(export, "load_recommender", lambda _: recommender)
    manifest = export.export_run(run, tmp_path / "artefact", CONFIG)
    assert manifest["system"] == "here"
    assert manifest["catalogue_version"] == 1, "the model's own, whatever came since"
    assert export.load(tmp_path / "artefact").item_ids == IDS
    with pytest.raises(UserError, match="is there already"):
        export.export_run(run, tmp_path / "artefact", CONFIG)


def test_a_run_without_semantic_ids_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"system": "sasrec_ce"}')
    model = SequentialRecommender(None, {})
    monkeypatch.setattr(export, "load_recommender", lambda _: model)
    with pytest.raises(
        UserError,
        match=r"sasrec_ce, which scores all items: only .* answers .* \(onemall, .*rankgr, tiger, forge\); answer with",
    ):
        export.export_run(tmp_path, tmp_path / "artefact", CONFIG)
    assert not (tmp_path / "artefact").exists()


@pytest.mark.parametrize(
    ("catalogue", "said"),
    [
        ({"items": 1200}, "1,200 items, histories of 4, 8, cpu: 2.0 MiB written to x"),
        ({"items": 5, "texts": 1000}, "1,000 texts, 5 items in histories, histories of 4, 8, cpu"),
        ({"items": 5, "texts": 0}, "any text, 5 items in histories, histories of 4, 8, cpu"),
    ],
)
def test_the_command_says_what_was_written(monkeypatch, capsys, catalogue, said):
    modules = [{"length": 4}, {"length": 8}]
    manifest = {"catalogue": catalogue, "files": {"a": {"bytes": 2 << 20}}, "modules": modules, "platforms": ["cpu"]}
    monkeypatch.setattr(export, "export_run", lambda *_: manifest)
    monkeypatch.setattr(sys, "argv", ["export", "run", "--to", "x"])
    export.main()
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--to", "x"], "error: nowhere holds no run"),
        (["nowhere", "--to", "x", "--k", "0"], "error: --k is 0"),
        (
            ["nowhere", "--to", "x", "--platforms", "cpu", "abacus"],
            "error: --platforms: abacus; give some of cpu, cuda, tpu",
        ),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, message):
    command = [sys.executable, "-m", "jaxrec.export", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2 and done.stderr.startswith(message), done.stderr
