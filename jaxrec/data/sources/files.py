"""Shared by the sources that read files: digests, and lines with their numbers for messages."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxrec.config import UserError


def require(path: Path, what: str) -> Path:
    """Returns `path`. Raises UserError, which names the expected content, if there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; it should hold {what}")
    return path


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its name ends in .gz.

    Raises:
      UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; correct the path")
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def kind_of(path: Path) -> str:
    """The last part of a file's name that says what it holds, .gz left out: `.tsv` of clicks.tsv.gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def digest(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, for fingerprints."""
    with path.open("rb") as file:
        return {
            "name": path.name,
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) of a UTF-8 file; a byte order mark is skipped.

    Raises:
      UserError: a line is no UTF-8.
    """
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise UserError(
                    f"{path}, line {number}: byte 0x{byte:02x} is no UTF-8; save the file as UTF-8"
                ) from error


class Whole(str):
    """A JSON number without fraction and exponent, as it is written."""

    __slots__ = ()


class Real(str):
    """A JSON number with fraction or exponent, as it is written."""

    __slots__ = ()


def as_written(line: str) -> Any:
    """The value of a JSON text, with `Whole` and `Real` for its numbers. NaN, Python's missing number, is None.

    Raises:
      ValueError: this is no JSON.
    """
    return _AS_WRITTEN.decode(line)


def written(value: Any) -> str | None:
    """A JSON value that `as_written` gave as text; that of an object or a list is its JSON."""
    return value if value is None or isinstance(value, str) else _json(value)


def json_lines(path: Path, decode: Callable[[str], Any] = json.loads) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSON-lines file; blank lines are skipped. `decode` reads a line.

    Raises:
      UserError: a line is no JSON object.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            mend = "write one JSON object a line, without brackets around them or commas between them"
            raise UserError(f"{path}, line {number}: a JSON list; {mend}")
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:  # also of numbers and nesting that Python refuses
            message = getattr(error, "msg", error)
            raise UserError(
                f"{path}, line {number}: no valid JSON ({message}); write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON {type(row).__name__}; write one JSON object a line")
        yield number, row


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no number of JSON")


_AS_WRITTEN = json.JSONDecoder(parse_int=Whole, parse_float=Real, parse_constant=_constant)


def _json(value: Any) -> str:
    if isinstance(value, Whole | Real):
        return value
    if isinstance(value, dict):
        pairs = zip(map(_json, value), map(_json, value.values()), strict=True)
        return "{" + ", ".join(map(": ".join, pairs)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
