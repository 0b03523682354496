"""The JSON API: through the test client, and once over a real socket."""

import asyncio
import json
import re
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import quote

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_run import LINES, NextInLine, write_run

from jaxrec.config import UserError
from jaxrec.serving import http
from jaxrec.serving.http import THREADS, Limits, bind, create_app, listen, parse_address, serve
from jaxrec.serving.retriever import Retriever


@pytest.fixture
def retriever(tmp_path):
    return Retriever(write_run(tmp_path / "run"), NextInLine())


@pytest.fixture
def client(retriever):
    return TestClient(create_app(retriever))


def test_recommend_answers_as_the_batch_does(client):
    answer = client.post("/recommend", json={"user_id": "u1", "k": 1})
    assert answer.status_code == 200
    assert answer.json() == {"items": [{"item_id": "d", "title": "Title d", "score": 0.0}], "source": "model"}
    assert client.post("/recommend", json={"user_id": "stranger"}).json()["source"] == "popular"
    assert client.post("/recommend", json={"history": [{"item_id": "zz"}]}).json()["ignored"] == ["zz"]


def test_filters_over_http(client):
    def ask(**body):
        answer = client.post("/recommend", json={"history": [{"item_id": "b"}], **body}).json()
        return [item["item_id"] for item in answer["items"]], answer.get("note"), answer.get("ignored")

    assert ask(filter={"category": "shoes", "price": {"min": 6}}) == (["c"], None, None)
    assert ask(blocked=["c", "zz"], allowed=["c", "d", "a"]) == (["d", "a"], None, ["zz"])
    assert ask(filter={"price": {"max": 1}}) == ([], "the filters of this request allow no item of the catalogue", None)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("{oops", 400, "this is no JSON: Expecting property name enclosed in double quotes"),
        ("[1]", 422, 'a request is a JSON object such as {"user_id": "123"}'),
        ("", 422, "the request has no body"),
        ('{"user_id": "u1", "k": 0}', 422, "k should be greater than or equal to 1, not 0"),
        ('{"history": [{"item": "a"}]}', 422,
         "unknown field history[0].item; known are item_id, behavior, timestamp, query"),
        ("{}", 422, "give either user_id or history"),
        ('{"user_id": "u1", "query": "shoes"}', 422,
         "the system 'none' of this run reads no queries; leave query and prefix out of the request, and searches out "
         "of its history"),
        ('{"user_id": "u1", "event": 3}', 422,
         "unknown field event; known are user_id, history, query, prefix, profile, k, exclude_history, filter, "
         "blocked, allowed, now, searches, mode, timeout_ms, priority"),
        ('{"user_id": "u1", "profile": {"age": "40"}}', 422,
         "the system 'none' of this run reads no age of a user's profile; leave it out of the field profile"),
        ('{"user_id": "u1", "filter": {"price": {"min": 3, "max": 1}}}', 422,
         "filter.price has min 3 above max 1: no item can match"),
        ('{"user_id": "u1", "filter": {"price": NaN}}', 422,
         "filter.price has the value nan: give text, numbers, true or false"),
        ('{"user_id": "u1", "filter": {"count": "many"}}', 422,
         "filter.count is 'many', but the column holds numbers"),
        ('{"user_id": "u1", "filter": ["shoes"]}', 422, 'filter should be a valid dictionary, not ["shoes"]'),
        ('{"user_id": "u1", "blocked": "a"}', 422, 'blocked should be a valid list, not "a"'),
        (
            '{"history": [{"item_id": "a", "behavior": "glance"}]}', 422,
            "unknown behavior 'glance' in the history; known are exposure, purchase, coupon",
        ),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(client, body, status, error):
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (status, {"error": error})


@settings(max_examples=150, deadline=None)
@given(
    body=LINES,
    method=st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE", "PATCH"]),
    path=st.sampled_from(["/recommend", "/recommend", "/search", "/healthz", "/readyz"])
    | st.text(max_size=5).map(quote),
    kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data", "\xff"]),
)
def test_no_bytes_are_the_servers_fault(fuzzed, body, method, path, kind):
    """Never a status of 500 or more (the client raises what the server does), and one shape of errors."""
    answer = fuzzed.request(
        method, "/" + path.lstrip("/"), content=body, headers={"content-type": kind.encode("latin-1")}
    )
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert list(answer.json()) == ["error"] and answer.json()["error"]
        assert "the log says why" not in answer.json()["error"]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    retriever = Retriever(write_run(tmp_path_factory.mktemp("fuzzed") / "run"), NextInLine())
    retriever.warm_up()
    return TestClient(create_app(retriever))


def test_a_run_that_reads_no_query_refuses_searches(client):
    answer = client.post("/search", json={"user_id": "u1", "query": "shoes"})
    assert answer.status_code == 422 and answer.json()["error"].startswith(
        "the system 'none' of this run reads no quer"
    )


def test_what_is_not_there_is_refused_in_the_same_shape(client):
    answer = client.get("/recomend")
    assert (answer.status_code, answer.json()) == (404, {"error": "there is no /recomend; /docs lists what there is"})
    answer = client.get("/recommend")
    assert (answer.status_code, answer.json()) == (405, {"error": "/recommend takes POST, not GET"})
    assert answer.headers["allow"] == "POST"


def test_a_failure_has_the_same_shape(retriever, monkeypatch):
    monkeypatch.setattr(retriever.recommender, "recommend", lambda *_: 1 / 0)
    client = TestClient(create_app(retriever), raise_server_exceptions=False)
    answer = client.post("/recommend", json={"user_id": "u1"})
    error = {"error": "the server failed (ZeroDivisionError); its log says why"}
    assert (answer.status_code, answer.json()) == (500, error)


def test_a_body_that_is_too_long(retriever):
    client = TestClient(create_app(retriever, Limits(body=100)))
    longest = b'{"user_id": "u1"}'.ljust(100)
    assert client.post("/recommend", content=longest).status_code == 200
    for body in (longest + b" ", iter([longest, b" "]), b" " * 10_000):  # of a length that is told before, or not
        answer = client.post("/recommend", content=body)
        error = {"error": "the body has more than 100 bytes; send less at a time"}
        assert (answer.status_code, answer.json()) == (413, error)


def test_a_body_that_does_not_come(retriever):
    limits = Limits(body_seconds=0.05)

    async def stalled():
        yield b'{"user_id":'
        await asyncio.sleep(60)

    async def ask():
        transport = httpx.ASGITransport(create_app(retriever, limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/recommend", content=stalled())

    answer = asyncio.run(ask())
    error = {"error": "the body took more than 0.05 seconds to arrive"}
    assert (answer.status_code, answer.json()) == (408, error)


def test_slow_senders_do_not_keep_fast_ones_out(retriever):
    """Bodies on their way have a bound of their own; the queue is for those that are whole."""
    retriever.warm_up()

    async def main():
        stalled, go_on = asyncio.Semaphore(0), asyncio.Event()

        async def slow():
            yield b'{"user_id":'
            stalled.release()
            await go_on.wait()
            yield b' "u1"}'

        transport = httpx.ASGITransport(create_app(retriever, Limits(waiting=1, arriving=3)))
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
            asyncio.TaskGroup() as group,
        ):

            async def send():
                sent = group.create_task(client.post("/recommend", content=slow()))
                await asyncio.wait_for(stalled.acquire(), 30)
                return sent

            async def ask():
                answer = await client.post("/recommend", json={"user_id": "u1"})
                return answer, (await client.get("/readyz")).status_code

            sent = [await send(), await send()]
            answer, ready = await ask()
            assert (answer.status_code, ready) == (200, 200)
            sent.append(await send())
            answer, ready = await ask()
            error = {"error": "3 requests are arriving already; try again in a second"}
            assert (answer.status_code, answer.json(), ready) == (503, error, 503)
            assert answer.headers["retry-after"] == "1"
            go_on.set()
            statuses = [(await one).status_code for one in sent]
            answer, ready = await ask()
            assert (answer.status_code, ready) == (200, 200)
        return statuses

    assert 200 in asyncio.run(main())


def test_ready_when_warm(retriever, client):
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"error": "programs are not compiled yet"})
    retriever.warm_up()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


def test_a_full_queue_turns_away_and_the_server_stays_alive(retriever):
    """More requests wait in the model than there are threads: liveness is told at once, more requests are refused."""
    retriever.warm_up()
    recommend, go_on = retriever.recommender.recommend, threading.Event()

    def paused(*arguments):
        assert go_on.wait(60)
        return recommend(*arguments)

    retriever.recommender.recommend = paused
    waiting = THREADS + 2
    body = {"user_id": "u1", "k": 1}
    with (
        serving(create_app(retriever, Limits(waiting=waiting))) as url,
        ThreadPoolExecutor(waiting) as pool,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        answers = [pool.submit(httpx.post, f"{url}/recommend", json=body, timeout=60) for _ in range(waiting)]
        until = time.monotonic() + 30
        while client.get("/readyz").status_code == 200 and time.monotonic() < until:
            time.sleep(0.01)
        answer = client.post("/recommend", json=body)
        error = {"error": f"{waiting} requests are waiting already; try again in a second"}
        assert (answer.status_code, answer.json()) == (503, error) and answer.headers["retry-after"] == "1"
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").json()["status"] == "ok"
        assert not any(answer.done() for answer in answers)
        go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * waiting
        assert client.get("/readyz").status_code == 200
        assert client.post("/recommend", json=body).json()["items"][0]["item_id"] == "d"


def test_health_and_documentation(client):
    assert client.get("/healthz").json() == {"status": "ok", "system": "none", "items": 5, "users": 3, "version": 1}
    api = client.get("/openapi.json").json()
    assert {"/recommend", "/healthz"} <= set(api["paths"])
    schemas = api["components"]["schemas"]
    assert schemas["Request"]["examples"][0] == {"user_id": "123", "k": 10}
    assert {"Request", "Event", "Answer", "Item", "Problem"} <= set(schemas)
    assert set(re.findall(r"#/components/schemas/(\w+)", json.dumps(api))) <= set(schemas)
    assert "requestBody" in api["paths"]["/recommend"]["post"]
    assert client.get("/docs").status_code == 200


def test_only_one_request_at_a_time_is_in_the_model(retriever, client):
    inside, most = 0, 0
    recommend = retriever.recommender.recommend

    def slow(*arguments):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return recommend(*arguments)

    retriever.recommender.recommend = slow
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/recommend", json={"user_id": "u1"}).status_code, range(16)))
    assert answers == [200] * 16 and most == 1


@contextmanager
def serving(app):
    """The address of a real server on a free port."""
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            until = time.monotonic() + 30
            while not server.started and time.monotonic() < until:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def test_a_real_server_on_a_free_port(retriever):
    with serving(create_app(retriever)) as url:
        body = json.dumps({"history": [{"item_id": "a"}], "k": 2}).encode()
        request = urllib.request.Request(f"{url}/recommend", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert [item["item_id"] for item in json.load(answer)["items"]] == ["b", "c"]


def test_the_port_opens_when_everything_is_compiled(retriever, monkeypatch):
    held, servers, said, answers = [], [], [], []
    warm_up, run = retriever.warm_up, uvicorn.Server.run

    def hold(*address):
        held.append(bind(*address))
        return held[0]

    def closed(sizes):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(held[0].getsockname(), 5)
        assert not said
        warm_up(sizes)

    def ask_and_end(note):
        """The server's note comes when it can be asked."""
        said.append(note)

        def ask():
            answers.append(httpx.get(re.search(r"http://[\d.:]+", note)[0] + "/readyz", timeout=20).status_code)
            servers[0].should_exit = True

        threading.Thread(target=ask).start()

    monkeypatch.setattr(http, "bind", hold)
    monkeypatch.setattr(retriever, "warm_up", closed)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: (servers.append(server), run(server, sockets)))
    monkeypatch.setattr(http.console, "print", ask_and_end)
    serve(retriever, "127.0.0.1:0")
    assert len(said) == 1 and answers == [200]


def test_addresses():
    assert parse_address("127.0.0.1:8080") == ("127.0.0.1", 8080)
    assert parse_address(":80") == ("127.0.0.1", 80) and parse_address("8080") == ("127.0.0.1", 8080)
    assert parse_address("[::1]:9") == ("::1", 9)
    for wrong in ("localhost", "a:b", "a:99999", "", "a:-1", "a:" + "1" * 5000):
        with pytest.raises(UserError, match="give HOST:PORT"):
            parse_address(wrong)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".com", "."])
def test_a_host_that_cannot_be(host):
    with pytest.raises(UserError, match=re.escape(f"--http {host}:0 can't be listened on: ")):
        bind(host, 0)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UserError, match="can't be listened on"):
        bind("127.0.0.1", other.getsockname()[1])


def test_a_port_that_another_server_holds_while_it_warms_up():
    with bind("127.0.0.1", 0) as first:
        for _ in range(2):
            with pytest.raises(UserError, match="can't be listened on: Address already in use; give another address"):
                bind(*first.getsockname())
        with pytest.raises(OSError), socket.create_server(first.getsockname()):
            pass
        listen(first, "HOST:PORT")
        socket.create_connection(first.getsockname(), 5).close()


def test_a_port_on_which_old_connections_linger():
    with socket.create_server(("127.0.0.1", 0)) as before:
        address = before.getsockname()
        with socket.create_connection(address, 5) as client:
            before.accept()[0].close()  # the side that closes first keeps the connection in TIME_WAIT
            assert client.recv(1) == b""
    with bind(*address) as bound:
        listen(bound, "HOST:PORT")


def test_a_port_that_is_lost_during_the_warm_up(retriever, monkeypatch):
    held, others = [], []

    def hold(*address):
        held.append(bind(*address))
        return held[0]

    def lose(_):
        held[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        others.append(socket.create_server(held[0].getsockname()))

    monkeypatch.setattr(http, "bind", hold)
    monkeypatch.setattr(retriever, "warm_up", lose)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: pytest.fail("it serves"))
    with pytest.raises(UserError, match=r"--http .* can't be listened on: Address already in use"):
        serve(retriever, "127.0.0.1:0")
    others[0].close()
