"""The JSON API: POST /recommend and /search, GET /healthz and /readyz, and the OpenAPI pages at /docs.

Refused requests are answered with {"error": one sentence}. The event loop only accepts requests; a few threads parse
and answer them, so that /healthz never waits for the model.
"""

import asyncio
import ipaddress
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Answer, NoJsonError, Request, SearchRequest, parse_request

THREADS = 4
"""Answering threads: while one runs the model, the others parse, look up histories and write."""
RETRY_AFTER = "1"
"""Seconds after which a rejected client may retry."""
DRAINED = 4
"""A body that is too long is read up to this multiple of the limit, so that the client can read the answer."""
SCHEMAS = "#/components/schemas/"


@dataclass(frozen=True)
class Limits:
    """Limits of the server's load."""

    waiting: int = 64
    """requests in progress or waiting; further ones are rejected with status 503"""
    arriving: int = 256
    """requests whose body is being received, or `waiting` if larger; further ones are rejected with status 503"""
    body: int = 16 << 20
    """bytes of a body; a history of 100,000 events has about 8 MB"""
    body_seconds: float = 30.0
    """for the whole body to arrive"""


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


class Ready(BaseModel):
    """Requests are answered at once."""

    status: str


class Queue:
    """Counts requests up to a limit; used by the event loop only."""

    def __init__(self, limit: int, state: str):
        self.limit, self.inside = limit, 0
        self.state = state
        """the state of counted requests, for the message"""

    def check(self) -> None:
        """Raises HTTPException 503 if the limit is reached."""
        if self.inside >= self.limit:
            message = f"{self.limit} requests are {self.state} already; try again in a second"
            raise HTTPException(503, message, {"Retry-After": RETRY_AFTER})

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place; raises HTTPException 503 if the limit is reached."""
        self.check()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def create_app(retriever: Retriever, limits: Limits | None = None) -> FastAPI:
    """The application of a retriever; the model runs one request at a time."""
    app = FastAPI(title="jaxrec", description="Generative retrieval: what is this shopper likely to take next?")
    limits = limits or Limits()
    queue, arriving = Queue(limits.waiting, "waiting"), Queue(max(limits.arriving, limits.waiting), "arriving")
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="requests")
    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 408, 413, 422, 503)}

    async def answered(http: HttpRequest, kind: type[Request]) -> Response:
        queue.check()  # before the body is read
        with arriving.place():
            text = await read_body(http, limits)
        with queue.place():
            wanted = "items" if kind is SearchRequest else None
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(threads, answer_body, retriever, text, kind, wanted)

    @app.post("/recommend", response_model=Answer, responses=problems, openapi_extra=_body_of(Request))
    async def recommend(http: HttpRequest) -> Response:
        """Items for a known user or for a history given in the request, best first."""
        return await answered(http, Request)

    @app.post("/search", response_model=Answer, responses=problems, openapi_extra=_body_of(SearchRequest))
    async def search(http: HttpRequest) -> Response:
        """Items for a query, and for the user who asks, best first; of a run whose model reads queries."""
        return await answered(http, SearchRequest)

    @app.get("/suggest", response_model=Answer, responses=problems)
    async def suggest(prefix: str = "", user_id: str | None = None, k: str = "10", mode: str | None = None) -> Response:
        """Whole queries for what was typed so far, best first; of a run that answers with texts."""
        given = {"prefix": prefix, "k": int(k) if k.isdecimal() and len(k) < 10 else k}
        given |= {"history": []} if user_id is None else {"user_id": user_id}
        given |= {} if mode is None else {"mode": mode}
        queue.check()
        with queue.place():
            body = json.dumps(given).encode()
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(threads, answer_body, retriever, body, Request, "texts")

    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the server is up, with the run and version; never waits for the model."""
        version = retriever.catalogue.current
        sizes = {"items": len(version.popular), "users": len(retriever.user_index)}
        return Health(status="ok", system=retriever.system, version=version.number, **sizes)

    @app.get("/readyz", responses={503: {"model": Problem}})
    async def readyz() -> Ready:
        """Whether the next request is answered at once: everything is compiled, and there is room for it."""
        if not retriever.ready:
            raise HTTPException(503, "programs are not compiled yet", {"Retry-After": RETRY_AFTER})
        arriving.check()
        queue.check()
        return Ready(status="ready")

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> JSONResponse:
        sentences = {
            404: f"there is no {http.url.path[:100]}; /docs lists what there is",
            405: f"{http.url.path} takes {(error.headers or {}).get('Allow')}, not {http.method[:20]}",
        }
        return JSONResponse({"error": sentences.get(error.status_code, error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"the server failed ({type(error).__name__}); its log says why"}, 500)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = {"title": app.title, "version": app.version, "description": app.description}
            app.openapi_schema = get_openapi(routes=app.routes, **described)
            for kind in (Request, SearchRequest):
                schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
                parts = schema.pop("$defs")
                app.openapi_schema["components"]["schemas"] |= {**parts, kind.__name__: schema}
        return app.openapi_schema

    app.openapi = openapi
    return app


def _body_of(kind: type[Request]) -> dict[str, Any]:
    """The body of a route in the OpenAPI description."""
    content = {"application/json": {"schema": {"$ref": SCHEMAS + kind.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


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


def answer_body(
    retriever: Retriever, body: bytes, kind: type[Request] = Request, wanted: str | None = None
) -> Response:
    """The response to a body that is a request of this kind: an answer or an error.

    wanted: "items" or "texts", where only a run that answers with these is asked.
    """
    try:
        given = "items" if retriever.catalogue.current.texts is None else "texts"
        if wanted not in (None, given):
            place = "/recommend or /search" if given == "items" else "/suggest"
            raise UserError(f"this run answers with {given}, not with {wanted}; ask {place}")
        if not body:
            raise UserError("the request has no body")
        (answer,) = retriever.answer([parse_request(body, kind)])
        if isinstance(answer, UserError):
            raise answer
    except UserError as error:
        return JSONResponse({"error": str(error)}, 400 if isinstance(error, NoJsonError) else 422)
    return Response(answer.to_json(), media_type="application/json")


def serve(retriever: Retriever, address: str, limits: Limits | None = None) -> None:
    """Warms the retriever up, then opens the port and serves until interrupted.

    Raises:
      UserError: `address` is no HOST:PORT, or can't be listened on.
    """
    host, port = parse_address(address)
    with bind(host, port) as bound:
        if not retriever.ready:
            retriever.warm_up()
        shown = f"[{host}]" if ":" in host else host
        notes = [f"serving on http://{shown}:{bound.getsockname()[1]}, API at /docs; Ctrl-C ends it"]
        if not _is_loopback(host):
            notes.append("this address is open to other machines, and nobody has to log in")
        listen(bound, address)
        _Server(uvicorn.Config(create_app(retriever, limits), log_level="warning"), notes).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Prints notes once it accepts requests."""

    def __init__(self, config: uvicorn.Config, notes: list[str]):
        super().__init__(config)
        self.notes = notes

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for note in self.notes if self.started else ():
            console.print(note)


def parse_address(address: str) -> tuple[str, int]:
    """("127.0.0.1", 8080) from "127.0.0.1:8080", ":8080" or "8080": without a host only this machine can connect.

    Raises:
      UserError: there is no port, or it is not a number up to 65535.
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise UserError(f"--http {address}: give HOST:PORT with a port up to 65535, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet: it reserves the address, and clients can't connect until `listen`.

    Raises:
      UserError: the host is unknown or no host name, or the port is in use or not allowed.
    """
    with _refusing(f"{host}:{port}"):
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger on the port
            bound.bind(place)
            # Linux binds several sockets with this option to one address until one of them listens. So listening for a
            # moment detects another socket, and clearing the option excludes later ones.
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(bound.getsockname())
                probe.listen()
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError:
            bound.close()
            raise
    return bound


def listen(bound: socket.socket, address: str) -> None:
    """Opens the port reserved by `bind`.

    Raises:
      UserError: another socket listens there.
    """
    with _refusing(address):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as in `bind`
        bound.listen()


@contextmanager
def _refusing(address: str) -> Iterator[None]:
    """Turns the system's errors about an address into a UserError."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty label, or one of more than 63 characters
        reason = "that is no host name" if isinstance(error, UnicodeError) else error.strerror
        raise UserError(f"--http {address} can't be listened on: {reason}; give another address") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
