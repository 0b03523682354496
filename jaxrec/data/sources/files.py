"""What the sources that read a user's files share: digests and lines with their numbers in messages."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrec.config import UserError


def require(path: Path, what: str) -> Path:
    """Returns `path`. Raises UserError, which says what it should hold, if there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; it should hold {what}")
    return path


def digest(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, for fingerprints."""
    with path.open("rb") as file:
        return {
            "name": path.name,
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) of a UTF-8 file; a byte order mark is passed over.

    Raises:
      UserError: a line is no UTF-8.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise UserError(
                    f"{path}, line {number}: byte 0x{byte:02x} is no UTF-8; save the file as UTF-8"
                ) from error


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSON-lines file; blank lines are passed over.

    Raises:
      UserError: a line is no JSON object.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of numbers and nesting that Python refuses
            message = getattr(error, "msg", error)
            raise UserError(
                f"{path}, line {number}: no valid JSON ({message}); write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON {type(row).__name__}; write one JSON object a line")
        yield number, row
