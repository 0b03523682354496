"""The JSON API: through the test client, and once over a real socket."""

import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from fastapi.testclient import TestClient
from serving_run import NextInLine, write_run

from jaxrec.config import UserError
from jaxrec.serving.http import create_app, listen, parse_address
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
        ('{"history": [{"item": "a"}]}', 422, "history[0].item_id is missing"),
        ("{}", 422, "give either user_id or history"),
        ('{"user_id": "u1", "event": 3}', 422,
         "unknown field event; known are user_id, history, k, exclude_seen, filter, blocked, allowed, now"),
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


def test_health_and_documentation(client):
    assert client.get("/healthz").json() == {"status": "ok", "system": "none", "items": 5, "users": 3, "version": 1}
    api = client.get("/openapi.json").json()
    assert {"/recommend", "/healthz"} <= set(api["paths"])
    assert api["components"]["schemas"]["Request"]["examples"][0] == {"user_id": "123", "k": 10}
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


def test_a_real_server_on_a_free_port(retriever):
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(retriever), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/recommend"
            body = json.dumps({"history": [{"item_id": "a"}], "k": 2}).encode()
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert [item["item_id"] for item in json.load(answer)["items"]] == ["b", "c"]
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def test_addresses():
    assert parse_address("127.0.0.1:8080") == ("127.0.0.1", 8080)
    assert parse_address(":80") == ("127.0.0.1", 80) and parse_address("8080") == ("127.0.0.1", 8080)
    assert parse_address("[::1]:9") == ("::1", 9)
    for wrong in ("localhost", "a:b", "a:99999", "", "a:-1"):
        with pytest.raises(UserError, match="give HOST:PORT"):
            parse_address(wrong)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UserError, match="can't be listened on"):
        listen("127.0.0.1", other.getsockname()[1])
