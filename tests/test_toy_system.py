"""A system that reads a query and writes texts, in two stages, through the same code as all others."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import toy_system
from starlette.testclient import TestClient
from toy_system import ToySuggestConfig, config

from jaxrec import systems
from jaxrec.data.examples import Records
from jaxrec.export import ExportConfig, export_run, load
from jaxrec.losses.likelihood import log_likelihood
from jaxrec.run import Run
from jaxrec.serving.batch import answer_file
from jaxrec.serving.http import create_app
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems import System, load_recommender, train
from jaxrec.systems.recommender import GenerativeRecommender
from jaxrec.targets import load_text_space, normalised, text_space
from jaxrec.training import checkpoint
from jaxrec.training.stages import best_variables, run_stages

ROOT = Path(__file__).parent.parent
K = 10
"""Answers of every search, so that few programs are compiled."""
EMPTY = {name: np.zeros(0, np.int64) for name in ("item", "behavior", "timestamp", "session")}
"""A history without events."""


def make_searches(texts) -> dict:
    """The searches of a history."""
    return {"search_query": np.array([*texts], object), "search_timestamp": np.arange(len(texts))}


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(systems.SYSTEMS, "toy", System(ToySuggestConfig, toy_system.assemble, toy_system.stages))
        yield


@pytest.fixture(scope="module")
def path(registered, tmp_path_factory) -> Path:
    """A trained run, which no test changes."""
    path = tmp_path_factory.mktemp("toy") / "run"
    train(Run.open(path, config), config)
    return path


@pytest.fixture(scope="module")
def model(path) -> GenerativeRecommender:
    return load_recommender(Run.load(path)[0])


@pytest.fixture(scope="module")
def retriever(path, model) -> Retriever:
    return Retriever(path, model)


@pytest.fixture(scope="module")
def cases(model):
    return model.assembly.cases("test")


def exhaustive(model: GenerativeRecommender, history: dict) -> np.ndarray:
    """The log-probability of every listed text after a history, teacher-forced, each scored by itself."""
    arrays = config.features.cut(model.assembly.read_texts(history), 0, behaviors=0, wanted=np.zeros(0, bool))
    target, real = model.space.encode(model.space.texts)
    return np.asarray(score(model.assembly, model.variables, arrays, target, real))


@partial(jax.jit, static_argnums=0)
def score(assembly, variables: dict, arrays: dict, target: jax.Array, real: jax.Array) -> jax.Array:
    """float32 [L] of targets int32 [L, M] of one context."""
    batch = {name: array[None] for name, array in arrays.items()} | {"target": target[None]}
    return log_likelihood(toy_system.scores(assembly, variables, batch)[0], real)


# ---- trained ---------------------------------------------------------------------------------------------------------


def test_two_stages_make_a_run(path):
    run = Run.load(path)[0]
    assert run.stages_there() == ("likelihood", "preference") and run.training == "stages/preference"
    space = load_text_space(run.place("targets"))
    table = pq.read_table(run.tables / "queries.parquet").to_pydict()
    chosen = {text: count for text, count in zip(table["query"], table["chosen"], strict=True) if count}
    assert dict(zip(space.texts, space.popularity, strict=True)) == chosen


def test_targets_of_unequal_length_are_packed(model):
    """A packed target's score is that of the target by itself, whatever stands in the padding."""
    batch = next(toy_system.training_batches(model.assembly, config))
    lengths = batch["real"].sum(-1)
    assert len(np.unique(lengths[lengths > 0])) > 2 and (lengths == 0).any() and batch["target"].shape[1] == 4
    for row in range(6):
        arrays, target, real = (
            {name: batch[name][row] for name in ("tokens", "mask")},
            batch["target"][row],
            batch["real"][row],
        )
        packed = score(model.assembly, model.variables, arrays, target, real)
        for place in np.flatnonzero(lengths[row]):
            junk = np.where(real[place], target[place], 7 + row)[None]
            alone = score(model.assembly, model.variables, arrays, junk, real[[place]])
            np.testing.assert_allclose(packed[place], alone[0], atol=1e-5)


def test_the_second_stage_prefers_what_was_chosen(path, model):
    """Against its reference, the model of the first stage: by the loss and by the margin of the chosen queries."""
    before, after = (best_variables(path / "stages" / name) for name in ("likelihood", "preference"))
    batch = next(toy_system.training_batches(model.assembly, config))
    frozen, key = {"likelihood": before}, jax.random.key(0)
    loss = jax.jit(partial(toy_system.preference, model.assembly, config, None))
    losses = [float(loss(frozen, each["params"], {}, batch, key)[0]) for each in (before, after)]
    compared = np.asarray(batch["real"].any(-1)[:, 1:].sum(1))
    # With no difference from the reference, every comparison is even.
    np.testing.assert_allclose(losses[0], np.log1p(compared)[compared > 0].mean(), rtol=1e-5)
    assert losses[1] < losses[0] - 0.05


def test_killed_in_the_second_stage_it_ends_in_the_same_bits(path, tmp_path):
    again = Path(shutil.copytree(path, tmp_path / "run"))
    shutil.rmtree(again / "stages" / "preference")
    environment = {**os.environ, "JAXREC_KILL_AT": "step:6", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "toy_system", str(again)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (again / "stages" / "preference" / "fingerprint.json").exists()
    assert checkpoint.load_parts(again / "stages" / "preference", "step")["step"] == 4
    run = Run.open(again, config)
    run_stages(run, toy_system.stages(run, config))
    first, second = (
        checkpoint.load_parts(each / "stages" / "preference", "params", "opt_state", "step") for each in (path, again)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert int(second["step"]) == config.preference.training.steps


# ---- searched --------------------------------------------------------------------------------------------------------


def test_a_search_over_the_listed_queries_is_exact(model, cases):
    few = cases.take(range(0, len(cases), 12)).histories
    answers, scores = model.recommend(few, K)
    for row, history in enumerate(few):
        expected = exhaustive(model, history)
        order = np.argsort(-expected)[:K]
        np.testing.assert_array_equal(answers[row], order)
        np.testing.assert_allclose(scores[row], expected[order], atol=1e-4)


def test_a_search_without_the_list_writes_any_text(model, cases):
    """The best text of a free search is at least as likely as the best of the list, and mostly the same."""
    space = text_space(model.space.tokenizer, config=model.space.config)
    assembly = dataclasses.replace(model.assembly, space=space)
    free = GenerativeRecommender(assembly, model.variables, config.features, config.decoding)
    answers, scores = free.recommend(cases.histories[:24], K)
    listed, of_list = model.recommend(cases.histories[:24], K)
    assert (scores[:, 0] >= of_list[:, 0] - 1e-4).all()
    texts, best = space.show(answers[:, 0]), model.space.show(listed[:, 0])
    same = [text == normalised(other) for text, other in zip(texts, best, strict=True)]
    assert np.mean(same) > 0.8
    np.testing.assert_allclose(scores[same, 0], of_list[same, 0], atol=1e-4)


def test_what_was_typed_and_searched_for_decides(model, cases):
    history = cases.histories[0]
    others = [{**history, "prefix": "garden"}, {**history, "prefix": "phone"}]
    others += [{**others[0], **make_searches([text])} for text in ("winter coats", "phone cases")]
    answers, scores = model.recommend(others, K)
    assert len(np.unique(scores[:, 0])) == 4
    best = model.space.show(answers[:, 0])
    assert best[0].startswith("garden") and best[1].startswith("phone")


# ---- measured --------------------------------------------------------------------------------------------------------


def test_the_chosen_queries_are_measured_beside_the_baselines(path, model, cases):
    found = {
        (row["model"], row["subset"], row["metric"]): row["value"]
        for row in json.loads((path / "evaluation.json").read_text())
    }
    baselines = [
        "popular completion",
        "recent popular completion",
        "own searches, then popular",
        "own searches, then recent",
        "co-occurrence, then popular",
    ]
    assert {name for name, *_ in found} == {*baselines, "toy"}
    truths = [set(map(normalised, model.space.show(row[row >= 0]))) for row in cases.targets]
    typed = [normalised(history["prefix"]) for history in cases.histories]
    table = pq.read_table(path / "tables" / "searches.parquet").to_pylist()
    sessions = {(row["user"], row["session"], row["query"]) for row in table if row["split"] == "train"}
    counts = Counter(query for _, _, query in sessions)
    popular = sorted(counts, key=lambda text: (-counts[text], text))
    completed = [[text for text in popular if text.startswith(start)] for start in typed]
    answers, _ = model.recommend(cases.histories, K)
    rankings = {
        "popular completion": completed,
        "toy": [model.space.show(row) for row in answers],
    }
    for name, rows in rankings.items():
        recall = [len(true & set(row[:5])) / len(true) for true, row in zip(truths, rows, strict=True)]
        ranks = [
            [row[:10].index(text) + 1 for text in true if text in row[:10]]
            for true, row in zip(truths, rows, strict=True)
        ]
        assert found[name, "all", "recall@5"] == pytest.approx(np.mean(recall))
        assert found[name, "all", "mrr@10"] == pytest.approx(np.mean([1 / min(each) if each else 0 for each in ranks]))
    best = max(found[name, "all", "mrr@10"] for name in baselines)
    assert found["toy", "all", "mrr@10"] > 0.8 * best and found["toy", "texts", "acc_token"] > 0.8
    shown = [model.space.show(row[row >= 0]) for row in answers]
    begins = [text.startswith(start) for start, row in zip(typed, shown, strict=True) for text in row]
    assert found["toy", "suggestions", "begins"] == pytest.approx(np.mean(begins))
    assert found["toy", "suggestions", "full"] == 1 and found["toy", "suggestions", "duplicates"] == 0
    assert found["popular completion", "suggestions", "begins"] == 1


def test_searches_of_the_history_are_not_new(model, cases):
    new = [
        [text not in set(map(normalised, history["search_query"])) for text in model.space.show(row[row >= 0])]
        for history, row in zip(cases.histories, cases.targets, strict=True)
    ]
    assert [row[keep].tolist() for row, keep in zip(cases.new, cases.where, strict=True)] == new
    assert 0 < cases.new.sum() < cases.where.sum()
    answers, _ = model.recommend(cases.histories, K, exclude_history=True)
    for history, row in zip(cases.histories, answers, strict=True):
        assert not set(model.space.show(row)) & set(history["search_query"])


def test_the_report_shows_what_was_typed(path):
    report = (path / "report.html").read_text()
    assert "Texts, token by token" in report and "Stage preference" in report and "popular completion" in report
    for text in ("What is shown for a prefix", "By characters typed", "By prefix", "By chosen query", "Last searches"):
        assert text in report, text
    assert "Queries new to the user" in report and "57 prefixes" in report and "target session" not in report
    shown = json.loads((path / "examples_shown.json").read_text())
    assert all(f"Typed: {each['prefix']}" in report for each in shown) and len(shown) == 3
    feedback = {given for each in shown for given in each["feedback"]}
    assert feedback <= {"order", "item_click", "click"} and all(given.replace("_", " ") in report for given in feedback)


# ---- served ----------------------------------------------------------------------------------------------------------


def texts_of(answer) -> list[str]:
    assert answer.source == "model", answer
    return [each.text for each in answer.texts]


def best_texts(model, history: dict, k: int) -> list[str]:
    return model.space.show(model.recommend([history], K)[0][0])[:k]


def test_a_known_user_is_answered_with_its_own_searches(path, model, retriever):
    """The answer is that of a case whose history holds all of the user's searches."""
    records = Records(Run.load(path)[0].examples, "test")
    users = pq.read_table(path / "tables" / "users.parquet")["user_id"].to_pylist()
    for record in (records[0], records[7]):
        searched = model.assembly.queries[record["search_query"]]
        request = Request(user_id=users[record["user"]], prefix="che", k=4)
        history, _ = retriever.history(request)
        assert history["search_query"].tolist() == searched.tolist() and len(searched)
        np.testing.assert_array_equal(history["search"], record["search"])
        (answer, _) = retriever.answer([request, request])
        assert texts_of(answer) == best_texts(model, EMPTY | make_searches(searched) | {"prefix": "che"}, 4)


REQUESTS = [
    {"user_id": "u07", "prefix": "bo", "k": 3},
    {"history": [], "prefix": "garden", "k": 3},
    {"history": [{"query": "Coffee  BEANS"}], "query": "che", "k": 2},
    {"user_id": "nobody", "prefix": "ru", "k": 2},
    {"user_id": "nobody", "k": 2},
    {"history": [{"query": "phone cases"}], "k": 2},
    {"history": [], "prefix": "bo", "exclude_history": True},
]


def test_a_prefix_alone_is_answered_by_the_model(model, retriever):
    known = [Request.model_validate(each) for each in REQUESTS[:4]]
    for request, answer in zip(known[1:], retriever.answer(known)[1:], strict=True):
        searched = [entry.query for entry in request.history or ()]
        typed = {"prefix": request.prefix or request.query}
        assert texts_of(answer) == best_texts(model, EMPTY | make_searches(searched) | typed, request.k)
    assert texts_of(retriever.answer(known)[1])[0].startswith("garden")


def test_a_file_and_http_answer_alike(retriever, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in REQUESTS))
    summary = answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (summary.answered, summary.popular, summary.bad) == (6, 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with TestClient(create_app(retriever)) as client:
        for request, line in zip(REQUESTS, lines, strict=True):
            told = client.post("/recommend", json=request).json()
            if "error" in line:
                assert told["error"] == line["error"]
                continue
            assert [each["text"] for each in told["texts"]] == [each["text"] for each in line["texts"]]
            assert told["source"] == line["source"] and len(line["texts"]) == request["k"]
    assert [line.get("source") for line in lines] == ["model"] * 4 + ["popular", "model", None]


# ---- exported --------------------------------------------------------------------------------------------------------

ANSWER = """
import json, sys
from pathlib import Path
import jax, numpy as np, sentencepiece
from jax import export
from safetensors.numpy import load_file
folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
files = {array["file"] for array in manifest["weights"].values()}
weights = {name: array for file in files for name, array in load_file(folder / file).items()}
(module,) = manifest["modules"]
tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(sys.argv[2])
tokens = [*tokens, manifest["catalogue"]["end"]]
size = module["length"]
inputs = {"tokens": np.zeros((1, size), np.int32), "mask": np.arange(size)[None] < len(tokens)}
inputs["tokens"][0, : len(tokens)] = tokens
call = export.deserialize(bytearray((folder / module["file"]).read_bytes())).call
found = jax.device_get(jax.jit(call)(weights, inputs))
texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()]
assert "jaxrec" not in sys.modules
print(json.dumps([[texts[text], float(score)] for text, score in zip(found["texts"][0], found["scores"][0])]))
"""


def test_an_export_answers_a_prefix_in_a_fresh_process(path, model, tmp_path):
    folder = tmp_path / "artefact"
    manifest = export_run(path, folder, ExportConfig(k=K, platforms=("cpu",)))
    assert manifest["reader"] == "TokenSequenceConfig" and set(manifest["modules"][0]["inputs"]) == {"tokens", "mask"}
    command = [sys.executable, "-c", ANSWER, str(folder), "board g"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    answers, scores = model.recommend([EMPTY | {"prefix": "board g"}], K)
    texts, found = zip(*json.loads(done.stdout), strict=True)
    assert list(texts) == model.space.show(answers[0])
    np.testing.assert_allclose(found, scores[0], atol=1e-5)
    artefact = load(folder)
    history = model.assembly.read_texts(EMPTY | {"prefix": "board g"})
    (shown,) = artefact.show(artefact.retrieve(artefact.prepare([history])))
    assert [text for text, _ in shown] == list(texts)
