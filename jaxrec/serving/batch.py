"""Batch inference: a file of requests in, a file of answers out, line by line."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from jaxrec.config import UserError
from jaxrec.run import progress, writing
from jaxrec.serving.retriever import BATCH_SIZES, Retriever
from jaxrec.serving.schema import Request, parse_request

LINES_AT_ONCE = 4 * BATCH_SIZES[-1]


@dataclass(frozen=True)
class Summary:
    """What became of the lines of a request file."""

    answered: int
    """Lines answered, `popular` among them."""
    popular: int
    """Lines answered with popular items, because nothing is known about the user."""
    bad: int
    """Lines that got {"line": n, "error": "..."}."""


def answer_file(retriever: Retriever, requests: Path, out: Path) -> Summary:
    """Answers each line of `requests` (JSON) with one line of `out`, in order, a bad line with its number and error.

    Works in `out`.partial, which is renamed when complete: `out` is never half written, and an earlier one is kept
    until then. Memory does not grow with the file.

    Raises:
      UserError: `requests` is missing or empty, `out` can't be written, or the disk is full.
    """
    total = _count_lines(requests)
    if out.exists() and out.samefile(requests):
        raise UserError(f"--requests and --out are the same file, {out}; give another --out")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    partial = out.with_name(f"{out.name}.partial")
    counts = {"model": 0, "popular": 0, "bad": 0}
    with writing(out.parent), progress("{task.fields[bad]} bad") as bars:
        task = bars.add_task("answer", total=total, bad=0)
        with requests.open("rb") as lines, partial.open("w", encoding="utf-8") as answers:
            numbered = enumerate(lines, start=1)
            while chunk := list(islice(numbered, LINES_AT_ONCE)):
                for kind, text in _answer_lines(retriever, chunk):
                    counts[kind] += 1
                    answers.write(f"{text}\n")
                bars.update(task, advance=len(chunk), bad=counts["bad"])
            answers.flush()
            os.fsync(answers.fileno())
        partial.replace(out)
    return Summary(counts["model"] + counts["popular"], counts["popular"], counts["bad"])


def _answer_lines(retriever: Retriever, chunk: list[tuple[int, bytes]]) -> Iterator[tuple[str, str]]:
    """(source of the answer or "bad", its JSON) of every (number, line)."""
    parsed = [_parse(line) for _, line in chunk]
    answers = iter(retriever.answer([request for request in parsed if not isinstance(request, UserError)]))
    for (number, _), request in zip(chunk, parsed, strict=True):
        answer = request if isinstance(request, UserError) else next(answers)
        if isinstance(answer, UserError):
            yield "bad", json.dumps({"line": number, "error": str(answer)}, ensure_ascii=False)
        else:
            yield answer.source, answer.to_json()


def _parse(line: bytes) -> Request | UserError:
    try:
        return parse_request(line)
    except UserError as error:
        return error


def _count_lines(requests: Path) -> int:
    try:
        with requests.open("rb") as file:
            total, blank = 0, True
            for line in file:
                total, blank = total + 1, blank and not line.strip()
    except OSError as error:
        raise UserError(f"--requests {requests} can't be read: {error.strerror}") from error
    if blank:
        raise UserError(f'{requests} holds no requests; write one JSON object a line, such as {{"user_id": "123"}}')
    return total
