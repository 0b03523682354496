"""Answers requests with a trained run: a file of them, or over HTTP.

    python serve.py runs/demo --requests in.jsonl --out out.jsonl
    python serve.py runs/demo --http 127.0.0.1:8080

A request is a JSON object: {"user_id": "123"} for a user of the run, or {"history": [{"item_id": "7"}]} for anybody
else; with "k" (default 10) and "exclude_history" if wanted.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxrec.config import UserError
from jaxrec.console import console, report_user_errors


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """the run directory, as given to train.py --run"""
    requests: Path | None = None
    """file with one request (JSON) a line"""
    out: Path | None = None
    """file for the answers, one a line in the same order; a killed run goes on from what is in OUT.partial"""
    restart: bool = False
    """with --requests: throw OUT.partial away and begin again"""
    batch_size: int | None = None
    """with --requests: requests that are decoded together; default: decoding.batch_size of the run"""
    window: int | None = None
    """with --requests: lines that are sorted into batches together; default: 4096"""
    http: str | None = None
    """HOST:PORT to serve on instead, such as 127.0.0.1:8080"""
    max_waiting: int | None = None
    """with --http: requests that may wait for their answer, more get status 503; default: 64"""
    max_body: float | None = None
    """with --http: MiB that the body of a request may have; default: 16"""


def main(arguments: Arguments) -> None:
    if (arguments.http is None) == (arguments.requests is None):
        raise UserError("give either --requests IN.jsonl with --out OUT.jsonl, or --http HOST:PORT")
    if (arguments.requests is None) != (arguments.out is None):
        raise UserError("--requests and --out go together; give both")
    if arguments.http is not None and (arguments.restart or arguments.batch_size or arguments.window):
        raise UserError("--restart, --batch-size and --window are for --requests; leave them out with --http")
    if arguments.http is None and (arguments.max_waiting is not None or arguments.max_body is not None):
        raise UserError("--max-waiting and --max-body are for --http; leave them out with --requests")
    if arguments.max_waiting is not None and arguments.max_waiting < 1:
        raise UserError(f"--max-waiting {arguments.max_waiting}: give a number of 1 or more")
    if arguments.max_body is not None and not 0 < arguments.max_body < 1 << 20:
        raise UserError(f"--max-body {arguments.max_body}: give MiB above 0, such as 16")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: give a number of 1 or more")
    # Imported here: --help and a wrong command line should not wait for JAX.
    from jaxrec.programs import keep_compiled_programs
    from jaxrec.serving.batch import WINDOW_LINES, answer_file
    from jaxrec.serving.http import Limits, bind, parse_address, serve
    from jaxrec.serving.retriever import Retriever

    keep_compiled_programs()
    if arguments.http is not None:
        bind(*parse_address(arguments.http)).close()  # an address that can't be had is refused before the model loads
        limits = Limits()
        if arguments.max_waiting is not None:
            limits = dataclasses.replace(limits, waiting=arguments.max_waiting)
        if arguments.max_body is not None:
            limits = dataclasses.replace(limits, body=max(1, int(arguments.max_body * 2**20)))
        serve(Retriever(arguments.run), arguments.http, limits)
        return
    retriever = Retriever(arguments.run, batch_size=arguments.batch_size)
    window = WINDOW_LINES if arguments.window is None else arguments.window
    summary = answer_file(retriever, arguments.requests, arguments.out, restart=arguments.restart, window_lines=window)
    resumed = f" ({summary.resumed:,} before this run was stopped)" if summary.resumed else ""
    console.print(
        f"{summary.answered:,} answered ({summary.popular:,} with popular items), {summary.bad:,} bad lines{resumed}; "
        f"written to {arguments.out}"
    )


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.exit(report_user_errors(lambda: main(arguments)))
