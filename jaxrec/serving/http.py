"""The JSON API: POST /recommend, /search and /suggest, GET /suggest, /healthz, /readyz and /metrics, pages at /docs.

Refused requests are answered with {"error": one sentence}. The event loop only accepts requests; a few threads parse
them and write answers, and one thread calls the model with what waits (`jaxrec.serving.scheduler`), so that /healthz
never waits for the model.
"""

import asyncio
import functools
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.serving.access import VARIABLE, TokenGate
from jaxrec.serving.address import bind, is_loopback, listen, parse_address
from jaxrec.serving.lanes import Lane, make_lanes
from jaxrec.serving.retriever import Prepared, Retriever
from jaxrec.serving.scheduler import (
    BATCH,
    KEYSTROKE,
    PAGE,
    Pacing,
    Places,
    QueueFullError,
    Scheduler,
    ShuttingDownError,
    Ticket,
    TooLateError,
)
from jaxrec.serving.schema import Answer, NoJsonError, Request, SearchRequest, parse_request
from jaxrec.serving.watch import Passage, ServingMetrics

THREADS = 4
"""Threads of the host's part: while one thread calls the model, these parse, look up histories and write."""
RETRY_AFTER = "1"
"""Seconds after which a rejected client may retry."""
DRAINED = 4
"""A body that is too long is read up to this multiple of the limit, so that the client can read the answer."""
SCHEMAS = "#/components/schemas/"
GONE = 499
"""The status that is counted for a client that left; nobody is told it."""
NAMES = random.Random()
"""Of the names of requests, which are no secret; it makes no system call, for which threads would wait."""
WANTED = {"search": "items", "suggest": "texts"}
"""What a route answers with; /recommend: either."""


@dataclass(frozen=True)
class Limits:
    """Limits of the server's load."""

    waiting: int = 64
    """requests of a lane in progress or waiting; further ones are rejected with status 503"""
    arriving: int = 256
    """requests whose body is being received, or `waiting` if larger; further ones are rejected with status 503"""
    body: int = 16 << 20
    """bytes of a body; a history of 100,000 events has about 8 MB"""
    body_seconds: float = 30.0
    """for the whole body to arrive"""
    answer_seconds: float | None = None
    """for an answer, of a request without `timeout_ms` or with a longer one; then it gets status 504. None: no limit"""
    drain_seconds: float = 10.0
    """that requests in progress have when the server is ended; then they get status 503"""


class Problem(BaseModel):
    """The error of a request, in one sentence."""

    error: str


class Health(BaseModel):
    """The run behind this server."""

    status: str
    system: str
    items: int
    """that can be recommended"""
    users: int
    version: int
    """of the catalogue"""


class HealthOfLanes(BaseModel):
    """The runs behind this server, by lane."""

    status: str
    lanes: dict[str, Health]


class Ready(BaseModel):
    """Requests are answered at once."""

    status: str


class ClientGoneError(Exception):
    """The client closed its connection."""


class Front:
    """Takes requests through the lanes of a server."""

    def __init__(self, lanes: Sequence[Lane], limits: Limits, pacing: Pacing | None = None):
        self.lanes, self.limits = {lane.name: lane for lane in lanes}, limits
        self.by_route = {route: lane for lane in lanes for route in lane.routes}
        self.metrics = ServingMetrics(lanes)
        workers = {lane.name: lane.worker for lane in lanes}
        self.scheduler = Scheduler(workers, pacing, observe=self.metrics.call_ended)
        self.metrics.watch_queue(self.scheduler)
        self.places = {lane.name: Places(limits.waiting, "waiting") for lane in lanes}
        self.arriving = Places(max(limits.arriving, limits.waiting), "arriving")
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="requests")
        self.draining = False

    def check_ready(self, name: str) -> None:
        """Whether the next request of a lane is answered at once.

        Raises:
          HTTPException: 503, it isn't.
        """
        if self.draining:
            raise _unavailable("the server is shutting down; ask another one")
        if not self.lanes[name].ready:
            raise _unavailable("programs are not compiled yet")
        try:
            self.arriving.check()
            self.places[name].check()
        except QueueFullError as error:
            raise _unavailable(str(error)) from error

    def drain(self) -> None:
        """Begins to end: no further requests; those in progress have `drain_seconds`."""
        if not self.draining:
            self.draining = True
            timer = threading.Timer(self.limits.drain_seconds, self.scheduler.close, (0.0,))
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        """Ends; what still waits is turned away."""
        self.draining = True
        self.scheduler.close(0.0)
        self.threads.shutdown(wait=False)

    async def answer(
        self, http: HttpRequest, route: str, kind: type[Request] = Request, body: bytes | None = None
    ) -> Response:
        """The response to a request of this kind; body: None reads it."""
        if (lane := self.by_route.get(route)) is None:
            raise HTTPException(404, f"no run of this server can {route}; it can {' and '.join(self.by_route)}")
        passage = Passage(route, lane.name, f"{NAMES.getrandbits(64):016x}")
        begin = time.monotonic()
        try:
            if self.draining:
                raise ShuttingDownError("the server is shutting down; ask another one")
            self.places[lane.name].check()  # before the body is read
            if body is None:
                with self.arriving.place():
                    body = await read_body(http, self.limits)
            begin = time.monotonic()
            with self.places[lane.name].place():
                response = await self._through(http, lane, body, kind, passage)
        except (QueueFullError, ShuttingDownError) as error:
            response = _problem(503, str(error), {"Retry-After": RETRY_AFTER})
        except TooLateError as error:
            response = _problem(504, str(error))
        except UserError as error:
            response = _problem(400 if isinstance(error, NoJsonError) else 422, str(error))
        except HTTPException as error:
            response = _problem(error.status_code, error.detail, error.headers)
        except ClientGoneError:
            response = Response(status_code=GONE)
        except asyncio.CancelledError:
            self._count(passage, GONE, begin)
            raise
        except Exception:
            self._count(passage, 500, begin)
            raise
        self._count(passage, response.status_code, begin)
        response.headers["X-Request-Id"] = passage.number
        return response

    def _count(self, passage: Passage, status: int, begin: float) -> None:
        passage.status, passage.seconds["total"] = status, time.monotonic() - begin
        self.metrics.passed(passage)

    async def _through(
        self, http: HttpRequest, lane: Lane, body: bytes, kind: type[Request], passage: Passage
    ) -> Response:
        """Parsing, waiting, searching, writing."""
        begin = time.monotonic()
        prepared = await self._host(prepare_body, lane.retriever, body, kind, WANTED.get(passage.route))
        passage.seconds["prepare"] = time.monotonic() - begin
        passage.k, passage.version = prepared.request.k, prepared.version.number
        found = None
        if isinstance(prepared.answer, UserError):
            raise prepared.answer
        if prepared.answer is None:
            found = await self._search(http, lane, prepared, begin, passage)
        wrote = time.monotonic()
        text, passage.source = await self._host(write_answer, lane.retriever, prepared, found)
        passage.seconds["write"] = time.monotonic() - wrote
        return Response(text, media_type="application/json")

    async def _search(self, http: HttpRequest, lane: Lane, prepared: Prepared, begin: float, passage: Passage) -> Any:
        """Waits for the call of a request.

        Raises:
          TooLateError, QueueFullError, ShuttingDownError, ClientGoneError: it gets none.
        """
        request = prepared.request
        given = [self.limits.answer_seconds, None if request.timeout_ms is None else request.timeout_ms / 1e3]
        seconds = min((each for each in given if each is not None), default=None)
        priority = KEYSTROKE if passage.route == "suggest" else PAGE
        if request.priority == "batch":
            self.places[lane.name].check_half()
            priority = BATCH
        deadline = None if seconds is None else begin + seconds
        ticket = self.scheduler.submit(lane.name, prepared, prepared.kind, priority=priority, deadline=deadline)
        try:
            return await _first(http, ticket, deadline)
        except TooLateError as error:
            message = f"the answer was not ready within {1e3 * seconds:.0f} ms; allow more (timeout_ms), or ask later"
            raise TooLateError(message) from error
        finally:
            ended, called = time.monotonic(), ticket.called
            passage.seconds["wait"] = (ended if called is None else called) - ticket.arrived
            if called is not None:
                passage.seconds["search"], passage.together = ended - called, ticket.together

    async def _host(self, function: Callable, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, functools.partial(function, *arguments))


async def _first(http: HttpRequest, ticket: Ticket, deadline: float | None) -> Any:
    """The result of a ticket, unless its deadline passes or its client leaves before; it is then cancelled."""
    result, gone = asyncio.wrap_future(ticket.result), asyncio.ensure_future(_disconnected(http))
    try:
        left = None if deadline is None else deadline - time.monotonic()
        await asyncio.wait({result, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        if gone.done():
            raise ClientGoneError
        raise TooLateError
    finally:
        result.cancel()
        gone.cancel()


async def _disconnected(http: HttpRequest) -> None:
    """Returns when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def prepare_body(retriever: Retriever, body: bytes, kind: type[Request], wanted: str | None) -> Prepared:
    """A body that is a request of this kind, as far as it goes without the model.

    wanted: "items" or "texts", where only a run that answers with these is asked.

    Raises:
      UserError: it is none, or of another run.
    """
    given = "items" if retriever.catalogue.current.texts is None else "texts"
    if wanted not in (None, given):
        place = "/recommend or /search" if given == "items" else "/suggest"
        raise UserError(f"this run answers with {given}, not with {wanted}; ask {place}")
    if not body:
        raise UserError("the request has no body")
    return retriever.prepare(parse_request(body, kind))


def write_answer(retriever: Retriever, prepared: Prepared, found: Any) -> tuple[str, str]:
    """(an answer as JSON, its source); found: what the model found, None where it was not asked."""
    answer = prepared.answer if found is None else retriever.finish(prepared, found)
    return answer.to_json(), answer.source


def create_app(
    served: Retriever | Sequence[Lane],
    limits: Limits | None = None,
    *,
    tokens: Sequence[str] = (),
    origins: Sequence[str] = (),
    pacing: Pacing | None = None,
) -> FastAPI:
    """The application of a retriever or of several lanes; the model answers one call at a time.

    Args:
      served: a retriever has every route.
      tokens: one of them has to come with each request, but those of /healthz and /readyz; none: anybody may ask.
      origins: of web pages whose scripts may ask, such as https://shop.example (CORS); none by default.
      pacing: how long requests wait for others.
    """
    lanes = make_lanes([served]) if isinstance(served, Retriever) else served
    front = Front(lanes, limits or Limits(), pacing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        front.close()

    description = "Generative retrieval: what is this shopper likely to take next?"
    app = FastAPI(title="jaxrec", description=description, lifespan=lifespan)
    app.state.front = front
    _add_questions(app, front)
    _add_watching(app, front)
    _add_problems(app)
    if tokens:
        app.add_middleware(TokenGate, tokens=tokens)
    if origins:
        headers, methods = ["Authorization", "Content-Type"], ["GET", "POST"]
        # Outside of the gate: browsers ask for permission without a token.
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_headers=headers, allow_methods=methods)
    app.openapi = functools.partial(_describe, app)
    return app


def _add_questions(app: FastAPI, front: Front) -> None:
    """The routes that a run answers."""
    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 408, 413, 422, 503, 504)}

    @app.post("/recommend", response_model=Answer, responses=problems, openapi_extra=_body_of(Request))
    async def recommend(http: HttpRequest) -> Response:
        """Items for a known user or for a history given in the request, best first."""
        return await front.answer(http, "recommend")

    @app.post("/search", response_model=Answer, responses=problems, openapi_extra=_body_of(SearchRequest))
    async def search(http: HttpRequest) -> Response:
        """Items for a query, and for the user who asks, best first; of a run whose model reads queries."""
        return await front.answer(http, "search", SearchRequest)

    @app.post("/suggest", response_model=Answer, responses=problems, openapi_extra=_body_of(Request))
    async def suggest_to(http: HttpRequest) -> Response:
        """Whole queries for a prefix, and for the user or the history of the request, best first."""
        return await front.answer(http, "suggest")

    @app.get("/suggest", response_model=Answer, responses=problems)
    async def suggest(
        http: HttpRequest,
        prefix: str = "",
        user_id: str | None = None,
        k: str = "10",
        mode: str | None = None,
        timeout_ms: str | None = None,
    ) -> Response:
        """Whole queries for what was typed so far, best first; of a run that answers with texts."""
        given = {"prefix": prefix, "k": _number(k)}
        given |= {"history": []} if user_id is None else {"user_id": user_id}
        given |= {} if mode is None else {"mode": mode}
        given |= {} if timeout_ms is None else {"timeout_ms": _number(timeout_ms)}
        return await front.answer(http, "suggest", body=json.dumps(given).encode())


def _add_watching(app: FastAPI, front: Front) -> None:
    """The routes of those who watch the server."""

    def health_of(lane: Lane) -> Health:
        version = lane.retriever.catalogue.current
        sizes = {"items": len(version.popular), "users": len(lane.retriever.user_index)}
        return Health(status="ok", system=lane.retriever.system, version=version.number, **sizes)

    @app.get("/healthz")
    async def healthz() -> Health | HealthOfLanes:
        """Whether the server is up, with the run and version; never waits for the model."""
        each = {name: health_of(lane) for name, lane in front.lanes.items()}
        return next(iter(each.values())) if len(each) == 1 else HealthOfLanes(status="ok", lanes=each)

    @app.get("/readyz", responses={503: {"model": Problem}})
    async def readyz() -> Ready:
        """Whether the next request is answered at once: everything is compiled, and there is room for it."""
        for name in front.lanes:
            front.check_ready(name)
        return Ready(status="ready")

    @app.get("/readyz/{lane}", responses={503: {"model": Problem}, 404: {"model": Problem}})
    async def readyz_of(lane: str) -> Ready:
        """The same of one lane."""
        if lane not in front.lanes:
            raise HTTPException(404, f"there is no lane {lane[:100]!r}; there are {', '.join(front.lanes)}")
        front.check_ready(lane)
        return Ready(status="ready")

    @app.get("/metrics")
    async def metrics() -> Response:
        """The metrics of the server, as Prometheus reads them."""
        return Response(front.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_problems(app: FastAPI) -> None:
    """One shape of errors."""

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> JSONResponse:
        sentences = {
            404: f"there is no {http.url.path[:100]}; /docs lists what there is",
            405: f"{http.url.path} takes {(error.headers or {}).get('Allow')}, not {http.method[:20]}",
        }
        known = error.detail in ("Not Found", "Method Not Allowed")
        return _problem(error.status_code, sentences[error.status_code] if known else error.detail, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        return _problem(500, f"the server failed ({type(error).__name__}); its log says why")


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description."""
    if app.openapi_schema is None:
        described = {"title": app.title, "version": app.version, "description": app.description}
        app.openapi_schema = get_openapi(routes=app.routes, **described)
        for kind in (Request, SearchRequest):
            schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
            parts = schema.pop("$defs")
            app.openapi_schema["components"]["schemas"] |= {**parts, kind.__name__: schema}
    return app.openapi_schema


def _body_of(kind: type[Request]) -> dict[str, Any]:
    """The body of a route in the OpenAPI description."""
    content = {"application/json": {"schema": {"$ref": SCHEMAS + kind.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


def _problem(status: int, sentence: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


def _unavailable(sentence: str) -> HTTPException:
    return HTTPException(503, sentence, {"Retry-After": RETRY_AFTER})


def _number(text: str) -> int | str:
    """A parameter as a number, where it is one; else as it is, to be refused with the others."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


async def read_body(http: HttpRequest, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
      HTTPException: the body is too long or too slow, or the client is gone.
    """
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in http.stream():
                size += len(chunk)
                if size <= limits.body:
                    chunks.append(chunk)
                elif size > DRAINED * limits.body:
                    break
    except TimeoutError as error:
        message = f"the body took more than {limits.body_seconds:g} seconds to arrive"
        raise HTTPException(408, message, {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the connection was closed before the body was complete") from error
    if size > limits.body:
        message = f"the body has more than {limits.body:,} bytes; send less at a time"
        raise HTTPException(413, message, {"Connection": "close"})
    return b"".join(chunks)


def check_access(address: str, tokens: Sequence[str]) -> None:
    """Whether an address may be served.

    Raises:
      UserError: it is no HOST:PORT, or other machines can connect and there is no token.
    """
    if not tokens and not is_loopback(parse_address(address)[0]):
        raise UserError(
            f"--http {address} is open to other machines: give a token with --token-file or in {VARIABLE}, or listen "
            "on 127.0.0.1"
        )


def serve(
    served: Retriever | Sequence[Lane],
    address: str,
    limits: Limits | None = None,
    *,
    tokens: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> None:
    """Warms every lane up, then opens the port and serves until interrupted; arguments as `create_app`.

    Raises:
      UserError: `address` is no HOST:PORT, can't be listened on, or is open to others without a token.
    """
    check_access(address, tokens)
    host, port = parse_address(address)
    lanes, limits = make_lanes([served]) if isinstance(served, Retriever) else served, limits or Limits()
    with bind(host, port) as bound:
        for lane in lanes:
            if not lane.ready:
                lane.warm_up()
        shown = f"[{host}]" if ":" in host else host
        note = f"serving on http://{shown}:{bound.getsockname()[1]}, API at /docs; Ctrl-C ends it"
        listen(bound, address)
        app = create_app(lanes, limits, tokens=tokens, origins=origins)
        # Those in progress are answered with 503 before uvicorn would cut them off.
        graceful = int(limits.drain_seconds) + 2
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=graceful)
        _Server(config, app.state.front, note).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Prints a note once it accepts requests; told to end, it turns further ones away and answers those it has."""

    def __init__(self, config: uvicorn.Config, front: Front, note: str):
        super().__init__(config)
        self.front, self.note = front, note

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            console.print(self.note)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.front.drain()
        super().handle_exit(sig, frame)
