"""The JSON API: POST /recommend, GET /healthz, and the OpenAPI pages at /docs."""

import ipaddress
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from jaxrec.config import UserError
from jaxrec.run import console
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Answer, Request, explain


class Problem(BaseModel):
    """What is wrong with a request, in one sentence."""

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


def create_app(retriever: Retriever) -> FastAPI:
    """The application around a retriever. Requests run in threads; the retriever lets one at a time into the model."""
    app = FastAPI(title="jaxrec", description="Generative retrieval: what is this shopper likely to take next?")
    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 422)}

    @app.post("/recommend", responses=problems, response_model_exclude_none=True)
    def recommend(request: Request) -> Answer:
        """Items for a known user or for a history given in the request, best first."""
        (answer,) = retriever.answer([request])
        if isinstance(answer, UserError):
            raise HTTPException(422, str(answer))
        return answer

    @app.get("/healthz")
    def healthz() -> Health:
        """Whether the server is up, and what it serves."""
        version = retriever.catalogue.current
        sizes = {"items": len(version.popular), "users": len(retriever.user_index)}
        return Health(status="ok", system=retriever.system, version=version.number, **sizes)

    @app.exception_handler(RequestValidationError)
    def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        errors = list(error.errors())
        return JSONResponse({"error": explain(errors)}, 400 if errors[0]["type"] == "json_invalid" else 422)

    @app.exception_handler(HTTPException)
    def refused(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    return app


def serve(retriever: Retriever, address: str) -> None:
    """Serves until interrupted.

    Raises:
      UserError: `address` is no HOST:PORT, or can't be listened on.
    """
    host, port = parse_address(address)
    with listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        console.print(f"serving on http://{shown}:{listener.getsockname()[1]}, API at /docs; Ctrl-C ends it")
        if not _is_loopback(host):
            console.print("this address is open to other machines, and nobody has to log in")
        uvicorn.Server(uvicorn.Config(create_app(retriever), log_level="warning")).run(sockets=[listener])


def parse_address(address: str) -> tuple[str, int]:
    """("127.0.0.1", 8080) from "127.0.0.1:8080", ":8080" or "8080": without a host only this machine can connect.

    Raises:
      UserError: there is no port, or it is no number up to 65535.
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise UserError(f"--http {address}: give HOST:PORT with a port up to 65535, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; made before uvicorn starts, which would end the process where the port is taken.

    Raises:
      UserError: the host is unknown, or the port is taken or not allowed.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"--http {host}:{port} can't be listened on: {error.strerror}; give another address") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
