"""Files that survive a crash: JSON written atomically, flushed folders, a full disk as one sentence."""

import errno
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrec.config import UserError


def write_json(path: Path, value: Any) -> None:
    """Writes JSON values atomically: after a crash the file is either the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is missing, damaged or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run train.py again on this run directory") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: this is no JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is no text ({error}); restore it from a copy") from error


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full disk into a UserError that names the folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        raise UserError(f"the disk is full: {folder} could not be written; free some space and run it again") from error


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, means that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # DuckDB and tensorstore raise their own types with the system's message.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def fault_point(point: str) -> None:
    """Kills this process if the tests ask for it at this point; the points are listed in `jaxrec.run`."""
    if os.environ.get("JAXREC_KILL_AT") == point:
        os.kill(os.getpid(), signal.SIGKILL)
