"""Lanes over HTTP: requests together, deadlines, clients that leave, several runs, the end, and what watches them.

The scheduler of `Asking` has no thread: the test makes its calls, so that what waits is what the test says.
"""

import asyncio
import json
import logging
import re
import signal
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from serving_run import NextInLine, write_run
from text_parts import make_space, make_text_model

from jaxrec.config import UserError
from jaxrec.serving import http
from jaxrec.serving.access import read_tokens
from jaxrec.serving.address import bind
from jaxrec.serving.http import Limits, check_access, create_app
from jaxrec.serving.lanes import NamedRun, call_sizes, make_lanes
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.serving.watch import REQUESTS, log_requests

TOKEN = "a-token-of-some-length"


class FourTogether(NextInLine):
    """Decodes four requests in a call, as a model with semantic IDs would."""

    config = SimpleNamespace(batch_size=4)


class Searching(FourTogether):
    reads_queries, required_text = True, "query"


@pytest.fixture
def retriever(tmp_path):
    return Retriever(write_run(tmp_path / "run"), FourTogether())


@pytest.fixture
def searcher(tmp_path):
    return Retriever(write_run(tmp_path / "search"), Searching())


class Asking:
    """Clients of an application in one event loop; nothing is called but by `step`."""

    def __init__(self, served, limits: Limits | None = None):
        lanes = make_lanes([served], together=4) if isinstance(served, Retriever) else served
        self.app = create_app(lanes, limits)
        self.front = self.app.state.front
        self.front.scheduler.threaded = False

    async def __aenter__(self):
        transport = httpx.ASGITransport(self.app)
        self.client = await httpx.AsyncClient(transport=transport, base_url="http://test").__aenter__()
        return self

    async def __aexit__(self, *error):
        await self.client.__aexit__(*error)

    def post(self, route="/recommend", **body) -> asyncio.Task:
        return asyncio.ensure_future(self.client.post(route, json=body))

    async def waits(self, count: int, lane: str = "recommend") -> None:
        """Until so many requests wait for a call."""
        async with asyncio.timeout(60):
            while self.front.scheduler.waiting(lane) != count:
                await asyncio.sleep(0.001)

    async def step(self) -> int | None:
        return await asyncio.to_thread(self.front.scheduler.step)


def counted(app, name: str, **labels: str) -> float:
    return app.state.front.metrics.registry.get_sample_value(name, labels) or 0.0


def asyncio_test(function):
    """A test that is a coroutine."""

    def run(retriever, searcher):
        asyncio.run(function(retriever, searcher))

    run.__name__ = function.__name__
    return run


@asyncio_test
async def test_requests_that_wait_are_one_call(retriever, _):
    async with Asking(retriever) as asking:
        asked = [asking.post(history=[{"item_id": item}], k=1) for item in "abcd"]
        await asking.waits(4)
        assert await asking.step() == 4
        answers = [(await each).json()["items"][0]["item_id"] for each in asked]
        assert answers == ["b", "c", "d", "e"]
    assert retriever.recommender.calls == [(4, 10, False)]
    assert counted(asking.app, "jaxrec_call_requests_sum", lane="recommend") == 4.0


@asyncio_test
async def test_requests_of_other_kinds_are_other_calls(retriever, _):
    """Another depth, filters, and another version of the catalogue."""
    async with Asking(retriever) as asking:
        asked = [asking.post(user_id="u1", **more) for more in ({}, {"k": 50}, {"filter": {"category": "shoes"}})]
        await asking.waits(3)
        retriever.catalogue.remove(["a"])
        asked.append(asking.post(user_id="u1"))
        await asking.waits(4)
        while await asking.step():
            pass
        found = [[item["item_id"] for item in (await each).json()["items"]] for each in asked]
    assert [count for count, *_ in retriever.recommender.calls] == [1] * 4
    assert found == [["d", "e", "a", "b", "c"], ["d", "e", "a", "b", "c"], ["a", "c"], ["d", "e", "b", "c"]]


@asyncio_test
async def test_what_needs_no_model_waits_for_none(retriever, _):
    async with Asking(retriever) as asking:
        assert (await asking.post(user_id="stranger")).json()["source"] == "popular"
        assert (await asking.post(user_id="u1", k=0)).status_code == 422
    assert counted(asking.app, "jaxrec_degraded_total", lane="recommend", reason="popular") == 1.0
    assert counted(asking.app, "jaxrec_requests_total", lane="recommend", status="422") == 1.0


@asyncio_test
async def test_a_late_answer_is_an_error_and_its_work_is_dropped(retriever, _):
    async with Asking(retriever) as asking:
        answer = await asking.post(user_id="u1", timeout_ms=1)
        error = {"error": "the answer was not ready within 1 ms; allow more (timeout_ms), or ask later"}
        assert (answer.status_code, answer.json()) == (504, error)
        assert await asking.step() is None
    assert not retriever.recommender.calls
    async with Asking(retriever, Limits(answer_seconds=0.001)) as asking:
        answer = await asking.post(user_id="u1", timeout_ms=60_000)
        assert (answer.status_code, answer.json()) == (504, error), "the server's limit holds for all"
        for wrong in (0, -1, "7", 1.5, 10**9):
            assert (await asking.post(user_id="u1", timeout_ms=wrong)).status_code == 422


@asyncio_test
async def test_a_lane_that_is_full_turns_away_and_others_do_not(retriever, searcher):
    lanes = make_lanes([retriever, searcher], together=4)
    async with Asking(lanes, Limits(waiting=2)) as asking:
        asked = [asking.post(user_id="u1") for _ in range(2)]
        await asking.waits(2)
        refused = await asking.post(user_id="u1")
        error = {"error": "2 requests are waiting already; try again in a second"}
        assert (refused.status_code, refused.json(), refused.headers["retry-after"]) == (503, error, "1")
        ready = {lane: (await asking.client.get(f"/readyz/{lane}")).status_code for lane in ("recommend", "search")}
        assert ready == {"recommend": 503, "search": 503}, "not compiled"
        for each in (retriever, searcher):
            each.ready = True
        ready = [(await asking.client.get(f"/readyz{lane}")).status_code for lane in ("", "/recommend", "/search")]
        assert ready == [503, 503, 200]
        search = asking.post("/search", user_id="u1", query="boots")
        await asking.waits(1, "search")
        assert [await asking.step(), await asking.step()] == [2, 1]
        assert {(await each).status_code for each in [*asked, search]} == {200}
        assert (await asking.client.get("/readyz")).status_code == 200
        metrics = (await asking.client.get("/metrics")).text
    assert 'jaxrec_requests_total{lane="recommend",status="503"} 1.0' in metrics
    assert 'jaxrec_requests_total{lane="search",status="200"} 1.0' in metrics


@asyncio_test
async def test_a_client_that_leaves_costs_nothing(retriever, _):
    body, left = json.dumps({"user_id": "u1"}).encode(), asyncio.Event()
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/recommend",
        "raw_path": b"/recommend", "query_string": b"", "headers": [], "scheme": "http", "server": ("test", 80),
    }  # fmt: skip
    received = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        if (message := next(received, None)) is not None:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(_):
        pass

    async with Asking(retriever) as asking:
        asked = asyncio.ensure_future(asking.app(scope, receive, send))
        await asking.waits(1)
        left.set()
        await asked
        assert await asking.step() is None and asking.front.places["recommend"].inside == 0
    assert not retriever.recommender.calls
    assert counted(asking.app, "jaxrec_requests_total", lane="recommend", status="499") == 1.0


@asyncio_test
async def test_batch_work_comes_last_over_http(retriever, _):
    async with Asking(retriever) as asking:
        later = asking.post(user_id="u1", k=50, priority="batch")
        await asking.waits(1)
        page = asking.post(user_id="u1")
        await asking.waits(2)
        await asking.step()
        assert (await page).status_code == 200 and not later.done()
        await asking.step()
        assert (await later).status_code == 200
    assert [depth for _, depth, _ in retriever.recommender.calls] == [10, 50]


@asyncio_test
async def test_batch_work_leaves_room_for_others(retriever, _):
    async with Asking(retriever, Limits(waiting=4)) as asking:
        asked = []
        for count in (1, 2):
            asked.append(asking.post(user_id="u1", priority="batch"))
            await asking.waits(count)
        refused = await asking.post(user_id="u1", priority="batch")
        error = {"error": "3 requests are waiting already, too many for batch work; try later"}
        assert (refused.status_code, refused.json(), refused.headers["retry-after"]) == (503, error, "1")
        asked.append(asking.post(user_id="u1"))
        await asking.waits(3)
        while not all(each.done() for each in asked):
            await asking.step()
            await asyncio.sleep(0.001)
        assert {(await each).status_code for each in asked} == {200}


@asyncio_test
async def test_the_end_turns_away_what_does_not_finish_in_time(retriever, _):
    retriever.ready = True
    async with Asking(retriever, Limits(drain_seconds=0.0)) as asking:
        asked = asking.post(user_id="u1")
        await asking.waits(1)
        asking.front.drain()
        error = {"error": "the server is shutting down; ask another one"}
        for answer in (await asked, await asking.post(user_id="u1"), await asking.client.get("/readyz")):
            assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (503, error, "1")
        assert (await asking.client.get("/healthz")).status_code == 200


def test_a_server_that_is_ended_answers_what_it_has(retriever, monkeypatch):
    """As a signal does it, with a request in the model."""
    inside, go_on, recommend = threading.Event(), threading.Event(), retriever.recommender.recommend

    def held(*arguments):
        inside.set()
        assert go_on.wait(60)
        return recommend(*arguments)

    retriever.recommender.recommend = held
    monkeypatch.setattr(http.console, "print", lambda *_: None)
    app = create_app(retriever)
    with bind("127.0.0.1", 0) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/recommend"
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60)
        server = http._Server(config, app.state.front, "")
        answers = []
        asking = threading.Thread(target=lambda: answers.append(httpx.post(url, json={"user_id": "u1"}, timeout=60)))
        bound.listen()
        serving = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        serving.start()
        asking.start()
        assert inside.wait(60)
        server.handle_exit(signal.SIGTERM, None)
        go_on.set()
        for thread in (asking, serving):
            thread.join(60)
            assert not thread.is_alive()
    assert answers[0].status_code == 200 and app.state.front.scheduler.closing


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suggester(tmp_path_factory) -> Retriever:
    """A text model with random weights."""
    model = make_text_model(make_space(["ab", "B a", "bb", "a"], [1, 7, 3, 2], max_length=4), beam_width=16)
    return Retriever(write_run(tmp_path_factory.mktemp("suggest") / "run"), model)


def test_an_answer_is_the_same_bits_alone_and_with_others(suggester):
    (lane,) = make_lanes([suggester], together=4)
    histories = ["a", "bc", "edc", "c", "abcde", "ea"]
    requests = [Request(history=[{"item_id": item} for item in items], k=4) for items in histories]

    def answers(*rows: int) -> list[str]:
        prepared = [suggester.prepare(requests[row]) for row in rows]
        found = lane.search(prepared)
        return [suggester.finish(*pair).to_json() for pair in zip(prepared, found, strict=True)]

    alone = [answers(row)[0] for row in range(len(requests))]
    assert len(set(alone)) == len(requests)
    for rows in ((0, 1, 2, 3), (3, 2, 1, 0), (5, 0, 4), (4, 5), (2, 2, 2, 2), (1, 4, 5, 3)):
        assert answers(*rows) == [alone[row] for row in rows]


def test_the_same_bits_over_http_and_no_program_that_the_warm_up_did_not_compile(suggester, tmp_path):
    async def main():
        lanes = make_lanes([suggester], together=4)
        lanes[0].warm_up()
        sizes = []
        search = suggester.recommender._search
        suggester.recommender._search = lambda *of: (sizes.append(len(next(iter(of[1].values())))), search(*of))[1]
        async with Asking(lanes) as asking:
            bodies = [{"history": [{"item_id": item}], "k": 4} for item in "abcde"]

            async def ask(*rows):
                asked = [asking.post("/suggest", **bodies[row]) for row in rows]
                await asking.waits(len(rows), "suggest")
                while len(rows) and not all(each.done() for each in asked):
                    await asking.step()
                    await asyncio.sleep(0)
                return [(await each).text for each in asked]

            alone = [(await ask(row))[0] for row in range(5)]
            assert await ask(0, 1, 2, 3, 4) == alone and await ask(4, 2) == [alone[4], alone[2]]
        suggester.recommender._search = search
        assert set(sizes) == {4}

    asyncio.run(main())


def test_a_model_whose_scores_depend_on_the_others_is_told_of(retriever, monkeypatch):
    said = []
    monkeypatch.setattr("jaxrec.serving.lanes.console.print", said.append)
    retriever.user_index |= {f"u{number}": 0 for number in range(4, 9)}  # as u1
    (lane,) = make_lanes([retriever], together=4)
    lane.warm_up()
    assert not said
    recommend = retriever.recommender.recommend

    def by_place(*arguments):
        items, scores = recommend(*arguments)
        return items, scores - 1e-6 * np.arange(len(scores), dtype=np.float32)[:, None]

    retriever.recommender.recommend = by_place
    lane.warm_up()
    assert said == [
        "recommend: scores depend in their last digits on the other requests of a call of 4; another --batch-size may "
        "not have this"
    ]


# ---- several runs ----------------------------------------------------------------------------------------------------


def fake(path: str, ability: str) -> SimpleNamespace:
    texts = object() if ability == "suggest" else None
    return SimpleNamespace(
        run=SimpleNamespace(path=path),
        sizes=(1, 8, 32),
        catalogue=SimpleNamespace(current=SimpleNamespace(texts=texts)),
        reads_queries=ability != "recommend",
        required_text="query" if ability == "search" else None,
    )


def routes(lanes) -> dict[str, tuple]:
    return {lane.name: lane.routes for lane in lanes}


def test_a_single_run_has_every_route():
    assert routes(make_lanes([fake("a", "search")])) == {"search": ("recommend", "search", "suggest")}


def test_each_run_has_the_routes_that_it_can_answer():
    runs = [fake("a", "recommend"), fake("b", "search"), fake("c", "suggest")]
    each = {name: (name,) for name in ("recommend", "search", "suggest")}
    assert routes(make_lanes(runs)) == each
    assert routes(make_lanes([fake("a", "both"), fake("c", "suggest")])) == {
        "recommend": ("recommend", "search"), "suggest": ("suggest",),
    }  # fmt: skip
    assert routes(make_lanes([fake("a", "both"), fake("b", "search")], [None, "search"])) == {
        "recommend": ("recommend",), "search": ("search",),
    }  # fmt: skip
    assert routes(make_lanes([fake("a", "both")], ["search"])) == {"search": ("search",)}


@pytest.mark.parametrize(
    ("runs", "names", "message"),
    [
        (["recommend", "recommend"], [], "r0 and r1 both recommend: serve one of them, or say which one is asked, as "
         "in recommend=r0"),
        (["both", "search"], [], "r0 and r1 both search: serve one of them"),
        (["recommend", "recommend"], ["recommend"], "r1 has no route left, since another run was named for recommend"),
        (["recommend", "suggest"], ["search"], "search=r0: this run can recommend, not search; leave search= out"),
    ],
)  # fmt: skip
def test_routes_that_two_runs_have_are_refused_in_a_sentence(runs, names, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_lanes([fake(f"r{number}", ability) for number, ability in enumerate(runs)], names)


def test_names_of_runs():
    assert NamedRun.parse("search=runs/a") == NamedRun(path=NamedRun.parse("runs/a").path, route="search")
    assert str(NamedRun.parse("runs/a=b").path) == "runs/a=b" and str(NamedRun.parse("x=a").path) == "x=a"


def test_sizes_of_calls():
    run = fake("a", "recommend")
    assert call_sizes(run) == (1,) and call_sizes(run, 16) == (16,), "on CPU"
    assert call_sizes(run, 16, alone=True) == (1, 16) and call_sizes(run, 1, alone=True) == (1,)
    run.sizes = None
    assert call_sizes(run, 16) == (1,)


def test_two_runs_in_one_process(retriever, searcher):
    client = TestClient(create_app(make_lanes([retriever, searcher])))
    asked = {"user_id": "u1", "k": 1}
    assert client.post("/recommend", json=asked).json()["items"][0]["item_id"] == "d"
    assert client.post("/search", json=asked | {"query": "boots"}).json()["source"] == "model"
    assert len(retriever.recommender.calls) == len(searcher.recommender.calls) == 1
    answer = client.get("/suggest", params={"prefix": "b"})
    error = {"error": "no run of this server can suggest; it can recommend and search"}
    assert (answer.status_code, answer.json()) == (404, error)
    health = client.get("/healthz").json()
    assert health["status"] == "ok" and {name: lane["version"] for name, lane in health["lanes"].items()} == {
        "recommend": 1, "search": 1,
    }  # fmt: skip
    retriever.catalogue.remove(["a"])
    health = client.get("/healthz").json()["lanes"]
    assert (health["recommend"]["version"], health["search"]["version"]) == (2, 1)
    answer = client.get("/readyz/suggest")
    assert answer.status_code == 404 and answer.json() == {
        "error": "there is no lane 'suggest'; there are recommend, search"
    }


# ---- watched ---------------------------------------------------------------------------------------------------------


def test_metrics(retriever):
    client = TestClient(create_app(retriever))
    client.post("/recommend", json={"user_id": "u1"})
    text = client.get("/metrics").text
    for stage in ("prepare", "wait", "search", "write", "total"):
        assert f'jaxrec_request_seconds_count{{lane="recommend",stage="{stage}"}} 1.0' in text
    for line in ('jaxrec_waiting{lane="recommend"} 0.0', 'jaxrec_catalogue_version{lane="recommend"} 1.0',
                 'jaxrec_call_requests_count{lane="recommend"} 1.0', 'jaxrec_ready{lane="recommend"} 0.0',
                 'jaxrec_degraded_total{lane="recommend",reason="popular"} 0.0'):  # fmt: skip
        assert line in text


def test_the_log_tells_nothing_of_who_asked(retriever, tmp_path):
    client, path = TestClient(create_app(retriever)), tmp_path / "log.jsonl"
    log_requests(path)
    try:
        answer = client.post("/recommend", json={"user_id": "u1", "k": 3})
        client.post("/recommend", json={"user_id": "u1", "k": 0})
    finally:
        for handler in REQUESTS.handlers[:]:
            handler.close()
            REQUESTS.removeHandler(handler)
        REQUESTS.setLevel(logging.NOTSET)
    good, bad = map(json.loads, path.read_text().splitlines())
    assert set(good) == {
        "time", "request", "lane", "route", "status", "ms", "together", "version", "k", "source",
    }  # fmt: skip
    assert good["request"] == answer.headers["x-request-id"] and set(good["ms"]) == {
        "prepare", "wait", "search", "write", "total",
    }  # fmt: skip
    assert (good["status"], good["k"], good["source"], good["together"]) == (200, 3, "model", 1)
    assert set(bad) == {"time", "request", "lane", "route", "status", "ms"} and bad["status"] == 422
    assert "u1" not in path.read_text().replace(good["request"], "").replace(bad["request"], "")
    with pytest.raises(UserError, match=r"--log .* can't be written: .*; give another file, or -"):
        log_requests(tmp_path / "nowhere" / "log")


def test_a_token_is_wanted_by_all_but_probes(retriever):
    retriever.ready = True
    client = TestClient(create_app(retriever, tokens=["another-token-of-old", TOKEN]))
    for method, path in (("POST", "/recommend"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/healthzz")):
        for given in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {TOKEN}"}):
            answer = client.request(method, path, headers=given)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert list(answer.json()) == ["error"]
    for path in ("/healthz", "/readyz", "/readyz/recommend"):
        assert client.get(path).status_code == 200
    for token in (TOKEN, "another-token-of-old"):
        given = {"Authorization": f"Bearer {token}"}
        assert client.post("/recommend", json={"user_id": "u1"}, headers=given).status_code == 200
        assert client.get("/metrics", headers=given).status_code == 200


def test_an_address_that_others_reach_needs_a_token():
    for address in ("127.0.0.1:1", "localhost:1", ":1", "[::1]:1"):
        check_access(address, ())
    for address in ("0.0.0.0:1", "[::]:1", "10.1.2.3:1", "shop.example:1"):
        check_access(address, [TOKEN])
        with pytest.raises(UserError, match=r"is open to other machines: give a token with --token-file or in JAXREC_"):
            check_access(address, ())


def test_where_tokens_come_from(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXREC_TOKEN", raising=False)
    assert read_tokens(None) == ()
    monkeypatch.setenv("JAXREC_TOKEN", TOKEN)
    assert read_tokens(None) == (TOKEN,)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n\n {TOKEN}-2 \n")
    assert read_tokens(file) == (TOKEN, f"{TOKEN}-2")
    for content, message in (
        (b"", "holds no token"), (b"short", "16 or more visible"), (b"with spaces in the token", "without spaces"),
        ("é" .encode() * 20, "ASCII"), (b"\xff" * 20, "it is no text"),
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read_tokens(file)
        assert "é" not in str(error.value) and "spaces in" not in str(error.value), "a secret is not printed"


def test_pages_of_other_origins_may_not_ask_unless_they_are_named(retriever):
    origin, body = {"Origin": "https://shop.example"}, {"user_id": "u1"}
    asks = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    closed = TestClient(create_app(retriever, tokens=[TOKEN]))
    answer = closed.post("/recommend", json=body, headers=origin | {"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    assert closed.options("/recommend", headers=asks).status_code in (401, 405)
    opened = TestClient(create_app(retriever, tokens=[TOKEN], origins=["https://shop.example"]))
    answer = opened.options("/recommend", headers=asks)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://shop.example"
    answer = opened.options("/recommend", headers=asks | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in answer.headers
