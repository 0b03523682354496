"""Answers requests with trained runs: a file of them, or over HTTP.

    python serve.py runs/demo --requests in.jsonl --out out.jsonl
    python serve.py runs/demo --http 127.0.0.1:8080
    python serve.py runs/recommend runs/search runs/suggest --http 127.0.0.1:8080

A request is a JSON object: {"user_id": "123"} for a user of the run, or {"history": [{"item_id": "7"}]} for anybody
else; with "k" (default 10) and "exclude_history" if wanted. Several runs are served over HTTP, each for what it can
answer; where two could, say which one is asked: search=runs/a.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxrec.config import UserError
from jaxrec.console import console, report_user_errors

FOR_HTTP = ("max_waiting", "max_body", "timeout", "drain", "token_file", "origins", "log", "alone")
"""Arguments that are for --http alone."""
LEAST = {"max_waiting": 1, "batch_size": 1, "timeout": 0.001, "drain": 0}
MOST_BODY = 1 << 20


@dataclass(frozen=True)
class Arguments:
    run: Annotated[tuple[str, ...], tyro.conf.Positional]
    """the run directory, as given to train.py --run; with --http several, of different systems"""
    requests: Path | None = None
    """file with one request (JSON) a line"""
    out: Path | None = None
    """file for the answers, one a line in the same order; a killed run goes on from what is in OUT.partial"""
    restart: bool = False
    """with --requests: throw OUT.partial away and begin again"""
    batch_size: int | None = None
    """requests that are decoded together; default with --requests: decoding.batch_size of the run; with --http the
    same, on CPU 1"""
    window: int | None = None
    """with --requests: lines that are sorted into batches together; default: 4096"""
    http: str | None = None
    """HOST:PORT to serve on instead, such as 127.0.0.1:8080; other machines have to send a token"""
    max_waiting: int | None = None
    """with --http: requests of a run that may wait for their answer, more get status 503; default: 64"""
    max_body: float | None = None
    """with --http: MiB that the body of a request may have; default: 16"""
    timeout: float | None = None
    """with --http: seconds that an answer may take, later ones get status 504; default: as each request says"""
    drain: float | None = None
    """with --http: seconds that requests in progress have when the server is ended; default: 10"""
    alone: bool = False
    """with --http: decode a request that is alone by itself: sooner, but scores may differ in the last digits from
    those of the same request among others"""
    token_file: Path | None = None
    """with --http: file with the token that clients send as Authorization: Bearer TOKEN; default: $JAXREC_TOKEN"""
    origins: tuple[str, ...] = ()
    """with --http: origins of web pages whose scripts may ask, such as https://shop.example; default: none"""
    log: Path | None = None
    """with --http: file for one JSON line a request, without personal data; - for stderr; default: none"""


def main(arguments: Arguments) -> None:
    check(arguments)
    # Imported here: --help and a wrong command line should not wait for JAX.
    from jaxrec.programs import keep_compiled_programs

    keep_compiled_programs()
    if arguments.http is None:
        answer_requests(arguments)
    else:
        answer_http(arguments)


def check(arguments: Arguments) -> None:
    """Whether the arguments go together.

    Raises:
      UserError: they don't.
    """
    if not arguments.run:
        raise UserError("give a run directory, as in serve.py runs/demo --http 127.0.0.1:8080")
    if (arguments.http is None) == (arguments.requests is None):
        raise UserError("give either --requests IN.jsonl with --out OUT.jsonl, or --http HOST:PORT")
    if (arguments.requests is None) != (arguments.out is None):
        raise UserError("--requests and --out go together; give both")
    if arguments.http is not None and (arguments.restart or arguments.window):
        raise UserError("--restart and --window are for --requests; leave them out with --http")
    if arguments.http is None and (given := [name for name in FOR_HTTP if getattr(arguments, name)]):
        flag = "--" + given[0].replace("_", "-")
        raise UserError(f"{flag} is for --http; leave it out with --requests")
    if arguments.http is None and len(arguments.run) > 1:
        raise UserError("--requests are answered by one run; give one, or --http for several")
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value < 1 << 31:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number of {least:g} or more")
    if arguments.max_body is not None and not 0 < arguments.max_body < MOST_BODY:
        raise UserError(f"--max-body {arguments.max_body}: give MiB above 0, such as 16")


def answer_requests(arguments: Arguments) -> None:
    """Answers a file."""
    from jaxrec.serving.batch import WINDOW_LINES, answer_file
    from jaxrec.serving.retriever import Retriever

    retriever = Retriever(Path(arguments.run[0]), batch_size=arguments.batch_size)
    window = WINDOW_LINES if arguments.window is None else arguments.window
    summary = answer_file(retriever, arguments.requests, arguments.out, restart=arguments.restart, window_lines=window)
    resumed = f" ({summary.resumed:,} before this run was stopped)" if summary.resumed else ""
    console.print(
        f"{summary.answered:,} answered ({summary.popular:,} with popular items), {summary.bad:,} bad lines{resumed}; "
        f"written to {arguments.out}"
    )


def answer_http(arguments: Arguments) -> None:
    """Serves until interrupted."""
    from jaxrec.serving.access import read_tokens
    from jaxrec.serving.http import Limits, bind, check_access, parse_address, serve
    from jaxrec.serving.lanes import NamedRun, make_lanes
    from jaxrec.serving.retriever import Retriever
    from jaxrec.serving.watch import log_requests

    tokens = read_tokens(arguments.token_file)
    bind(*parse_address(arguments.http)).close()  # an address that can't be had is refused before a model loads
    check_access(arguments.http, tokens)
    log_requests(arguments.log)
    given = {
        "waiting": arguments.max_waiting,
        "body": None if arguments.max_body is None else max(1, int(arguments.max_body * 2**20)),
        "answer_seconds": arguments.timeout,
        "drain_seconds": arguments.drain,
    }
    limits = dataclasses.replace(Limits(), **{name: value for name, value in given.items() if value is not None})
    runs = [NamedRun.parse(text) for text in arguments.run]
    retrievers = [Retriever(run.path) for run in runs]
    lanes = make_lanes(retrievers, [run.route for run in runs], together=arguments.batch_size, alone=arguments.alone)
    serve(lanes, arguments.http, limits, tokens=tokens, origins=arguments.origins)


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.exit(report_user_errors(lambda: main(arguments)))
