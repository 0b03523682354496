"""Serving a catalogue that changes: filters in requests, new items, and swaps while many threads ask."""

import copy
import dataclasses
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compilations import count_compilations
from onemall_parts import ITEMS as COUNT
from onemall_parts import MODEL, make_assembly, make_variables
from serving_run import ITEMS, NextInLine, write_run

from jaxrec.catalogue.live import LiveCatalogue
from jaxrec.catalogue.version import Version
from jaxrec.config import UserError
from jaxrec.data.features import FeatureConfig
from jaxrec.semantic_ids import Codebooks, commands, write_codes
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.residual import Residual
from jaxrec.semantic_ids.table import later
from jaxrec.semantic_ids.table.changes import append
from jaxrec.semantic_ids.table.later import read_later
from jaxrec.semantic_ids.table.version_files import current_number
from jaxrec.semantic_ids.table.versions import publish, trained_space
from jaxrec.serving.retriever import NOTHING_ALLOWED, Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender

IDS = [f"i{row}" for row in range(COUNT)]
FEATURES = FeatureConfig(history_lengths=(4,), past_length=4, targets=4, buckets=(4,))
COLORS = ["red", "blue", "green", None]


def ids(answer) -> list[str]:
    return [item.item_id for item in answer.items]


def ask(retriever, within=None, **request):
    (answer,) = retriever.answer([Request(**request)], within=None if within is None else [within])
    if isinstance(answer, UserError):
        raise answer
    return answer


@pytest.fixture
def retriever(tmp_path) -> Retriever:
    return Retriever(write_run(tmp_path / "run"), NextInLine())


@pytest.fixture(scope="module")
def recommender() -> GenerativeRecommender:
    assembly = make_assembly(MODEL)
    return GenerativeRecommender(assembly, make_variables(assembly), FEATURES, DecodingConfig(24, 4))


@pytest.fixture
def real(tmp_path, recommender) -> Retriever:
    """A run of twenty items with the tiny OneMall; behaviors are those of its parts."""
    return Retriever(write_mall_run(tmp_path), recommender)


def write_mall_run(folder) -> Path:
    path = write_run(folder / "run")
    popularity = make_assembly(MODEL).space.popularity
    colors = [COLORS[row % 4] for row in range(COUNT)]
    items = {"item_id": IDS, "title": IDS, "count": popularity, "color": colors, "price": np.arange(COUNT) / 2}
    pq.write_table(pa.table(items), path / "tables" / "items.parquet")
    return path


def write_ids(retriever) -> Codebooks:
    """The semantic_ids folder of a run, as far as appending and publishing need it."""
    folder, space = retriever.run.semantic_ids, retriever.recommender.space
    folder.mkdir()
    generator = np.random.default_rng(1)
    levels = tuple(jnp.asarray(10.0 ** -level * generator.normal(size=(size, 6)), jnp.float32)
                   for level, size in enumerate(space.codebook_sizes))  # fmt: skip
    books = Codebooks(Residual(levels, (None,) * 3), None)
    codebooks.save(books, folder / "codebooks.safetensors")
    write_codes(folder / "codes.parquet", IDS, space)
    (folder / "quality.json").write_text("{}")
    return books


def write_items(path, books, codes, **columns):
    """A file of items whose IDs are to be these codes."""
    pq.write_table(pa.table({**columns, "embedding": list(codebooks.decode(books, np.array(codes)))}), path)
    return path


HISTORY = [{"item_id": "i4"}, {"item_id": "i7"}]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"filter": {"category": "shoes"}}, ["c", "a"]),
        ({"filter": {"category": ["shoes", "bags"], "price": {"min": 5, "max": 7.5}, "in_stock": True}}, ["c", "a"]),
        ({"filter": {"tags": ["red", "new"]}}, ["e", "a", "b"]),
        ({"filter": {}}, ["c", "d", "e", "a", "b"]),
        ({"blocked": ["c", "zz", "c"]}, ["d", "e", "a", "b"]),
        ({"allowed": ["b", "d", "zz"]}, ["d", "b"]),
        ({"allowed": ["b", "d"], "blocked": ["d"]}, ["b"]),
        ({"exclude_history": True}, ["c", "d", "e", "a"]),
        ({"exclude_history": True, "filter": {"category": ["bags", "hats"]}}, ["e"]),
    ],
)
def test_a_request_gets_what_it_asks_for(retriever, request_, expected):
    answer = ask(retriever, history=[{"item_id": "b"}], **request_)
    assert ids(answer) == expected and answer.note is None and answer.source == "model"
    assert answer.ignored == (["zz"] if "zz" in str(request_) else None)
    by_popularity = [item for item in "bcade" if item in expected or ("b" not in expected and item == "b")]
    popular = ask(retriever, user_id="stranger", **request_)
    if "exclude_history" not in request_:
        assert popular.source == "popular" and ids(popular) == [item for item in by_popularity if item in expected]


@pytest.mark.parametrize("who", [{"user_id": "stranger"}, {"user_id": "u1"}])
@pytest.mark.parametrize(
    "request_",
    [{"filter": {"category": "boats"}}, {"allowed": []}, {"allowed": ["zz"]}, {"blocked": ITEMS},
     {"filter": {"price": []}}],
)  # fmt: skip
def test_a_filter_that_allows_nothing_says_so(retriever, who, request_):
    answer = ask(retriever, **who, **request_)
    assert answer.items == [] and answer.note == NOTHING_ALLOWED and retriever.recommender.calls == []
    assert answer.source == ("popular" if who["user_id"] == "stranger" else "model")


def test_a_bad_filter_fails_its_request_alone(retriever):
    bad = [Request(user_id="u1", filter={"colour": "red"}), Request(user_id="u1", filter={"price": "low"})]
    answers = retriever.answer([*bad, Request(user_id="u1", filter={"price": {"max": 6}})])
    assert str(answers[0]) == (
        "filter.colour: the items have no such column; they have category, count, in_stock, item_id, price, tags, title"
    )
    assert str(answers[1]) == "filter.price is 'low', but the column holds numbers"
    assert ids(answers[2]) == ["a"]


def test_filters_of_python(retriever):
    def odd(items: pa.Table) -> np.ndarray:
        return np.arange(len(items)) % 2 == 1

    assert ids(ask(retriever, odd, history=[{"item_id": "b"}])) == ["d", "b"]
    assert ids(ask(retriever, np.arange(5) < 3, history=[{"item_id": "b"}], blocked=["a"])) == ["c", "b"]
    assert ids(ask(retriever, odd, user_id="stranger", filter={"in_stock": True})) == ["d"]
    with pytest.raises(UserError, match="has 5 rows: give bool"):
        ask(retriever, np.ones(4, bool), user_id="u1")


def test_removed_items_stay_in_histories(retriever):
    retriever.catalogue.remove(["c", "e"])
    assert ids(ask(retriever, history=[{"item_id": "c"}])) == ["d", "a", "b"]
    assert ids(ask(retriever, user_id="stranger")) == ["b", "a", "d"]
    retriever.catalogue.rollback(1)
    assert ids(ask(retriever, history=[{"item_id": "c"}], k=2)) == ["d", "e"]


def test_a_mixed_batch_of_a_real_model_is_answered_as_each_alone(real):
    more = [
        {}, {"filter": {"color": "red"}}, {"blocked": ["i1", "i1", "i2"]}, {"exclude_history": True},
        {"allowed": IDS[3:9], "filter": {"price": {"min": 2}}}, {"filter": {"color": ["blue", "red"]}, "k": 20},
    ]  # fmt: skip
    requests = [Request(history=HISTORY, k=each.pop("k", 5), **each) for each in more]
    together = real.answer(requests)
    everything = ids(ask(real, history=HISTORY, k=20))
    assert sorted(everything) == sorted(IDS)
    color = dict(zip(IDS, real.catalogue.current.items["color"].to_pylist(), strict=True))
    expected = [
        everything,
        [item for item in everything if color[item] == "red"],
        [item for item in everything if item not in ("i1", "i2")],
        [item for item in everything if item not in ("i4", "i7")],
        [item for item in everything if item in IDS[4:9]],
        [item for item in everything if color[item] in ("red", "blue")],
    ]
    for request, answer, wanted in zip(requests, together, expected, strict=True):
        assert ids(answer) == wanted[: request.k]
        assert ids(real.answer([request])[0]) == ids(answer)


def test_a_batch_is_padded_once(real, monkeypatch):
    """A request is decoded alone; more of them together, in the smallest batch that holds them."""
    sizes, search = [], real.recommender._search
    monkeypatch.setattr(
        real.recommender,
        "_search",
        lambda *of: (sizes.append({len(x) for x in jax.tree.leaves(of[1:3])}), search(*of))[1],
    )
    for count, expected in ((1, [{1}]), (2, [{4}]), (4, [{4}]), (5, [{4}, {4}])):
        for more in ({}, {"blocked": ["i1"]}):
            requests = [Request(history=HISTORY, k=10, **more)] * count
            answers = real.answer(requests)
            assert sizes == expected
            assert [ids(answer) for answer in answers] == [ids(answers[0])] * count
            sizes.clear()


def test_after_the_warm_up_no_request_compiles(tmp_path, recommender):
    """Any depth, history length, filter."""
    parts = recommender.assembly, recommender.variables, dataclasses.replace(FEATURES, buckets=(2, 4))
    retriever = Retriever(write_mall_run(tmp_path), GenerativeRecommender(*parts, DecodingConfig(100, 4)))
    assert not retriever.ready
    retriever.warm_up()
    assert retriever.ready
    with count_compilations() as compiled:
        for k in (1, 10, 11, 50, 51, 100, 101, 500):
            for length in (1, 4):
                for more in ({}, {"exclude_history": True}, {"blocked": IDS[4:18]}, {"filter": {"color": "red"}}):
                    answer = ask(retriever, history=[{"item_id": f"i{row}"} for row in range(length)], k=k, **more)
                    assert answer.source == "model" and answer.items
    assert compiled == []


def test_one_program_for_depths_of_the_same_beams(real):
    assert [real.depth(k) for k in (1, 10, 11, 50, 51, 500)] == [10, 10, 50, 50, 100, 500], "24 beams"
    real.recommender = GenerativeRecommender(
        *(real.recommender.assembly, real.recommender.variables, real.recommender.feature_config, DecodingConfig(64, 4))
    )
    assert [real.depth(k) for k in (1, 10, 11, 50, 51, 500)] == [50, 50, 50, 50, 100, 500], "64 beams"


def test_new_items_are_recommended_and_read_in_histories(real):
    new = pa.table({"item_id": ["n0"], "title": ["New"], "color": ["red"], "price": [99.0]})
    real.add(new, codes=[[3, 2, 1]], popularity=[4], embeddings=np.zeros((1, 6)))
    answer = ask(real, history=HISTORY, filter={"price": {"min": 50}})
    assert [(item.item_id, item.title) for item in answer.items] == [("n0", "New")]
    assert "n0" in ids(ask(real, history=[{"item_id": "n0"}, *HISTORY], k=21))
    assert ask(real, history=[{"item_id": "n0"}]).source == "model"
    assert "n0" in ids(ask(real, user_id="stranger", k=21))
    with pytest.raises(UserError, match=r"versions has no current version|there is no folder|is missing"):
        real.add(pa.table({"item_id": ["n1"]}))
    real.catalogue.rollback(1)
    assert ask(real, history=[{"item_id": "n0"}]).ignored == ["n0"]


def test_new_items_come_with_the_ids_that_append_gave_them(real):
    """Codes by the run's codebooks, and without an embedding of its own what these say that the ID stands for."""
    folder = real.run.semantic_ids
    books = write_ids(real)
    stands_for = codebooks.decode(books, np.array([[3, 2, 1], [1, 0, 0]]))
    append(folder, ["n0", "n1"], stands_for)
    table = pa.table({"item_id": ["n1", "n0"], "title": ["One", "Zero"]})
    version = real.add(table)
    assert version.codes[COUNT:].tolist() == [[1, 0, 0], [3, 2, 1]]
    np.testing.assert_allclose(version.embeddings, stands_for[::-1], atol=1e-6)
    np.testing.assert_allclose(version.served.catalogue.embeddings[COUNT : COUNT + 2], stands_for[::-1], atol=1e-6)
    assert [item.title for item in ask(real, history=HISTORY, allowed=["n0"]).items] == ["Zero"]
    given = np.ones((1, 6), np.float32)
    append(folder, ["n2"], stands_for[:1])
    version = real.add(pa.table({"item_id": ["n2"]}), embeddings=given)
    np.testing.assert_array_equal(version.embeddings[2:], given)
    with pytest.raises(UserError, match="no active item_id 'n3'"):
        real.add(pa.table({"item_id": ["n3"]}))


def test_a_restart_knows_what_was_published(real, tmp_path):
    """Items that came, with their titles and attributes; that left; that have another ID; and back to the first."""
    folder, books = real.run.semantic_ids, write_ids(real)
    before = ask(real, history=HISTORY, k=20)

    def restarted() -> Retriever:
        return Retriever(real.run.path, real.recommender)

    columns = {
        "title": ["One", "Zero"],
        "color": ["red", None],
        "price": [99, 98],
        "count": [1e6, None],
        "more": [1, 2],
    }
    new = write_items(tmp_path / "new.parquet", books, [[1, 0, 0], [3, 2, 1]], item_id=["n1", "n0"], **columns)
    commands.append(folder, new)
    assert ids(ask(restarted(), history=HISTORY, k=20)) == ids(before), "not published yet"
    commands.rollback(folder, 2, publish=True)
    later = restarted()
    assert later.catalogue.current.codes[COUNT:].tolist() == [[1, 0, 0], [3, 2, 1]]
    expensive = ask(later, history=HISTORY, filter={"price": {"min": 50}}).items
    assert {item.item_id: item.title for item in expensive} == {"n1": "One", "n0": "Zero"}
    assert (
        ids(ask(later, user_id="stranger", k=1)) == ["n1"] and ask(later, history=[{"item_id": "n0"}]).ignored is None
    )
    # As if they had come while it served.
    real.add(pq.read_table(new, columns=["item_id", "title", "color", "price"]), popularity=[1e6, 0])
    alive, anew = (ask(each, history=[{"item_id": "n1"}, *HISTORY], k=22).items for each in (real, later))
    assert [each.item_id for each in alive] == [each.item_id for each in anew]
    np.testing.assert_allclose([each.score for each in alive], [each.score for each in anew], atol=1e-6)

    pq.write_table(pa.table({"item_id": ["i4", "n0"]}), tmp_path / "gone.parquet")
    commands.remove(folder, tmp_path / "gone.parquet", publish=True)
    moved = write_items(tmp_path / "moved.parquet", books, [[0, 1, 0]], item_id=["i5"])
    commands.reencode(folder, moved, publish=True)
    later = restarted()
    answer = ask(later, history=HISTORY, k=22)
    assert set(ids(answer)) == {*IDS, "n1"} - {"i4"} and answer.ignored is None, "what left is history all the same"
    assert later.catalogue.current.codes[5].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(trained_space(folder, IDS).codes, real.recommender.space.codes)

    commands.rollback(folder, 1, publish=True)
    again = ask(restarted(), history=HISTORY, k=20)
    assert again == before


def test_nothing_is_published_that_a_restart_could_not_serve(real, tmp_path, capsys):
    folder, books = real.run.semantic_ids, write_ids(real)
    append(folder, ["n0"], codebooks.decode(books, np.array([[3, 2, 1]])))
    published = (folder / "codes.parquet").read_bytes()
    one = write_items(tmp_path / "one.parquet", books, [[1, 0, 0]], item_id=["n1"], title=["One"])
    unknown = (
        r"item_id 'n0' is in neither .*items.parquet nor .*later_items.parquet \(1 such items\): append it once more"
    )
    for change in (lambda: commands.append(folder, one, publish=True), lambda: publish(folder)):
        with pytest.raises(UserError, match=unknown):
            change()
    bad = write_items(tmp_path / "bad.parquet", books, [[1, 0, 0]], item_id=["n1"], price=["dear"])
    with pytest.raises(
        UserError, match=r"bad.parquet: column 'price' is string, but the run's items.parquet has double"
    ):
        commands.append(folder, bad, publish=True)
    assert current_number(folder) == 2 and (folder / "codes.parquet").read_bytes() == published
    both = write_items(tmp_path / "both.parquet", books, [[1, 0, 0]] * 2, item_id=["n1", "n0"], title=["One", "Zero"])
    commands.append(folder, both, publish=True)
    answer = ask(Retriever(real.run.path, real.recommender), history=HISTORY, allowed=["n0", "n1"])
    assert {item.item_id: item.title for item in answer.items} == {"n1": "One", "n0": "Zero"}
    assert "no title" not in capsys.readouterr().out
    commands.append(folder, write_items(tmp_path / "untitled.parquet", books, [[0, 0, 0]], item_id=["n2"]))
    assert "1 of these items have no title" in capsys.readouterr().out


def test_an_item_that_is_appended_again_keeps_what_the_file_does_not_tell(real, tmp_path, capsys):
    folder, books = real.run.semantic_ids, write_ids(real)

    def append_file(**columns):
        codes = [[1, 0, 0], [3, 2, 1], [0, 0, 0]][: len(columns["item_id"])]
        commands.append(folder, write_items(tmp_path / "new.parquet", books, codes, **columns), publish=True)

    append_file(item_id=["n0", "n1"], title=["Zero", "One"], color=["red", "blue"], count=[3, 4])
    append_file(item_id=["n1", "i3", "n2"], color=[None, "red", "green"], price=[7, 8, 9])
    assert "1 of these items have no title" in capsys.readouterr().out
    names = ["item_id", "title", "color", "price", "count"]
    kept = {row["item_id"]: tuple(row[name] for name in names[1:]) for row in read_later(folder).to_pylist()}
    assert kept == {"n0": ("Zero", "red", None, 3), "n1": ("One", None, 7, 4), "n2": (None, "green", 9, None)}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_text_is_text_however_arrow_keeps_it(real, tmp_path, monkeypatch, kind):
    folder, books = real.run.semantic_ids, write_ids(real)
    path = write_items(tmp_path / "new.parquet", books, [[1, 0, 0]] * 2, item_id=["n0", "n1"])
    table = pq.read_table(path).append_column("title", pa.array(["Zero", None]).cast(kind))
    # As a later version of Arrow may read it, whatever this one makes of the file.
    monkeypatch.setattr(later, "read_table", lambda *_: table)
    commands.append(folder, path, publish=True)
    assert read_later(folder)["title"].to_pylist() == ["Zero", None]


def test_an_item_without_a_row_can_leave_what_is_published(real, tmp_path):
    folder, books = real.run.semantic_ids, write_ids(real)
    append(folder, ["n0", "n1"], codebooks.decode(books, np.array([[3, 2, 1], [1, 0, 0]])))
    gone = tmp_path / "gone.parquet"
    pq.write_table(pa.table({"item_id": ["n0"]}), gone)
    with pytest.raises(UserError, match=r"item_id 'n1' is in neither .* \(1 such items\)"):
        commands.remove(folder, gone, publish=True)
    assert current_number(folder) == 2
    pq.write_table(pa.table({"item_id": ["n0", "n1"]}), gone)
    commands.remove(folder, gone, publish=True)
    assert pq.read_table(folder / "codes.parquet")["item_id"].to_pylist() == IDS


def answered_by(retriever: Retriever, version: Version, requests: list[Request]) -> list[str]:
    """The whole answers, as JSON, of a catalogue that is nothing but this version."""
    alone = copy.copy(retriever)
    alone.catalogue = SimpleNamespace(current=version)
    return [alone.answer([request])[0].to_json() for request in requests]


def everything_else(live: LiveCatalogue) -> Version:
    """Swaps to a catalogue with other titles, colors, IDs and popularity, without i19 and with n0."""
    items = live.current.items
    names = [*IDS[:19], "n0"]
    table = pa.table({"item_id": names, "title": [f"New {name}" for name in names], "color": ["red"] * 20,
                      "price": np.arange(20.0), "count": items["count"]})  # fmt: skip
    codes = np.roll(live.current.codes, 3, axis=0)
    return live.swap(table, codes, popularity=np.arange(20.0), embeddings=np.zeros((20, 6)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["history", "_allowed", "_recommend", "_answer"])
def test_a_version_that_comes_during_a_request_is_not_seen_by_it(real, monkeypatch, step, when):
    """A request is stopped at each of its steps, and everything is swapped meanwhile."""
    requests = [
        Request(history=HISTORY, k=10), Request(history=HISTORY, k=10, filter={"color": ["red", "blue"]}),
        Request(history=[*HISTORY, {"item_id": "n0"}], exclude_history=True, blocked=["i3", "n0"]),
        Request(user_id="stranger", k=10), Request(user_id="stranger", filter={"price": {"min": 3}}),
    ]  # fmt: skip
    live, original, stopped = real.catalogue, getattr(real, step), 0
    first = live.current
    old, new = answered_by(real, first, requests), answered_by(real, everything_else(live), requests)
    assert not set(old) & set(new)

    def stop(*arguments):
        nonlocal stopped
        stopped += 1
        if when == "before":
            everything_else(live)
        result = original(*arguments)
        if when == "after":
            everything_else(live)
        return result

    monkeypatch.setattr(real, step, stop)
    for request, whole in zip(requests, old, strict=True):
        live.current = first
        (answer,) = real.answer([request])
        assert answer.to_json() == whole
    assert stopped >= 3


def test_swaps_while_many_threads_ask(real):
    """No request fails, mixes versions, or waits for a compilation."""
    new = pa.table({"item_id": ["n0", "n1"], "title": ["N", "N"], "color": ["red", "red"], "price": [1.0, 2.0]})
    requests = [
        Request(history=HISTORY, k=10), Request(history=HISTORY, k=10, filter={"color": ["red", "blue"]}),
        Request(history=HISTORY[:1], k=10, exclude_history=True, blocked=["i3"]), Request(user_id="stranger", k=10),
    ]  # fmt: skip
    live, stop, failures, answered = real.catalogue, threading.Event(), [], []

    def prepared():
        real.add(new, codes=[[3, 2, 1], [0, 0, 0]], embeddings=np.zeros((2, 6)))
        real.answer(requests)
        live.rollback(1)
        real.answer(requests)

    def ask_on(request: Request) -> None:
        while not stop.is_set():
            before = live.current
            (answer,) = real.answer([request])
            after = live.current
            if isinstance(answer, UserError) or not answer.items:
                failures.append(answer)
                continue
            answered.append((request, before.number, after.number, answer.to_json()))

    prepared()
    history = [live.current]
    with count_compilations() as compiled:
        threads = [threading.Thread(target=ask_on, args=(request,)) for request in requests]
        for thread in threads:
            thread.start()
        for turn in range(24):
            change = turn % 4
            if change == 0:
                version = live.remove([IDS[turn % COUNT], "i19"])
            elif change == 1:
                version = live.restore([IDS[(turn - 1) % COUNT], "i19"])
            elif change == 2:
                changed = {"color": ["blue", COLORS[turn % 3]], "title": [f"Title {turn}"] * 2}
                version = live.update(pa.table({"item_id": ["i2", "i5"], **changed}))
            else:
                version = live.reorder(["i4"], [turn])
            history.append(version)
            # Until two more requests have been answered, so that changes and requests do meet.
            enough, until = len(answered) + 2, time.monotonic() + 30
            while len(answered) < enough and not failures and time.monotonic() < until:
                time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == [] and compiled == []
    assert len(history) == 25 and len(answered) >= 48 and len({before for _, before, _, _ in answered}) > 10
    # Whole answers, each of one of the versions that were current during the request.
    whole = {each.number: answered_by(real, each, requests) for each in history}
    assert len({tuple(each) for each in whole.values()}) > 10
    for request, before, after, answer in answered:
        place = next(place for place, each in enumerate(requests) if each is request)
        assert answer in [whole[number][place] for number in whole if before <= number <= after]
