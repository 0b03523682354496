"""Batch inference: a file of requests in, a file of answers out, line by line, of any length.

Lines are processed in *windows* of thousands. Within a window requests of one history length and one depth are batched,
so that batches are full and of few shapes; the answers are written in the order of the lines. Two windows are processed
at a time: while the device decodes one, the other is parsed or written.

A killed run resumes from `<out>.partial`. Beside it, `<out>.partial.json` records the origin of the answers (requests,
run, settings) and their extent: whole windows, with a checksum. Windows depend only on their lines, so a resumed run
makes the same batches as an uninterrupted one, and ends in the same bytes.

Fault injection, for the tests (`jaxrec.files.fault_point`): the points `answers:<lines>` after a window is written and
before it is noted, `noted:<lines>` after that.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxrec import __version__
from jaxrec.config import UserError, to_json
from jaxrec.console import progress, track
from jaxrec.files import fault_point, read_json, sync, write_json, writing
from jaxrec.run import Run
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request, parse_request
from jaxrec.targets.texts import TARGETS

WINDOW_LINES, WINDOW_BYTES, WINDOW_ITEMS = 4096, 1 << 24, 1 << 17
"""Limits of a window: lines, bytes, requested items."""
MAX_LINE = 1 << 26
CHUNK = 1 << 20
LOG = logging.getLogger(__name__)
BEGIN_AGAIN = "give --restart to begin again, or another --out"


@dataclass(frozen=True)
class Summary:
    """The outcome of the lines of a request file."""

    answered: int
    """Lines answered, `popular` included."""
    popular: int
    """Lines answered with popular items, since the user has no history."""
    bad: int
    """Lines answered with {"line": n, "error": "..."}."""
    resumed: int = 0
    """Lines of all these that an earlier process had answered."""


@dataclass
class Position:
    """The extent of the answers, in whole windows."""

    lines: int = 0
    offset: int = 0
    """of the next line, in the request file"""
    size: int = 0
    """of the answers, in bytes"""
    sha256: str = hashlib.sha256().hexdigest()
    """of the answers"""
    model: int = 0
    popular: int = 0
    bad: int = 0


@dataclass(frozen=True)
class Window:
    """Consecutive lines, parsed."""

    first: int
    """number of the first line, from 1"""
    requests: list[Request | UserError]
    end: int
    """offset of the next line"""


def answer_file(
    retriever: Retriever, requests: Path, out: Path, *, restart: bool = False, window_lines: int = WINDOW_LINES
) -> Summary:
    """Answers each line of `requests` (JSON) with one line of `out`, in order, a bad line with its number and error.

    Works in `out`.partial, which is renamed when complete: `out` is never half written, and an earlier one is kept
    until then. The answers of an earlier, killed call are continued; `restart` discards them. Memory does not grow
    with the file.

    Raises:
      UserError: `requests` is missing or empty, `out` can't be written, the disk is full, another process writes there,
        or the partial answers are of other requests, another run or other settings.
    """
    if window_lines < 1:
        raise UserError(f"--window {window_lines}: give a number of 1 or more")
    partial, notes = _beside(out)
    total, digest = _survey(requests)
    if out.exists() and out.samefile(requests):
        raise UserError(f"--requests and --out are the same file, {out}; give another --out")
    origin = {"requests": digest, "run": _run_digest(retriever.run), "settings": _settings(retriever, window_lines)}
    with writing(out.parent), _open_locked(partial) as answers:
        position = Position() if restart else _resume(partial, notes, origin)
        hashed, resumed = _hash_of(answers, position.size), position.lines
        if hashed.hexdigest() != position.sha256:
            raise UserError(f"{partial} was changed since it was written (its sha256 differs); {BEGIN_AGAIN}")
        if os.fstat(answers.fileno()).st_size > position.size:
            answers.truncate(position.size)  # part of a window
        with requests.open("rb") as lines:
            lines.seek(position.offset)
            _answer_rest(retriever, lines, answers, hashed, notes, origin, position, total, window_lines)
        partial.replace(out)
        notes.unlink(missing_ok=True)
        sync(out.parent)
    return Summary(position.model + position.popular, position.popular, position.bad, resumed)


def _answer_rest(
    retriever: Retriever,
    lines: BinaryIO,
    answers: BinaryIO,
    hashed: Any,
    notes: Path,
    origin: dict[str, Any],
    position: Position,
    total: int,
    window_lines: int,
) -> None:
    """Answers the lines from `position` on; updates the position and the hash of the answers."""

    def write(window: Window, text: bytes, counts: dict[str, int]) -> None:
        answers.write(text)
        answers.flush()
        os.fsync(answers.fileno())
        hashed.update(text)
        position.lines, position.offset = position.lines + len(window.requests), window.end
        position.size, position.sha256 = position.size + len(text), hashed.hexdigest()
        for kind, count in counts.items():
            setattr(position, kind, getattr(position, kind) + count)
        fault_point(f"answers:{position.lines}")
        write_json(notes, {"origin": origin, "position": to_json(position)})
        fault_point(f"noted:{position.lines}")
        bars.update(task, completed=position.lines, bad=position.bad)

    write_json(notes, {"origin": origin, "position": to_json(position)})
    pool, waiting = ThreadPoolExecutor(2, thread_name_prefix="answers"), deque()
    with progress("{task.fields[bad]} bad") as bars:
        task = bars.add_task("answer", total=total, completed=position.lines, bad=position.bad)
        try:
            for window in _windows(lines, position.lines + 1, window_lines):
                waiting.append((window, pool.submit(_answer_window, retriever, window)))
                if len(waiting) == 3:  # two in progress, one ready
                    done, answer = waiting.popleft()
                    write(done, *answer.result())
            for done, answer in waiting:
                write(done, *answer.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _answer_window(retriever: Retriever, window: Window) -> tuple[bytes, dict[str, int]]:
    """The answers of a window as lines, and the count of each kind."""
    good = [request for request in window.requests if not isinstance(request, UserError)]
    answers = iter(retriever.answer(good, at_once=max(1, len(good))))
    counts = {"model": 0, "popular": 0, "bad": 0}
    lines = []
    for number, request in enumerate(window.requests, start=window.first):
        answer = request if isinstance(request, UserError) else next(answers)
        if isinstance(answer, UserError):
            lines.append(json.dumps({"line": number, "error": str(answer)}, ensure_ascii=False))
        else:
            lines.append(answer.to_json())
        source = "bad" if isinstance(answer, UserError) else answer.source
        counts["model" if source == "own" else source] += 1
    lines.append("")
    return "\n".join(lines).encode(), counts


# ---- reading requests ----------------------------------------------------------------------------------------------


def _windows(file: BinaryIO, number: int, window_lines: int) -> Iterator[Window]:
    """The rest of a file in windows; `number` is that of its next line."""
    while True:
        start, items, requests = file.tell(), 0, []
        while len(requests) < window_lines and items < WINDOW_ITEMS and file.tell() - start < WINDOW_BYTES:
            line = file.readline(MAX_LINE)
            if not line:
                break
            requests.append(_parse(line, file))
            items += getattr(requests[-1], "k", 0)
        if not requests:
            return
        yield Window(number, requests, file.tell())
        number += len(requests)


def _parse(line: bytes, file: BinaryIO) -> Request | UserError:
    if len(line) == MAX_LINE and not line.endswith(b"\n"):
        while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
            pass  # to the end of the line
        return UserError(f"the line is longer than {MAX_LINE // 2**20} MiB")
    try:
        return parse_request(line)
    except UserError as error:
        return error
    except Exception as error:  # an internal error must not end a file of millions
        LOG.exception("a line was refused")
        return UserError(f"this line can't be read: {type(error).__name__}; the log says why")


def _survey(requests: Path) -> tuple[int, str]:
    """(lines, sha256) of the request file."""
    digest, lines, blank, last = hashlib.sha256(), 0, True, b"\n"
    try:
        size = requests.stat().st_size
        with requests.open("rb") as file:
            for _ in track(range(-(-size // CHUNK)), "read requests"):
                chunk = file.read(CHUNK)
                digest.update(chunk)
                lines, blank, last = lines + chunk.count(b"\n"), blank and not chunk.strip(), chunk[-1:]
    except OSError as error:
        raise UserError(f"--requests {requests} can't be read: {error.strerror}") from error
    if blank:
        raise UserError(f'{requests} holds no requests; write one JSON object a line, such as {{"user_id": "123"}}')
    return lines + (last != b"\n"), digest.hexdigest()


# ---- resuming --------------------------------------------------------------------------------------------------------


def _beside(out: Path) -> tuple[Path, Path]:
    """The partial answers to `out`, and their notes.

    Raises:
      UserError: `out` or the notes couldn't be written.
    """
    try:
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
        if out.is_dir():
            raise UserError(f"--out {out} is a folder; give the path of a file in it")
        partial, notes = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")
        for path in (out, notes, notes.with_name(f".{notes.name}.partial")):  # the last: write_json
            if path.exists() and not path.is_file():
                raise UserError(f"--out {out}: {path} is there and no file; give another --out")
    except OSError as error:  # such as a name that is too long
        raise UserError(f"--out {out} can't be written: {error.strerror}; give another --out") from error
    return partial, notes


def _open_locked(partial: Path) -> BinaryIO:
    """The partial answers, locked for this process."""
    try:
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:  # no permission, a folder, a read-only file system ...
        raise UserError(f"--out: {partial} can't be written: {error.strerror}; give another --out") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"another process is writing {partial}; wait for it, or give another --out") from error
    return file


def _resume(partial: Path, notes: Path, origin: dict[str, Any]) -> Position:
    """The verified extent of the answers in `partial`; zero without notes.

    Raises:
      UserError: the answers have another origin, or their origin is unknown.
    """
    if not notes.exists() or not partial.stat().st_size:
        return Position()
    try:
        noted = read_json(notes)
        position, found = Position(**noted["position"]), noted["origin"]
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{notes} can't be understood, so nobody knows what {partial} holds; {BEGIN_AGAIN}") from error
    other = {"requests": "to other requests", "run": "of another run", "settings": "with other settings or versions"}
    if wrong := [text for name, text in other.items() if found.get(name) != origin[name]]:
        raise UserError(f"{partial} holds unfinished answers {' and '.join(wrong)}; {BEGIN_AGAIN}")
    return position


def _hash_of(file: BinaryIO, size: int) -> Any:
    """The hash of the first `size` bytes; the file is positioned after them."""
    hashed = hashlib.sha256()
    file.seek(0)
    for start in track(range(0, size, CHUNK), "check answers"):
        hashed.update(file.read(min(CHUNK, size - start)))
    return hashed


def _run_digest(run: Run) -> str:
    """A digest of everything in a run that answers depend on."""
    digest = hashlib.sha256()
    for folder in (run.tables, run.semantic_ids, run.place(TARGETS)):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(run.path)}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    # Checkpoints have their own checksum, and one configuration always trains to the same bits.
    for path in sorted(path for path in run.stages.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(run.path)}\0{path.stat().st_size}\0".encode())
    digest.update(run.config_file.read_bytes())
    return digest.hexdigest()


def _settings(retriever: Retriever, window_lines: int) -> dict[str, Any]:
    """The settings that answers depend on."""
    import jax  # here: an error in the command line should not wait for it

    return {
        "jaxrec": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "window": [window_lines, WINDOW_BYTES, WINDOW_ITEMS],
        "decoding": to_json(getattr(retriever.recommender, "config", None)),
    }
