"""A model that generates texts: recommended with, measured, served and exported by the same code as items."""

import dataclasses
import itertools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from compilations import count_compilations
from serving_run import ITEMS, write_run
from starlette.testclient import TestClient
from text_parts import FEATURES, TextAssembly, make_history, make_space, make_text_model

from jaxrec import export
from jaxrec.catalogue.live import LiveCatalogue
from jaxrec.config import UserError
from jaxrec.data.blocked import Blocked
from jaxrec.evaluation.cases import Cases
from jaxrec.export import ExportConfig, write_artefact
from jaxrec.run import Run
from jaxrec.serving.batch import answer_file
from jaxrec.serving.http import create_app
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems.comparison import EvaluationConfig, compare, present
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.systems.validation import make_validation
from jaxrec.targets import normalised, text_space
from jaxrec.text.tokenizer import TokenizerConfig, train_tokenizer

LIST, POPULARITY = ["ab", "B a", "bb", "a"], [1, 7, 3, 2]
HISTORIES = [make_history(items) for items in ([0], [1, 2], [4, 3, 2], [2])]
KNOWN = {"history": [{"item_id": "b"}, {"item_id": "c"}], "k": 3}


TOKENIZER = train_tokenizer(["ab ba bb", "a b"], TokenizerConfig(vocabulary=263))


def build(listed: bool):
    space = (
        make_space(LIST, POPULARITY, TOKENIZER, max_length=4)
        if listed
        else make_space(tokenizer=TOKENIZER, max_length=3, spellings=60)  # most are bytes, which are no text
    )
    return make_text_model(space, beam_width=16)


@pytest.fixture(scope="module", params=[True, False], ids=["list", "free"])
def model(request):
    return build(request.param)


@pytest.fixture
def retriever(model, tmp_path):
    return Retriever(write_run(tmp_path / "run"), model)


def expected_texts(model, k: int = 3) -> tuple[list[str], list[float]]:
    """The k best texts after the history of KNOWN."""
    answers, scores = model.recommend([make_history([1, 2])], k)
    return model.space.show(answers[0]), scores[0].tolist()


def test_requests_are_answered_with_texts(model, retriever):
    (answer,) = retriever.answer([Request.model_validate(KNOWN)])
    texts, scores = expected_texts(model)
    assert answer.source == "model" and answer.items is None
    assert [each.text for each in answer.texts] == texts
    np.testing.assert_allclose([each.score for each in answer.texts], scores, atol=1e-5)
    assert list(json.loads(answer.to_json())) == ["texts", "source"]
    assert list(json.loads(answer.to_json())["texts"][0]) == ["text", "score", "vetted", "own"]


def test_who_is_unknown_gets_the_most_popular_texts(model, retriever):
    (answer,) = retriever.answer([Request(user_id="nobody", k=2)])
    listed = [{"text": "B a", "score": 7.0}, {"text": "bb", "score": 3.0}] if len(model.space) else []
    listed = [each | {"vetted": True, "own": False} for each in listed]
    assert json.loads(answer.to_json()) == {"texts": listed, "source": "popular"}


def test_an_empty_filter_is_none(retriever):
    answers = retriever.answer([Request.model_validate(KNOWN | more) for more in ({}, {"filter": {}})])
    assert answers[0].to_json() == answers[1].to_json()


@pytest.mark.parametrize(
    "more", [{"filter": {"category": "shoes"}}, {"blocked": []}, {"allowed": ["a"]}, {"exclude_history": True}]
)
def test_what_restricts_items_is_refused(retriever, more):
    (answer,) = retriever.answer([Request.model_validate(KNOWN | more)])
    assert isinstance(answer, UserError)
    assert str(answer) == f"{next(iter(more))} restricts items, but this run answers with texts; leave it out"
    (answer,) = retriever.answer([Request.model_validate(KNOWN)], within=[{"category": "shoes"}])
    assert "within restricts items" in str(answer)


def test_a_file_and_http_give_the_same_answers(model, retriever, tmp_path):
    requests = [
        KNOWN,
        {"user_id": "u1", "k": 4},
        {"user_id": "nobody"},
        {"user_id": "u1", "filter": {"category": "hats"}},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    summary = answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (summary.answered, summary.popular, summary.bad) == (3, 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with TestClient(create_app(retriever)) as client:
        for request, line in zip(requests, lines, strict=True):
            response = client.post("/recommend", json=request)
            if response.status_code == 200:
                assert [each["text"] for each in response.json()["texts"]] == [each["text"] for each in line["texts"]]
            else:
                assert response.status_code == 422 and response.json()["error"] == line["error"]
        assert client.get("/healthz").json()["items"] == len(ITEMS)
        assert "GeneratedText" in client.get("/openapi.json").text
    assert [each["text"] for each in lines[0]["texts"]] == expected_texts(model)[0]


def test_after_the_warm_up_nothing_compiles(model, retriever):
    retriever.warm_up()
    assert retriever.ready
    with count_compilations() as compiled:
        retriever.answer([Request.model_validate(KNOWN), Request(user_id="u1"), Request(user_id="nobody")])
    assert compiled == []


def test_new_items_come_and_the_texts_stay(model, retriever):
    before = expected_texts(model)[0]
    version = retriever.catalogue.add(pa.table({"item_id": ["n"], "title": ["New"]}), np.array([[5]]))
    assert version.served.trie is model.served.trie
    (answer,) = retriever.answer([Request.model_validate(KNOWN | {"history": [*KNOWN["history"], {"item_id": "n"}]})])
    assert len(answer.texts) == 3 and answer.ignored is None
    (answer,) = retriever.answer([Request.model_validate(KNOWN)])
    assert [each.text for each in answer.texts] == before


def test_the_list_changes_while_it_is_served(tmp_path):
    """Every answer is that of a list before or after a change, in order; nothing is compiled."""
    retriever = Retriever(write_run(tmp_path / "run"), build(True))
    request = Request.model_validate(KNOWN | {"k": 9})

    def texts() -> list[str]:
        return [each.text for each in retriever.answer([request])[0].texts]

    first, number = texts(), retriever.catalogue.current.number
    assert set(first) == {"ab", "B a", "bb", "a"}
    retriever.warm_up()
    answers, lists, done = [], [first], threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(texts())

    asking = threading.Thread(target=ask)
    with count_compilations() as compiled:
        asking.start()
        for changes in ({"add": ["b", "BB"]}, {"remove": ["ab"]}, {"blocked": Blocked(words=("a",))}, {"add": ["a b"]}):
            retriever.change_texts(**changes)
            lists.append(texts())
        done.set()
        asking.join()
    assert compiled == []
    assert [set(each) for each in lists[1:]] == [
        {"ab", "B a", "BB", "a", "b"}, {"B a", "BB", "a", "b"}, {"BB", "b"}, {"BB", "b"},
    ]  # fmt: skip
    places = [lists.index(answer) for answer in answers]
    assert places == sorted(places) and len(places) > 3
    assert retriever.catalogue.current.number == number + 4
    retriever.catalogue.rollback(number + 1)
    assert texts() == lists[1]
    version = retriever.catalogue.add(pa.table({"item_id": ["n"], "title": ["New"]}), np.array([[5]]))
    assert texts() == lists[1] and version.texts is retriever.catalogue.current.texts
    expected = make_text_model(version.texts, beam_width=16).recommend([make_history([1, 2])], 9)[0][0]
    assert lists[1] == version.texts.show(expected[expected >= 0])


class ReadingAssembly(TextAssembly):
    """It may be asked with a prefix, which its model does not read."""

    def read_texts(self, history: dict) -> dict:
        return history


@pytest.fixture(scope="module")
def suggesting(tmp_path_factory) -> Retriever:
    space = text_space(TOKENIZER, LIST, POPULARITY, make_space(max_length=4).config, TOKENIZER.size + 5, BLOCKED)
    listed = make_text_model(space)
    decoding = DecodingConfig(batch_size=4, beam_width=16, constrained="mixed", completing=True)
    model = GenerativeRecommender(ReadingAssembly(listed.assembly.model, space), listed.variables, FEATURES, decoding)
    return Retriever(write_run(tmp_path_factory.mktemp("suggesting") / "run"), model)


BLOCKED = Blocked(texts=("bbb",), words=("aa",))
SEARCHED = ["B  A", "zz", "b a", "bbb", "ba", "AB"]


def test_suggestions_say_whether_they_are_vetted_and_the_users_own(suggesting):
    request = Request.model_validate({"searches": SEARCHED, "prefix": "b", "k": 4})
    (answer,) = suggesting.answer([request])
    assert answer.source == "model" and len(answer.texts) >= 2
    assert [each.vetted for each in answer.texts[:2]] == [True, True]
    for each in answer.texts:
        assert normalised(each.text).startswith("b") and not BLOCKED.holds(each.text)
        assert each.vetted == (each.text in ("B a", "bb")) and each.own == (normalised(each.text) in ("b a", "ba"))


@pytest.mark.parametrize(
    "prefix, own",
    [
        ("", ["b a", "ab", "ba", "zz"]),
        ("B", ["b a", "ba"]),
        ("b ", ["b a"]),
        ("x", []),
        (" \t", ["b a", "ab", "ba", "zz"]),
    ],
)
def test_own_searches_come_without_the_model_most_frequent_and_late_first(suggesting, prefix, own):
    asked = {"searches": SEARCHED, "prefix": prefix, "mode": "own"}
    answers = suggesting.answer([Request.model_validate(asked | {"k": k}) for k in (9, 1)])
    assert [each.text for each in answers[0].texts] == own and [each.text for each in answers[1].texts] == own[:1]
    assert {answer.source for answer in answers} == {"own"}
    assert all(each.own and each.vetted == (each.text in ("b a", "ab")) for each in answers[0].texts)
    assert not own or own[0] != "b a" or answers[0].texts[0].score == 2


def test_a_keystroke_is_one_request(suggesting, tmp_path):
    with TestClient(create_app(suggesting)) as client:
        told = client.get("/suggest", params={"prefix": "B", "k": 2}).json()
        assert {each["text"] for each in told["texts"]} == {"B a", "bb"} and told["source"] == "model"
        assert set(told["texts"][0]) == {"text", "score", "vetted", "own"}
        unknown = client.get("/suggest", params={"user_id": "nobody"}).json()
        assert [each["text"] for each in unknown["texts"]][:2] == ["B a", "bb"] and unknown["source"] == "popular"
        assert client.get("/suggest", params={"user_id": "u1", "prefix": "b", "mode": "own"}).json()["texts"] == []
        for prefix in (" ", "👟", "حذاء", "b" * 10_000, "\u200f", "%"):
            assert client.get("/suggest", params={"prefix": prefix}).status_code == 200, prefix[:9]
        assert client.get("/suggest?prefix=%ED%A0%80").status_code == 200, "half a character is read as U+FFFD"
        for params, part in (
            ({"prefix": "b" * 10_001}, "prefix"), ({"k": "0"}, "k "), ({"k": "501"}, "k "), ({"k": "x"}, "k "),
            ({"k": "9" * 5000}, "k "), ({"mode": "any"}, "mode "),
        ):  # fmt: skip
            refused = client.get("/suggest", params=params)
            assert refused.status_code == 422 and part in refused.json()["error"], params
        refused = client.post("/search", json={"history": [], "query": "b"})
        assert refused.status_code == 422 and refused.json()["error"].endswith("not with items; ask /suggest")
    (tmp_path / "in.jsonl").write_text(
        '{"searches": ["b a"], "prefix": "b", "mode": "own"}\n{"user_id": "u1", "prefix": "a"}\n'
    )
    assert answer_file(suggesting, tmp_path / "in.jsonl", tmp_path / "out.jsonl").answered == 2
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["source"] == "own" and second["texts"][0]["text"] in ("ab", "a")


def test_a_run_that_answers_with_items_suggests_nothing(tmp_path):
    class Items:
        def recommend(self, histories, k, exclude_history=False):
            return np.zeros((len(histories), k), np.int32), np.zeros((len(histories), k), np.float32)

    with TestClient(create_app(Retriever(write_run(tmp_path / "run"), Items()))) as client:
        refused = client.get("/suggest", params={"prefix": "b"})
        assert refused.status_code == 422
        assert refused.json()["error"] == "this run answers with items, not with texts; ask /recommend or /search"
        refused = client.post("/recommend", json={"user_id": "u1", "mode": "own"})
        assert refused.status_code == 422 and "mode own gives searches" in refused.json()["error"]


def test_more_texts_than_there_is_room_for_compile_before_they_are_served(tmp_path):
    retriever = Retriever(write_run(tmp_path / "run"), build(True))
    request = Request.model_validate(KNOWN | {"k": 9})
    retriever.answer([request])
    retriever.change_texts(add=["".join(each) for each in itertools.product("ab", repeat=3)])
    with count_compilations() as compiled:
        (answer,) = retriever.answer([request])
    assert compiled == [] and len(answer.texts) == 9


def test_items_have_no_list_of_texts(tmp_path):
    live = LiveCatalogue(pa.table({"item_id": ["a"]}), np.array([[0]]), (2,))
    with pytest.raises(UserError, match="the answers of this run are items"):
        live.relist(lambda space: space)
    with pytest.raises(UserError, match="there is no list to change"):
        Retriever(write_run(tmp_path / "run"), build(False)).change_texts(add=["ab"])


def test_an_exported_filter_needs_a_list(tmp_path):
    with pytest.raises(UserError, match="--filters restricts listed answers, but this run generates any text"):
        write_artefact(build(False), ITEMS, tmp_path / "artefact", ExportConfig(filters=True))


def test_an_export_shows_the_same_texts(model, tmp_path):
    write_artefact(model, ITEMS, tmp_path / "artefact", ExportConfig(k=3, platforms=("cpu",)), {"system": "texts"})
    artefact = export.load(tmp_path / "artefact")
    found = artefact.retrieve(artefact.prepare(HISTORIES))
    assert set(found) == {"texts" if len(model.space) else "tokens", "scores", "valid", "nan"}
    for row, history in zip(artefact.show(found), HISTORIES, strict=True):
        answers, scores = model.recommend([history], 3)
        assert [text for text, _ in row] == model.space.show(answers[0][answers[0] >= 0])
        np.testing.assert_allclose([score for _, score in row], scores[0][answers[0] >= 0], atol=1e-5)
    manifest = artefact.manifest
    assert manifest["catalogue"]["texts"] == len(model.space) and manifest["catalogue"]["items"] == len(ITEMS)
    assert set(manifest["outputs"]) == set(found) <= set(model.space.meanings)


def test_an_exported_search_completes_what_was_typed(tmp_path):
    model = make_text_model(build(True).space, beam_width=16, completing=True)
    write_artefact(model, ITEMS, tmp_path / "artefact", ExportConfig(k=3, platforms=("cpu",)))
    artefact = export.load(tmp_path / "artefact")
    asked = [HISTORIES[0] | {"prefix": prefix} for prefix in ("b", "B ", "a", "")]
    shown = artefact.show(artefact.retrieve(artefact.prepare(asked)))
    answers, scores = model.recommend(asked, 3)
    assert [{text for text, _ in row} for row in shown[:3]] == [{"B a", "bb"}, {"B a"}, {"ab", "a"}]
    for row, found, of_found in zip(shown, answers, scores, strict=True):
        assert [text for text, _ in row] == model.space.show(found[found >= 0])
        np.testing.assert_allclose([score for _, score in row], of_found[found >= 0], atol=1e-5)


# ---- measured --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredAssembly(TextAssembly):
    """With cases of its own: what people typed after each history, in any writing."""

    def cases(self, split: str) -> Cases:
        typed = {"test": [["AB", "ab "], ["b A"], ["zz"], ["bb", "a"]], "valid": [["a"]] * 4}[split]
        targets, where = self.space.truths(typed)
        return Cases(np.zeros(4, np.int32), HISTORIES, targets, where, where)


def test_texts_are_measured_as_items_are(model, tmp_path):
    """Recall and MRR by hand, with texts compared as a reader sees them."""
    run = Run.load(write_run(tmp_path / "run"))[0]
    measured = dataclasses.replace(model.assembly)
    measured = MeasuredAssembly(
        **{each.name: getattr(model.assembly, each.name) for each in dataclasses.fields(measured)}
    )
    recommender = GenerativeRecommender(measured, model.variables, FEATURES, model.config)
    folder = run.path / "evaluation"
    folder.mkdir()
    compare(run, recommender, EvaluationConfig(cutoffs=(2, 4), shown_users=3), folder)
    rows = {
        (row["subset"], row["metric"]): row["value"] for row in json.loads((folder / "evaluation.json").read_text())
    }

    answers, _ = model.recommend(HISTORIES, 4)
    ranked = [model.space.show(row[row >= 0]) for row in answers]
    written = [[normalised(text) for text in row] for row in ranked]
    truths = [{"ab"}, {"b a"}, {"zz"}, {"bb", "a"}]
    recall = np.mean([len(true & set(row[:2])) / len(true) for true, row in zip(truths, written, strict=True)])
    first = [
        min((row.index(text) + 1 for text in true if text in row), default=0)
        for true, row in zip(truths, written, strict=True)
    ]
    assert rows["all", "recall@2"] == pytest.approx(recall)
    assert rows["all", "mrr@4"] == pytest.approx(np.mean([1 / rank if rank else 0 for rank in first]))
    assert 0 < rows["all", "recall@4"] <= 1 if len(model.space) else True
    assert {metric for subset, metric in rows if subset == "texts"} == (
        {"acc_token", "validity"} if len(model.space) else {"acc_token"}
    )
    present(run)
    report = (run.path / "report.html").read_text()
    assert "Texts, token by token" in report and "acc_token" in report
    shown = json.loads((run.path / "examples_shown.json").read_text())
    assert [user["targets"] for user in shown] == [["ab"], ["B a" if len(model.space) else "b a"], ["bb", "a"]]
    assert [each["title"] for each in shown[0]["generated"]][:4] == ranked[0]
    assert [each["hit"] for each in shown[0]["generated"]][:4] == [text == "ab" for text in written[0]]
    assert shown[1]["history"] == ["Title b", "Title c"]


def test_a_training_is_validated_by_texts(model):
    fields = {each.name: getattr(model.assembly, each.name) for each in dataclasses.fields(TextAssembly)}
    measure = make_validation(MeasuredAssembly(**fields), FEATURES, model.config, EvaluationConfig(split="valid"))
    state = SimpleNamespace(params=model.variables["params"], extra={})
    found = measure(state)
    answers, _ = model.recommend(HISTORIES, 5)
    hits = [model.space.show(row[row >= 0]).count("a") for row in answers]
    assert found["recall@5"] == pytest.approx(np.mean(hits))
    assert found == measure(state)
